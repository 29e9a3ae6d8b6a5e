"""
The web demo: remove things from photos in a browser.

Needs the extra `demo` (`pip install diffusers-moebius[demo]`).
"""

from .page import build_demo, launch_demo
from .photos import VisitorError

__all__ = ["VisitorError", "build_demo", "launch_demo"]
