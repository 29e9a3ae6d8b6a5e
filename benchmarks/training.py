#!/usr/bin/env python3
"""Measures what training costs: gated linear attention against its recurrence, and the adaptive balance of the losses.

    python benchmarks/training.py [--output training.json]

Two tables. The first times the chunked form of gated linear attention against the literal recurrence at the positions
and width of the teacher's largest level: what comes after the projections alone, then the whole layer. The second
times one distillation step (student and teacher forward, backward) with the losses added up against the same step with
the losses weighed by their gradients' norms. Both ways of each pair take turns; the figures are medians.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from diffusers_moebius.models.linear_attention import (
    ChunkedGatedLinearAttentionProcessor,
    GatedLinearAttention,
    GatedLinearAttentionProcessor,
)
from diffusers_moebius.models.unet_2d_moebius import MoebiusUNet2DModel
from diffusers_moebius.models.unet_2d_pixelhacker import PixelHackerUNet2DModel
from diffusers_moebius.training.distillation import AdaptiveBalance, distillation_losses


class Projected:
    """Stands for a layer whose projections have been done, so that a processor's own work is timed alone."""

    def __init__(self, layer: GatedLinearAttention, hidden_states: torch.Tensor):
        self.projections = layer.project(hidden_states)

    def project(self, hidden_states):
        return self.projections

    def gate_output(self, output, hidden_states):
        return output


def time_in_turns(functions: dict[str, Callable], repeats: int) -> dict[str, float]:
    """The median seconds of each function, all called in turns after one round that is not counted."""
    times = {name: [] for name in functions}
    for round_number in range(repeats + 1):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            if round_number:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


@torch.no_grad()
def measure_attention(positions: int, width: int, repeats: int) -> list[dict]:
    layer, hidden_states = GatedLinearAttention(width, 8).eval(), torch.randn(1, positions, width)
    literal, chunked = GatedLinearAttentionProcessor(), ChunkedGatedLinearAttentionProcessor()
    rows = []
    for part, attn in (("after the projections", Projected(layer, hidden_states)), ("whole layer", layer)):
        results = [processor(attn, hidden_states) for processor in (literal, chunked)]
        error = ((results[0] - results[1]).abs().max() / results[0].abs().max()).item()
        times = time_in_turns(
            {
                "literal": partial(literal, attn, hidden_states),
                "chunked": partial(chunked, attn, hidden_states),
            },
            repeats,
        )
        rows.append({"part": part, "ratio": times["literal"] / times["chunked"], "error": error, **times})
    return rows


def measure_balance(student_widths, teacher_widths, size: int, batch: int, repeats: int) -> list[dict]:
    torch.manual_seed(0)
    options = {"num_attention_heads": 4, "cross_attention_dim": 64, "encoder_hid_dim": 64, "norm_num_groups": 16}
    student = MoebiusUNet2DModel(block_out_channels=student_widths, local_window_size=7, **options).train()
    teacher = PixelHackerUNet2DModel(block_out_channels=teacher_widths, **options).eval().requires_grad_(False)
    sample, noise, latents = torch.randn(batch, 9, size, size), *torch.randn(2, batch, 4, size, size)
    timesteps, tokens = torch.randint(0, 1000, (batch,)), torch.randn(batch, 10, 64)

    def step(mode: str | None) -> None:
        student.zero_grad()
        output = student(sample, timesteps, tokens, output_hidden_states=True)
        with torch.no_grad():
            teacher_output = teacher(sample, timesteps, tokens, output_hidden_states=True)
        losses = distillation_losses(output, teacher_output, noise)
        losses["perceptual"] = (output.sample - latents).abs().mean()
        if mode is None:
            sum(losses.values()).backward()
        else:
            AdaptiveBalance(student, mode)(losses, output.sample).backward()

    modes = {"added up": None, "release": "release", "paper": "paper"}
    times = time_in_turns({name: partial(step, mode) for name, mode in modes.items()}, repeats)
    return [{"balance": name, "seconds": value, "ratio": value / times["added up"]} for name, value in times.items()]


def main(arguments: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--positions", type=int, default=4096)
    parser.add_argument("--width", type=int, default=320)
    parser.add_argument("--student_widths", type=int, nargs=3, default=[64, 128, 256])
    parser.add_argument("--teacher_widths", type=int, nargs=4, default=[64, 128, 256, 256])
    parser.add_argument("--latent_size", type=int, default=16)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--output", help="JSON file to write")
    args = parser.parse_args(arguments)

    result = {
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}",
        "attention": measure_attention(args.positions, args.width, args.repeats),
        "balance": measure_balance(
            tuple(args.student_widths), tuple(args.teacher_widths), args.latent_size, args.batch_size, args.repeats
        ),
    }
    print(f"{result['machine']}\n\nGated linear attention, {args.positions} positions, width {args.width}\n")
    print("| | literal | chunked | ratio | relative error |\n|---|---|---|---|---|")
    for row in result["attention"]:
        times = f"{1000 * row['literal']:.1f} ms | {1000 * row['chunked']:.1f} ms"
        print(f"| {row['part']} | {times} | {row['ratio']:.1f}x | {row['error']:.1e} |")
    print("\nOne distillation step\n\n| losses | seconds | ratio |\n|---|---|---|")
    for row in result["balance"]:
        print(f"| {row['balance']} | {row['seconds']:.3f} | {row['ratio']:.2f}x |")
    if args.output:
        Path(args.output).write_text(json.dumps(result, indent=2) + "\n")
    return result


if __name__ == "__main__":
    main()
