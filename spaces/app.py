"""The Space: the web demo of diffusers-moebius, which `moebius demo` serves on any machine."""

import contextlib

with contextlib.suppress(ImportError):  # ZeroGPU wants to be imported before torch is.
    import spaces  # noqa: F401

from diffusers_moebius.demo import launch_demo

if __name__ == "__main__":
    launch_demo()
