#!/usr/bin/env python3
"""Compares samplers, numbers of steps, guidance intervals and starting points, as Markdown tables.

    python benchmarks/sampling.py --data photos-val.tar --limit 16 --resolution 256 --lpips_weights alex.safetensors

The data is what `quality.py` takes: photos `NAME.jpg` with masks `NAME.mask.png`, in a folder or a tar file. The hole
is blanked before anything else, and results are pasted with a hard edge, so that the hole alone counts.

Each row is compared with its reference, the result of 100 DDIM steps from the same noise, and with the photo: PSNR
over the pixels of the hole and the mean of the LPIPS map over the hole, both averaged over the photos. Evaluations are
those of the U-Net for one branch: a guided step has two.
"""

import argparse
import json
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, LCMScheduler, UniPCMultistepScheduler
from PIL import Image
from quality_data import Samples
from quality_metrics import lpips_in_hole_and_picture, psnr
from tqdm.auto import tqdm

from diffusers_moebius import MoebiusInpaintPipeline
from diffusers_moebius.evaluation.lpips import LPIPS
from diffusers_moebius.evaluation.methods import blank_hole

SAMPLERS = {
    "DDIM": DDIMScheduler,
    "DPM-Solver++ 2M": DPMSolverMultistepScheduler,
    "UniPC": UniPCMultistepScheduler,
    "LCM": LCMScheduler,
}
STARTS = (("fill", 0.9), ("fill", 0.7), ("fill", 0.5), ("noise", 0.7), ("original", 0.7))
SCORES = {
    "psnr_reference": ("PSNR to the reference ↑", "{:.2f}"),
    "lpips_reference": ("LPIPS to the reference ↓", "{:.3f}"),
    "psnr_photo": ("PSNR to the photo ↑", "{:.2f}"),
    "lpips_photo": ("LPIPS to the photo ↓", "{:.3f}"),
}


@dataclass
class Run:
    """
    One row.

    Args:
        name (`str`): What the row is called.
        sampler (`str`): One of `SAMPLERS`.
        steps (`int`): `num_inference_steps`.
        options (`dict`): Further arguments of the pipeline's call.
    """

    name: str
    sampler: str
    steps: int
    options: dict = field(default_factory=dict)


def guided_intervals(steps: int) -> list[tuple[int, int]]:
    """The first and the last step of guidance, counted from 0 and exclusive: the beginnings, the ends, none."""
    beginnings = [(0, end) for end in range(steps, 0, -1)]
    ends = [(start, steps) for start in range(1, steps)]
    return [*beginnings, *ends, (0, 0)]


def plan(args: argparse.Namespace) -> dict[str, tuple[Run, list[Run]]]:
    """The rows of each table, with the run that each is compared with."""
    plain = {"strength": 1.0, "guidance_scale": args.guidance_scale}
    plain = {name: value for name, value in plain.items() if value is not None}
    reference = Run("DDIM", "DDIM", args.reference_steps, plain)
    tables = {"Samplers and steps": (reference, [])}
    for sampler in SAMPLERS:
        tables["Samplers and steps"][1].extend(Run(sampler, sampler, steps, plain) for steps in args.steps)

    guided = {"strength": 1.0, "guidance_scale": args.interval_guidance_scale}
    total = args.sampler_steps
    rows = []
    for start, end in guided_intervals(total):
        name = f"steps {start + 1} to {end} guided" if end > start else "no step guided"
        interval = {"guidance_start": start / total, "guidance_end": end / total}
        rows.append(Run(name, args.sampler, total, guided | interval))
    # What the cheaper rows compete with: fewer steps, all of them guided.
    for fewer in range(max(1, total - 2), total):
        rows.append(Run("all steps guided", args.sampler, fewer, guided))
    guided_reference = Run("DDIM", "DDIM", args.reference_steps, guided)
    tables[f"Guidance of scale {args.interval_guidance_scale:g} in a part of the steps"] = (guided_reference, rows)

    rows = [Run("pure noise", args.sampler, args.sampler_steps, plain)]
    for content, strength in STARTS:
        options = plain | {"strength": strength, "masked_content": content}
        rows.append(Run(f"{content}, strength {strength:g}", args.sampler, args.sampler_steps, options))
    tables["Starting points"] = (reference, rows)
    return tables


def execute(pipe: MoebiusInpaintPipeline, run: Run, image: Image.Image, mask: np.ndarray, seed: int):
    """Lets a pipeline do one run; returns the picture `[H, W, 3]` in `uint8` and the number of evaluations."""
    scheduler = SAMPLERS[run.sampler].from_config(pipe.scheduler.config, timestep_spacing="trailing")
    pipe = MoebiusInpaintPipeline.from_pipe(pipe, scheduler=scheduler)
    pipe.set_progress_bar_config(disable=True)
    evaluations = 0

    def count(module, arguments, keywords):
        nonlocal evaluations
        evaluations += len(arguments[0])

    hook = pipe.unet.register_forward_pre_hook(count, with_kwargs=True)
    try:
        result = pipe(
            image=image,
            mask_image=Image.fromarray(mask.astype(np.uint8) * 255),
            num_inference_steps=run.steps,
            generator=torch.Generator().manual_seed(seed),
            paste=None,
            **run.options,
        ).images[0]
    finally:
        hook.remove()
    return np.asarray(result.convert("RGB")), evaluations


def compare(args: argparse.Namespace, pipe: MoebiusInpaintPipeline, lpips: LPIPS, samples: Samples) -> list[dict]:
    """The scores of every run for every photo."""
    results = []
    for index in tqdm(range(len(samples)), file=sys.stderr):
        sample = samples[index]
        blanked, mask = blank_hole(sample.photo, sample.mask), sample.mask
        cache: dict[str, tuple[np.ndarray, int]] = {}

        def picture(run: Run, blanked=blanked, mask=mask, index=index, cache=cache) -> tuple[np.ndarray, int]:
            key = json.dumps([run.sampler, run.steps, run.options], sort_keys=True)
            if key not in cache:
                result, evaluations = execute(pipe, run, Image.fromarray(blanked), mask, args.seed + index)
                cache[key] = np.where(mask[..., None], result, blanked), evaluations
            return cache[key]

        for table, (reference, runs) in plan(args).items():
            expected, _ = picture(reference)
            for run in runs:
                result, evaluations = picture(run)
                scores = {}
                for name, other in (("reference", expected), ("photo", sample.photo)):
                    scores[f"psnr_{name}"] = min(psnr(result[mask], other[mask]), 100.0)
                    scores[f"lpips_{name}"] = lpips_in_hole_and_picture(lpips, result, other, mask)[0]
                row = {"table": table, "photo": sample.name, "evaluations": evaluations, **asdict(run)}
                results.append(row | {"scores": scores})
        if args.json_file is not None:
            args.json_file.write_text(json.dumps(results, indent=1) + "\n")
    return results


def markdown_tables(args: argparse.Namespace, results: list[dict]) -> str:
    """The means over the photos."""
    tables = []
    for title, (reference, runs) in plan(args).items():
        guidance = reference.options.get("guidance_scale")
        note = "the model's guidance" if guidance is None else f"guidance {guidance:g}"
        lines = [f"**{title}** (compared with {reference.steps} steps of DDIM, {note})", ""]
        lines.append("| | steps | evaluations | " + " | ".join(title for title, _ in SCORES.values()) + " |")
        lines.append("|---|---:|---:|" + "---:|" * len(SCORES))
        for run in runs:
            rows = [row for row in results if row["table"] == title and asdict(run).items() <= row.items()]
            means = {name: np.mean([row["scores"][name] for row in rows]) for name in SCORES}
            cells = [pattern.format(means[name]) for name, (_, pattern) in SCORES.items()]
            sampler = "" if run.name == run.sampler else f", {run.sampler}"
            lines.append(
                f"| {run.name}{sampler} | {run.steps} | {rows[0]['evaluations']} | " + " | ".join(cells) + " |"
            )
        tables.append("\n".join(lines))
    return "\n\n".join(tables)


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--model", default="nano", help="`nano`, a pipeline folder or a hub repository")
    add("--data", required=True, help="folder or tar file of photos with masks")
    add("--lpips_weights", help="safetensors file with the LPIPS network; default: that of the `lpips` package")
    add("--limit", type=int, default=8, help="number of photos, spread evenly over the data")
    add("--resolution", type=int, help="resize photos and masks to this shorter side before anything else")
    add("--steps", type=int, nargs="+", default=[1, 2, 3, 4, 5, 6, 8, 10, 20])
    add("--reference_steps", type=int, default=100)
    add("--guidance_scale", type=float, help="of the first and the third table; default: the model's")
    add("--interval_guidance_scale", type=float, default=2.5, help="of the second table")
    add("--sampler", choices=SAMPLERS, default="UniPC", help="of the second and the third table")
    add("--sampler_steps", type=int, default=5, help="of the second and the third table")
    add("--json", dest="json_file", type=Path, help="file for the scores of each photo, written after each")
    add("--seed", type=int, default=0)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(arguments)
    for name in ("limit", "resolution", "reference_steps", "sampler_steps"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"`--{name}` must be at least 1, but is {getattr(args, name)}")
    if min(args.steps) < 1:
        parser.error(f"`--steps` must be at least 1, but are {args.steps}")
    return args


def main(arguments: list[str] | None = None) -> None:
    args = parse_args(arguments)
    try:
        lpips = LPIPS.from_pretrained(args.lpips_weights).to(args.device)
    except (ImportError, ValueError) as error:
        sys.exit(f"sampling.py: error: `--lpips_weights`: {error} The extra `lpips` brings the package.")
    pipe = MoebiusInpaintPipeline.from_pretrained(args.model, dtype=torch.float32).to(args.device)
    pipe.prepare_for_inference()
    samples = Samples(args.data, limit=args.limit, resolution=args.resolution)
    print(markdown_tables(args, compare(args, pipe, lpips, samples)))
    print(f"\n{len(samples)} photos, seed {args.seed}.")


if __name__ == "__main__":
    main()
