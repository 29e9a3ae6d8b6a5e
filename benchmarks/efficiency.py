"""Parameters, multiply-adds and latency of a pipeline, as in the paper's Table 1."""

import copy
import statistics
import time
from collections.abc import Callable

import torch

from diffusers_moebius.models import multiply_adds

WARMUP, REPEATS = 2, 7


def count_multiply_adds(unet: torch.nn.Module, context: tuple[int, int], reference: bool = False) -> int:
    """
    Multiply-adds of one evaluation of the U-Net for one picture of its native size.

    Args:
        unet ([`MoebiusUNet2DModel`] or [`PixelHackerUNet2DModel`]): Left as it is.
        context (`tuple[int, int]`): Number and width of the context tokens.
        reference (`bool`, defaults to `False`): Counts the lambda layers by their literal formulas, as the original
            evaluates them, instead of as `unet` does.

    Returns:
        `int`: Multiply-adds; the paper calls their number FLOPs.
    """
    unet = copy.deepcopy(unet).to("meta").requires_grad_(False)
    if reference and hasattr(unet, "set_lambda_algorithm"):
        unet.set_lambda_algorithm("reference")
    side = unet.config.sample_size
    sample = (1, unet.config.in_channels, side, side)
    return multiply_adds.count_multiply_adds(unet, sample, (1,), (1, *context), dtype=unet.dtype)


def median_seconds(function: Callable[[], object], device: torch.device) -> float:
    """The median time of `REPEATS` calls after `WARMUP` others, in seconds."""
    times = []
    for number in range(WARMUP + REPEATS):
        start = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if number >= WARMUP:
            times.append(time.perf_counter() - start)
    return statistics.median(times)


@torch.no_grad()
def measure_efficiency(pipeline, steps: int | None = None, strength: float | None = None) -> dict[str, float]:
    """
    Measures what a row of the paper's Table 1 holds, at the model's native size and batch 1.

    Args:
        pipeline ([`MoebiusInpaintPipeline`]): On the device to measure.
        steps (`int`, *optional*): Denoising steps, by default the pipeline's.
        strength (`float`, *optional*): Strength, by default the pipeline's.

    Returns:
        `dict[str, float]`: `parameters` of U-Net and embedder, `multiply_adds` of an evaluation and by the literal
        formulas `multiply_adds_reference`, `evaluation_seconds` (batch 1), `guided_step_seconds` (both branches,
        batch 2), `steps` that are run and `total_seconds`, all of them guided, without the VAE.
    """
    unet, embedder = pipeline.unet, pipeline.lcg_embedder
    side, dtype, device = unet.config.sample_size, unet.dtype, unet.device
    context = (embedder.context_length, embedder.config.embedding_dim)
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(2, unet.config.in_channels, side, side, generator=generator).to(device, dtype)
    tokens = torch.randn(2, *context, generator=generator).to(device, dtype)
    timestep = torch.full((2,), 500, device=device)

    steps = pipeline.config.default_num_inference_steps if steps is None else steps
    strength = pipeline.config.default_strength if strength is None else strength
    run_steps = int(steps * strength)
    evaluation, guided = (
        median_seconds(lambda b=batch: unet(sample[:b], timestep[:b], tokens[:b]), device) for batch in (1, 2)
    )
    return {
        "parameters": sum(p.numel() for model in (unet, embedder) for p in model.parameters()),
        "multiply_adds": count_multiply_adds(unet, context),
        "multiply_adds_reference": count_multiply_adds(unet, context, reference=True),
        "evaluation_seconds": evaluation,
        "guided_step_seconds": guided,
        "steps": run_steps,
        "total_seconds": run_steps * guided,
    }


def efficiency_table(rows: dict[str, dict[str, float]]) -> str:
    """Writes what `measure_efficiency` returned for each model as a Markdown table."""
    lines = [
        "| model | parameters | multiply-adds an evaluation | by the literal formulas | ms an evaluation "
        "| ms a guided step | steps | total s |",
        "|---|" + "---:|" * 7,
    ]
    for name, row in rows.items():
        lines.append(
            f"| {name} | {row['parameters'] / 1e6:.2f} M | {row['multiply_adds'] / 1e9:.2f} G "
            f"| {row['multiply_adds_reference'] / 1e9:.2f} G | {1e3 * row['evaluation_seconds']:.2f} "
            f"| {1e3 * row['guided_step_seconds']:.2f} | {row['steps']} | {row['total_seconds']:.2f} |"
        )
    return "\n".join(lines)
