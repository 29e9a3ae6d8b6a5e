#!/usr/bin/env python3
"""Measures how well methods fill holes, under the paper's protocols or on photos of your own, as a Markdown table.

    python benchmarks/quality.py --method nano patchmatch telea --data photos-val.tar --lpips_weights alex.safetensors
    python benchmarks/quality.py --protocol celebahq-512 --data celebahq/ --results runs/celebahq
    python benchmarks/quality.py --protocol places2-test --method flux-fill --settings benchmarks/paper_methods.toml \\
        --data places2/ --results runs/flux
    accelerate launch --num_processes 4 benchmarks/quality.py --protocol places2-test --data places2/ \\
        --guidance_scale 1 1.5 2 2.5 3 --results runs/guidance

A method is `nano`, a folder or repository with a Moebius pipeline (`hustvl/Moebius/ft_places2`), a section of the TOML
file `--settings` (any inpainting pipeline of diffusers, with prompt, steps and guidance), `mean`, `telea`,
`navier-stokes` or `patchmatch`, or `results:FOLDER` with pictures made elsewhere; `NAME=METHOD` names its row.

`custom`, the protocol without a name, takes a folder or a tar file of photos `NAME.jpg` (or .png) with a mask
`NAME.mask.png` (white = hole) and, if there is one, a `NAME.json` whose `mask` names the kind of hole. The others take
photos alone, cut the largest centred square out of each, bring it to their size, and draw the hole from the seed and
the photo's number, or take it from `--masks`. `PROTOCOLS` in `quality_data.py` says what each fixes.

No method sees what was in the hole: it is blanked with the mean colour of the visible pixels first, which is also the
mean-colour fill. What a method returns is pasted onto the photo with a hard edge, so that methods differ in the hole
alone.
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
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object, parse_flag_from_env
from PIL import Image
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
    picture_path,
    report_markdown,
    summarise,
    write_report,
)
from tqdm.auto import tqdm

from diffusers_moebius.evaluation.lpips import ALEXNET, LPIPS
from diffusers_moebius.evaluation.methods import (
    CLASSICAL,
    Method,
    PipelineMethod,
    blank_hole,
    make_method,
    read_settings,
    split_names,
)

PUBLISHED = ("hustvl/Moebius", "hustvl/PixelHacker")


def load_methods(args: argparse.Namespace) -> dict[str, Method]:
    """The methods that `--method` names, on their device; several `--guidance_scale` make several of a pipeline."""
    sections = {} if args.settings is None else read_settings(args.settings)
    scales, methods = args.guidance_scale or [None], {}
    call = {"num_inference_steps": args.steps, "strength": args.strength, "guidance_scale": scales[0]}
    call = {key: value for key, value in call.items() if value is not None}
    for name, spec in split_names(args.method).items():
        method = make_method(spec, sections, args.device, getattr(torch, args.dtype), **call)
        if len(scales) > 1 and isinstance(method, PipelineMethod) and spec not in sections:
            for scale in scales:
                methods[f"{name}, guidance {scale:g}"] = replace(method, call={**method.call, "guidance_scale": scale})
        else:
            methods[name] = method
    return methods


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
    """Scores all methods on one photo, as `summarise` takes it; `output` is a folder for the pictures."""
    scores = {}
    pictures = {"photo": sample.photo, "input": blank_hole(sample.photo, sample.mask), "mask": sample.mask}
    for name, method in methods.items():
        scores[name], pictures[name] = measure(sample, method, seed, lpips)
    picture = {"index": index, "name": sample.name, "mask": sample.kind, "mask_area": float(sample.mask.mean())}
    if inception is not None:
        picture["features"] = {
            name: encode_features(picture_features(inception, pictures[name])) for name in ("photo", *methods)
        }
    if output is not None:
        for name, array in pictures.items():
            path = picture_path(output, name, sample.name)
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(array).save(path)
    return picture | {"scores": scores}


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
    add(
        "--method",
        nargs="+",
        action="extend",
        help="what fills; default: the protocol's checkpoint, or the classical ones",
    )
    add("--settings", help="TOML file with sections of methods: repository, call, load")
    add("--data", required=True, help="folder or tar file of photos, for `custom` with masks")
    add("--masks", help="folder or tar file of masks `NAME.png`; default: beside the photos, or drawn by the protocol")
    add(
        "--lpips_weights",
        nargs="+",
        help="safetensors files with LPIPS networks; default: that of the `lpips` package",
    )
    add("--fid_weights", help="Inception as TorchScript (.pt) or torch-fidelity's weights; default: its download")
    add("--steps", type=int, help="denoising steps of Moebius pipelines; default: the protocol's or their own")
    add("--guidance_scale", type=float, nargs="+", help="of Moebius pipelines; several sweep; default as above")
    add("--strength", type=float, help="of Moebius pipelines; default as above")
    add("--limit", type=int, help="number of photos, spread evenly over the data; default: all")
    add("--resolution", type=int, help="for `custom`: resize to this shorter side before anything else")
    add("--results", help="folder for the scores of each picture and the report; an interrupted run goes on")
    add("--output", help="folder for the pictures METHOD/NAME.png and input, mask and photo")
    add("--json", dest="json_file", help="file for settings, means and the scores of each picture")
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
        args.method = args.method or [PUBLISHED[0]]
        args.method = [f"{name}/{protocol.checkpoint}" if name in PUBLISHED else name for name in args.method]
        args.steps = args.steps or protocol.num_inference_steps
        args.guidance_scale = args.guidance_scale or [protocol.guidance_scale]
        args.strength = protocol.strength if args.strength is None else args.strength
    if args.method is None:
        args.method = [name for name in CLASSICAL if name != "patchmatch" or find_spec("patchmatch")]
    return args


def scores_depend_on(args: argparse.Namespace, samples: Samples, measured: list[str]) -> dict:
    """The settings that may not change while a run goes on."""
    names = ("protocol", "method", "steps", "guidance_scale", "strength", "limit", "resolution", "seed")
    settings = {name: getattr(args, name) for name in (*names, "dtype")}
    for name in ("data", "masks", "fid_weights"):
        value = getattr(args, name)
        settings[name] = None if value is None else str(Path(value).resolve())
    if args.settings is not None:
        sections, used = read_settings(args.settings), split_names(args.method).values()
        settings["settings"] = {name: asdict(sections[name]) for name in used if name in sections}
    photos = hashlib.sha256("\n".join(samples.names).encode()).hexdigest()
    return settings | {"metrics": measured, "pictures": len(samples), "names_sha256": photos}


def describe_run(args: argparse.Namespace, protocol: Protocol, count: int, has_fid: bool) -> list[str]:
    """What a reader of the numbers must know."""
    notes = [f"{count} pictures; holes blanked before a method sees them, results pasted with a hard edge"]
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

    methods = load_methods(args) if pending else {}
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
    columns = PAPER_COLUMNS
    if args.protocol == "custom":
        columns = HOLE_COLUMNS if inception is None else (*HOLE_COLUMNS, "fid")
    print(markdown_table(summary, columns))
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
        "pictures": [{name: picture[name] for name in picture if name != "features"} for picture in pictures],
    }
    if args.results is not None:
        write_report(args.results, report, report_markdown(report, columns))
    if args.json_file is not None:
        Path(args.json_file).write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"quality.py: {error}")
