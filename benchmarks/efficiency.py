#!/usr/bin/env python3
"""Measures what the paper's Table 1 holds: parameters, multiply-adds, latency a step, peak memory and time.

    python benchmarks/efficiency.py --method nano hustvl/Moebius flux-fill --dtype bfloat16 --json efficiency.json

Each pipeline (`--method` and `--settings` as in `quality.py`) fills the middle of one random picture, first to warm up
and then `--repeats` times; figures of time are medians.

- Parameters and multiply-adds are those of the denoiser, U-Net or transformer, with its category embedder; the
  multiply-adds are counted in one evaluation for one picture and one branch of the guidance. The paper calls their
  number FLOPs. The literal ones build every lambda before a query meets it, as the original release does, at the
  native size of the model.
- A step is one call of the denoiser as the pipeline makes it, with both branches of the guidance where there are two.
  The total is the sum over the steps, as in the paper; a picture takes autoencoder, text encoders and our detail too.
- Memory is that of all weights, and the most that a call takes beyond what is held before it. On a CPU, which counts
  whole pages, it is known on Linux only; give each method a process of its own there.
"""

import argparse
import copy
import gc
import json
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch
from latency import resident_bytes

from diffusers_moebius.evaluation.methods import PipelineMethod, make_method, read_settings, split_names
from diffusers_moebius.models import multiply_adds

# Key, head of the column, factor and format.
COLUMNS = (
    ("parameters", "parameters", 1e-6, "{:.2f} M"),
    ("multiply_adds", "multiply-adds", 1e-9, "{:.2f} G"),
    ("multiply_adds_literal", "multiply-adds, literal", 1e-9, "{:.2f} G"),
    ("step_seconds", "ms a step", 1e3, "{:.2f}"),
    ("steps", "steps", 1, "{:.0f}"),
    ("total_seconds", "total s", 1, "{:.2f}"),
    ("picture_seconds", "s a picture", 1, "{:.2f}"),
    ("weight_bytes", "weights", 2**-20, "{:.0f} MiB"),
    ("peak_bytes", "peak memory above", 2**-20, "{:.0f} MiB"),
)
CLEAR_REFS = Path("/proc/self/clear_refs")


def count_literal_multiply_adds(unet: torch.nn.Module, context: tuple[int, int]) -> int:
    """
    Multiply-adds of an evaluation of a U-Net for one picture of its native size, as the original release does it.

    Args:
        unet ([`MoebiusUNet2DModel`] or [`PixelHackerUNet2DModel`]): Left as it is.
        context (`tuple[int, int]`): Number and width of the context tokens.
    """
    unet = copy.deepcopy(unet).to("meta").requires_grad_(False)
    if hasattr(unet, "set_lambda_algorithm"):
        unet.set_lambda_algorithm("reference")
    side = unet.config.sample_size
    sample = (1, unet.config.in_channels, side, side)
    return multiply_adds.count_multiply_adds(unet, sample, (1,), (1, *context), dtype=unet.dtype)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Stopwatch:
    """Times every call of a module, and keeps the arguments of the first."""

    def __init__(self, module: torch.nn.Module):
        self.device, self.seconds, self.arguments = module.device, [], None
        self.hooks = (
            module.register_forward_pre_hook(self._start, with_kwargs=True),
            module.register_forward_hook(self._stop),
        )

    def _start(self, module, args, kwargs):
        self.arguments = self.arguments or (args, kwargs)
        synchronize(self.device)
        self.began = time.perf_counter()

    def _stop(self, module, args, output):
        synchronize(self.device)
        self.seconds.append(time.perf_counter() - self.began)

    def remove(self) -> None:
        for hook in self.hooks:
            hook.remove()


def peak_bytes(function, device: torch.device) -> int | None:
    """The most memory that a call takes beyond what is held before it."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        return torch.cuda.max_memory_allocated(device) - before
    if device.type != "cpu" or not CLEAR_REFS.exists():
        return None
    before = resident_bytes("VmRSS")
    CLEAR_REFS.write_text("5")
    function()
    return resident_bytes("VmHWM") - before


@torch.no_grad()
def measure_efficiency(method: PipelineMethod, resolution: int = 512, repeats: int = 3) -> dict[str, float | None]:
    """
    Measures what a row of the paper's Table 1 holds.

    Args:
        method ([`PipelineMethod`]): Its pipeline lies on the device to measure.
        resolution (`int`, defaults to 512): Side of the picture in pixels.
        repeats (`int`, defaults to 3): Pictures that are timed.

    Returns:
        `dict[str, float | None]`: The keys of `COLUMNS`, in single units; `None` where it cannot be known.

    Raises:
        ValueError: If `method` runs no pipeline with a `unet` or a `transformer`.
    """
    pipeline = getattr(method, "pipeline", None)
    denoiser = getattr(pipeline, "unet", None) or getattr(pipeline, "transformer", None)
    if denoiser is None:
        raise ValueError("`method` must run a pipeline with a `unet` or a `transformer`; others have no steps.")
    picture = np.random.default_rng(0).integers(0, 256, (resolution, resolution, 3), dtype=np.uint8)
    mask = np.zeros((resolution, resolution), bool)
    mask[resolution // 4 : -resolution // 4, resolution // 4 : -resolution // 4] = True

    def fill():
        method(picture, mask, "", 0)

    denoiser.requires_grad_(False)  # the counter of multiply-adds looks for gradients where there are none
    watch = Stopwatch(denoiser)
    fill()
    args, kwargs = watch.arguments
    steps = len(watch.seconds)
    watch.seconds.clear()
    peak = peak_bytes(fill, denoiser.device)
    watch.seconds.clear()
    pictures = []
    for _ in range(repeats):
        start = time.perf_counter()
        fill()
        pictures.append(time.perf_counter() - start)
    watch.remove()
    batch = next(value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)).shape[0]
    embedder = getattr(pipeline, "lcg_embedder", None)
    literal = None
    if embedder is not None:
        literal = count_literal_multiply_adds(denoiser, (embedder.context_length, embedder.config.embedding_dim))
    step = statistics.median(watch.seconds)
    models = [part for part in pipeline.components.values() if isinstance(part, torch.nn.Module)]
    return {
        "parameters": sum(p.numel() for part in (denoiser, embedder) if part is not None for p in part.parameters()),
        "multiply_adds": multiply_adds.count_multiply_adds(lambda: denoiser(*args, **kwargs)) / batch,
        "multiply_adds_literal": literal,
        "step_seconds": step,
        "steps": steps,
        "total_seconds": steps * step,
        "picture_seconds": statistics.median(pictures),
        "weight_bytes": sum(tensor.nbytes for part in models for tensor in (*part.parameters(), *part.buffers())),
        "peak_bytes": peak,
    }


def format_value(key: str, value: float | None) -> str:
    """Writes a value of `COLUMNS` with its unit."""
    factor, form = next((factor, form) for name, _, factor, form in COLUMNS if name == key)
    return "–" if value is None else form.format(factor * value)


def efficiency_table(rows: dict[str, dict[str, float | None]]) -> str:
    """Writes what `measure_efficiency` returned for each method as a Markdown table."""
    lines = ["| method | " + " | ".join(head for _, head, _, _ in COLUMNS) + " |", "|---|" + "---:|" * len(COLUMNS)]
    for name, row in rows.items():
        lines.append(f"| {name} | " + " | ".join(format_value(key, row[key]) for key, *_ in COLUMNS) + " |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--method", nargs="+", action="extend", required=True, help="pipelines, named as in quality.py")
    add("--settings", help="TOML file with sections of methods, as in quality.py")
    add("--resolution", type=int, default=512, help="side of the picture")
    add("--steps", type=int, help="denoising steps of Moebius pipelines; default: their own")
    add("--guidance_scale", type=float, help="of Moebius pipelines; default: their own")
    add("--repeats", type=int, default=3, help="pictures that are timed")
    add("--json", dest="json_file", help="file for the figures")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--dtype", choices=("float32", "float16", "bfloat16"), default="float32")
    args = parser.parse_args(arguments)
    for name in ("resolution", "repeats"):
        if getattr(args, name) < 1:
            parser.error(f"`--{name}` must be at least 1, but is {getattr(args, name)}")
    settings = None if args.settings is None else read_settings(args.settings)
    call = {"num_inference_steps": args.steps, "guidance_scale": args.guidance_scale}
    call = {key: value for key, value in call.items() if value is not None}
    rows = {}
    for name, spec in split_names(args.method).items():
        method = make_method(spec, settings, args.device, getattr(torch, args.dtype), **call)
        rows[name] = measure_efficiency(method, args.resolution, args.repeats)
        del method  # before the next one is loaded
    print(efficiency_table(rows))
    if args.json_file is not None:
        Path(args.json_file).write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"efficiency.py: {error}")
