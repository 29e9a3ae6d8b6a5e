#!/usr/bin/env python3
"""Measures how well a model fills holes, under the paper's protocols or on photos of your own, as a Markdown table.

    python benchmarks/quality.py --model nano --data photos-val.tar --lpips_weights alex.safetensors
    python benchmarks/quality.py --protocol celebahq-512 --data celebahq/ --results runs/celebahq
    accelerate launch --num_processes 4 benchmarks/quality.py --protocol places2-test --data places2/ \\
        --guidance_scale 1 1.5 2 2.5 3 --results runs/guidance

`custom`, the protocol without a name, takes a folder or a tar file of photos `NAME.jpg` (or .png) with a mask
`NAME.mask.png` (white = hole) and, if there is one, a `NAME.json` whose `mask` names the kind of hole, and sets
PatchMatch (`pypatchmatch`), OpenCV's two methods and a mean-colour fill beside the model. The others take photos
alone, cut the largest centred square out of each, bring it to their size, and draw the hole from the seed and the
photo's number, or take it from `--masks`. `PROTOCOLS` in `quality_data.py` says what each fixes.

No method sees what was in the hole: it is blanked with the mean colour of the visible pixels first, which is also the
mean-colour fill. What a method returns is pasted onto the photo with a hard edge, so that methods differ in the hole
alone; the model is asked for its raw picture (`paste=None`), since a feathered paste would blend the blank colour in,
or for the seamless paste where that is its default, which looks at nothing inside the hole either.
The scores, but for the FID each the mean over the pictures of its value for one picture, on 8-bit RGB at the size of
the photo or of the protocol:

- PSNR: 10 log10(255² / mean squared error), the error taken over the hole's pixels alone or the picture's, in dB.
- SSIM: the map of the structural similarity (Wang et al. 2004: Gaussian window of deviation 1.5, a map for each
  channel) between pasted picture and photo, averaged over the hole or the picture.
- LPIPS in the hole: the map of the LPIPS (each layer's distances brought to the picture's size by bilinear
  interpolation, then summed) between pasted picture and photo, averaged over the hole.
- LPIPS of the picture: the usual LPIPS of the pasted picture as a whole, which grows with the hole's share of it.
- FID: the Fréchet distance between the Inception features of all pasted pictures and those of all photos. It is
  biased upwards for few pictures: compare it only between equal numbers of them.

LPIPS is that on AlexNet, version 0.1, and where the weights for it are given also that on VGG16. A metric whose
network is not there is left out, and the report says why. With `--results` each picture's scores are written at once
and a run that was interrupted goes on; the folder ends with `report.md` and `report.json`. On several CPUs start the
processes with `torchrun --nproc_per_node 2`: `accelerate launch --cpu` starts one, unless there is MPI.
"""

import argparse
import hashlib
import json
import shlex
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object, parse_flag_from_env
from efficiency import efficiency_table, measure_efficiency
from PIL import Image, ImageDraw
from quality_data import PROTOCOLS, Protocol, Sample, Samples
from quality_metrics import (
    FeatureExtractor,
    load_inception,
    lpips_in_hole_and_picture,
    picture_features,
    score_picture,
)
from quality_report import (
    HOLE_COLUMNS,
    INCEPTION_FEATURES,
    PAPER_COLUMNS,
    Journal,
    describe_environment,
    encode_features,
    markdown_table,
    report_markdown,
    summarise,
    write_report,
)
from tqdm.auto import tqdm

from diffusers_moebius.evaluation.methods import CLASSICAL, Method, blank_hole
from diffusers_moebius.training.perceptual import ALEXNET, LPIPS

PUBLISHED = ("hustvl/Moebius", "hustvl/PixelHacker")


def load_baselines() -> tuple[dict[str, Method], list[str]]:
    """What a user would pick instead of a model; a note says which of them is not installed."""
    baselines = {
        "mean colour": CLASSICAL["mean"],
        "OpenCV Telea": CLASSICAL["telea"],
        "OpenCV Navier–Stokes": CLASSICAL["navier-stokes"],
    }
    if find_spec("patchmatch") is None:
        return baselines, ["PatchMatch was not measured: it needs `pypatchmatch` (extra `eval`)"]
    return baselines | {"PatchMatch": CLASSICAL["patchmatch"]}, []


def load_pipeline(args: argparse.Namespace):
    """Returns the pipeline that `--model` names, on its device."""
    from diffusers_moebius import MoebiusInpaintPipeline

    options = {} if args.checkpoint is None else {"checkpoint": args.checkpoint}
    pipe = MoebiusInpaintPipeline.from_pretrained(args.model, dtype=getattr(torch, args.dtype), **options)
    pipe.to(args.device)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def pipeline_method(pipe, args: argparse.Namespace, guidance_scale: float | None) -> Method:
    """Returns a method that runs the pipeline; picture `i` is drawn with the seed `--seed` + i."""
    call = {"num_inference_steps": args.steps, "guidance_scale": guidance_scale, "strength": args.strength}
    call = {name: value for name, value in call.items() if value is not None}
    call["paste"] = "seamless" if pipe.config.default_paste == "seamless" else None

    def method(blanked: np.ndarray, mask: np.ndarray, name: str, seed: int) -> np.ndarray:
        result = pipe(
            image=Image.fromarray(blanked),
            mask_image=Image.fromarray(mask.astype(np.uint8) * 255),
            generator=torch.Generator().manual_seed(seed),
            **call,
        ).images[0]
        return np.asarray(result.convert("RGB"))

    return method


def method_names(args: argparse.Namespace) -> dict[str, float | None]:
    """The names of the model's rows, with their guidance scales: several if `--guidance_scale` sweeps."""
    name, scales = Path(args.model).name, args.guidance_scale or [None]
    return {name if len(scales) == 1 else f"{name}, guidance {scale:g}": scale for scale in scales}


def paste(photo: np.ndarray, result: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Takes the hole from `result` and everything else from `photo`."""
    return np.where(mask[..., None], result, photo)


def measure(sample: Sample, method: Method, seed: int, lpips: list[LPIPS]) -> tuple[dict[str, float], np.ndarray]:
    """
    Lets a method fill the hole of one photo and scores it.

    Args:
        sample (`Sample`): The photo; the method gets it with its hole blanked.
        method (callable): Takes blanked photo, mask, name and seed, returns a picture `[H, W, 3]` in `uint8`.
        seed (`int`): Seed for this photo.
        lpips (list of [`LPIPS`]): The networks; each adds its scores.

    Returns:
        `tuple[dict[str, float], np.ndarray]`: The scores by the names of `METRICS`, and the pasted picture.
    """
    start = time.perf_counter()
    result = method(blank_hole(sample.photo, sample.mask), sample.mask.copy(), sample.name, seed)
    seconds = time.perf_counter() - start
    picture = paste(sample.photo, result, sample.mask)
    scores = score_picture(picture, sample.photo, sample.mask)
    for network in lpips:
        name = "lpips" if network.layers is ALEXNET else "lpips_vgg"
        in_hole, in_picture = lpips_in_hole_and_picture(network, picture, sample.photo, sample.mask)
        scores |= {f"{name}_hole": in_hole, f"{name}_picture": in_picture}
    return scores | {"seconds": seconds}, picture


def measure_methods(
    sample: Sample,
    methods: dict[str, Method],
    index: int,
    seed: int,
    lpips: list[LPIPS],
    inception: FeatureExtractor | None,
    output: Path | None = None,
) -> dict:
    """Scores all methods on one photo, as `summarise` takes it; `output` is a folder for a sheet of the pictures."""
    scores, panels, features = {}, {"input": blank_hole(sample.photo, sample.mask)}, {}
    for name, method in methods.items():
        scores[name], panels[name] = measure(sample, method, seed, lpips)
    picture = {"index": index, "name": sample.name, "mask": sample.kind, "mask_area": float(sample.mask.mean())}
    if inception is not None:
        pictures = {"photo": sample.photo, **{name: panels[name] for name in methods}}
        features = {name: encode_features(picture_features(inception, array)) for name, array in pictures.items()}
        picture["features"] = features
    if output is not None:
        sheet = side_by_side(panels | {"photo": sample.photo})
        sheet.save(output / f"{sample.name.replace('/', '_')}.png")
    return picture | {"scores": scores}


def side_by_side(panels: dict[str, np.ndarray]) -> Image.Image:
    """Sets pictures of one size in a row, each under its name."""
    height, width = next(iter(panels.values())).shape[:2]
    sheet = Image.new("RGB", (len(panels) * width, height + 20), "white")
    draw = ImageDraw.Draw(sheet)
    for column, (name, array) in enumerate(panels.items()):
        draw.text((column * width + 4, 4), name.replace("–", "-"), fill="black")
        sheet.paste(Image.fromarray(array), (column * width, 20))
    return sheet


def load_networks(args: argparse.Namespace) -> tuple[list[LPIPS], FeatureExtractor | None, list[str]]:
    """Loads what LPIPS and FID need; what is not there leaves the other metrics standing, and a note says why."""
    lpips, inception, notes = [], None, []
    try:
        lpips = [LPIPS.from_pretrained(path).to(args.device) for path in args.lpips_weights or [None]]
    except (ImportError, OSError, RuntimeError) as error:
        notes.append(f"LPIPS was not measured (`--lpips_weights`): {error}")
    if args.protocol != "custom" or args.fid_weights is not None:
        try:
            inception = load_inception(args.fid_weights, args.device)
        except (ImportError, OSError, RuntimeError) as error:
            notes.append(f"FID was not measured (`--fid_weights`): {error}")
    return lpips, inception, notes


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--protocol", choices=PROTOCOLS, default="custom", help="what is measured, and the defaults of other options")
    add("--model", help="`nano`, a pipeline folder or a hub repository; default: the baselines alone for `custom`")
    add("--checkpoint", help="checkpoint of a published repository; default: the protocol's")
    add("--data", required=True, help="folder or tar file of photos, for `custom` with masks")
    add("--masks", help="folder or tar file of masks `NAME.png`; default: beside the photos, or drawn by the protocol")
    add(
        "--lpips_weights",
        nargs="+",
        help="safetensors files with LPIPS networks; default: that of the `lpips` package",
    )
    add("--fid_weights", help="Inception as TorchScript (.pt) or torch-fidelity's weights; default: its download")
    add("--steps", type=int, help="denoising steps; default: the protocol's or the pipeline's")
    add("--guidance_scale", type=float, nargs="+", help="several sweep; default: the protocol's or the pipeline's")
    add("--strength", type=float, help="default: the protocol's or the pipeline's")
    add("--limit", type=int, help="number of photos, spread evenly over the data; default: all")
    add("--resolution", type=int, help="for `custom`: resize to this shorter side before anything else")
    add("--results", help="folder for the scores of each picture and the report; an interrupted run goes on")
    add("--output", help="folder for side-by-side pictures")
    add("--json", dest="json_file", help="file for settings, means and the scores of each picture")
    add("--efficiency", action="store_true", help="measure parameters, multiply-adds and latency of the model too")
    add("--seed", type=int, default=0)
    add("--device", help="default: CUDA if it is there, else the CPU; a GPU for each process")
    add("--dtype", choices=("float32", "float16", "bfloat16"), default="float32")
    args = parser.parse_args(arguments)
    for name in ("steps", "limit", "resolution"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"`--{name}` must be at least 1, but is {getattr(args, name)}")
    if args.seed < 0:
        parser.error(f"`--seed` must be at least 0, but is {args.seed}")
    if args.guidance_scale and len(set(args.guidance_scale)) < len(args.guidance_scale):
        parser.error(f"`--guidance_scale` must not name a value twice, but is {args.guidance_scale}")
    protocol = PROTOCOLS[args.protocol]
    if protocol.resolution is not None:
        if args.resolution is not None:
            parser.error(f"`--resolution` is {protocol.resolution} by `--protocol {args.protocol}`; leave it out")
        args.model = args.model or PUBLISHED[0]
        args.steps = args.steps or protocol.num_inference_steps
        args.guidance_scale = args.guidance_scale or [protocol.guidance_scale]
        args.strength = protocol.strength if args.strength is None else args.strength
        if args.model in PUBLISHED:
            args.checkpoint = args.checkpoint or protocol.checkpoint
    if args.efficiency and args.model is None:
        parser.error("`--efficiency` measures a model: name one with `--model`")
    return args


def scores_depend_on(args: argparse.Namespace, samples: Samples, measured: list[str]) -> dict:
    """The settings that may not change while a run goes on."""
    names = ("protocol", "model", "checkpoint", "steps", "guidance_scale", "strength", "limit", "resolution", "seed")
    settings = {name: getattr(args, name) for name in (*names, "dtype")}
    for name in ("data", "masks", "fid_weights"):
        value = getattr(args, name)
        settings[name] = None if value is None else str(Path(value).resolve())
    photos = hashlib.sha256("\n".join(samples.names).encode()).hexdigest()
    return settings | {"metrics": measured, "pictures": len(samples), "names_sha256": photos}


def describe_run(args: argparse.Namespace, protocol: Protocol, count: int, has_fid: bool) -> list[str]:
    """What a reader of the numbers must know."""
    notes = [f"{count} pictures; holes blanked before the model sees them, results pasted with a hard edge"]
    if protocol.mask_preset is not None:
        notes[0] += f"; the paper takes {protocol.data}"
        if args.masks is None:
            notes.append(f"holes drawn as {protocol.mask_preset}; the paper's own mask files are not published")
    if has_fid and count < INCEPTION_FEATURES:
        notes.append(f"FID of fewer than {INCEPTION_FEATURES} pictures is biased upwards")
    return notes


def main(arguments: list[str] | None = None) -> None:
    args = parse_args(arguments)
    protocol = PROTOCOLS[args.protocol]
    if args.device is None:
        has_gpu = torch.cuda.is_available() and not parse_flag_from_env("ACCELERATE_USE_CPU")
        args.device = "cuda" if has_gpu else "cpu"
    # Told nothing, accelerate takes each of several processes on CPUs for the only one.
    state = PartialState(cpu=args.device == "cpu")
    if state.num_processes > 1:
        args.device = str(state.device)
    samples = Samples(args.data, args.masks, protocol, args.limit, args.resolution, args.seed)
    lpips, inception, notes = load_networks(args)
    if state.is_main_process:
        for note in notes:
            print(f"quality.py: {note}", file=sys.stderr)

    journal, done = None, {}
    if args.results is not None:
        measured = [
            "psnr",
            "ssim",
            *(f"lpips {path}" for path in args.lpips_weights or ["default"] if lpips),
            *["fid"] * (inception is not None),
        ]
        with state.main_process_first():
            journal = Journal(args.results, scores_depend_on(args, samples, measured), state.process_index)
        done = journal.read()
        state.wait_for_everyone()
    pending = [i for i in range(state.process_index, len(samples), state.num_processes) if i not in done]

    methods = {}
    if args.protocol == "custom":
        methods, missing = load_baselines()
        notes += missing
    pipe = None
    if args.model is not None and (pending or args.efficiency):
        pipe = load_pipeline(args)
        methods |= {name: pipeline_method(pipe, args, scale) for name, scale in method_names(args).items()}
    if args.output is not None:
        Path(args.output).mkdir(parents=True, exist_ok=True)

    fresh = []
    for index in tqdm(pending, file=sys.stderr, disable=not state.is_main_process):
        output = None if args.output is None else Path(args.output)
        fresh.append(measure_methods(samples[index], methods, index, args.seed + index, lpips, inception, output))
        if journal is not None:
            journal.write(fresh[-1])
    # Each process has read the pictures that were done before; the others' new ones are still to come.
    done |= {picture["index"]: picture for picture in (gather_object(fresh) if state.num_processes > 1 else fresh)}
    if not state.is_main_process:
        return

    pictures = [done[index] for index in range(len(samples))]
    summary = summarise(pictures)
    efficiency = None
    if args.efficiency:
        efficiency = {Path(args.model).name: measure_efficiency(pipe, args.steps, args.strength)}
    columns = PAPER_COLUMNS
    if args.protocol == "custom":
        columns = HOLE_COLUMNS if inception is None else (*HOLE_COLUMNS, "fid")
    print(markdown_table(summary, columns))
    if efficiency is not None:
        print(f"\n{efficiency_table(efficiency)}")
    report = {
        "protocol": args.protocol,
        "description": protocol.data,
        "reported": protocol.reported,
        "command": shlex.join(
            ["python", "benchmarks/quality.py", *(sys.argv[1:] if arguments is None else arguments)]
        ),
        "processes": state.num_processes,
        "environment": describe_environment(args.device),
        "settings": vars(args),
        "notes": notes + describe_run(args, protocol, len(pictures), inception is not None),
        "means": summary,
        "efficiency": efficiency,
        "pictures": [{name: picture[name] for name in picture if name != "features"} for picture in pictures],
    }
    if args.results is not None:
        table = None if efficiency is None else efficiency_table(efficiency)
        write_report(args.results, report, report_markdown(report | {"efficiency": table}, columns))
    if args.json_file is not None:
        Path(args.json_file).write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"quality.py: {error}")
