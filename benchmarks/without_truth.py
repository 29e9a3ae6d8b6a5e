#!/usr/bin/env python3
"""Asks whether a measure that needs no true picture orders fillings as one that has it: for removals from real photos.

    python benchmarks/quality.py --method nano patchmatch telea --data photos-val.tar \\
        --lpips_weights alex.safetensors --results runs/val --output runs/val
    python benchmarks/without_truth.py runs/val --lpips_weights alex.safetensors

A photo with a hole stands for a removal of which the result is known: an object, cut from the next photo of the run,
is put into the hole, and what the methods filled is what they left behind. The measures, less is better:

- change of the ring: LPIPS between the result and the photo with the object, over the ring of `--width` px around the
  hole, which sees a few pixels into it;
- strangeness: the distance between the means, and between the deviations, of each layer's features in the hole and in
  the ring, summed;
- seam: how much the steps across the hole's edge differ from the steps within the ring, as a logarithm.

Printed are the share of pairs of methods that a measure orders as LPIPS in the hole does, and the share of pictures in
which it prefers the true photo to each method and to the object.
"""

import argparse
import json
import sys
from itertools import combinations
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from quality_report import picture_path

from diffusers_moebius.evaluation.lpips import LPIPS, distance_map
from diffusers_moebius.pictures.mask import dilate_mask


def to_tensor(picture: np.ndarray) -> torch.Tensor:
    return torch.tensor(picture).permute(2, 0, 1)[None] / 127.5 - 1


def change_of_ring(lpips: LPIPS, picture: np.ndarray, before: np.ndarray, mask: np.ndarray, ring: np.ndarray) -> float:
    distances = distance_map(lpips.distances(to_tensor(picture), to_tensor(before)), mask.shape)[0]
    return distances[torch.from_numpy(ring)].mean().item()


def strangeness(lpips: LPIPS, picture: np.ndarray, before: np.ndarray, mask: np.ndarray, ring: np.ndarray) -> float:
    total = 0.0
    for layer in lpips.features(to_tensor(picture)):
        inside, around = (
            F.interpolate(torch.from_numpy(region)[None, None].float(), layer.shape[2:], mode="area")[0, 0]
            for region in (mask, ring)
        )
        # What lies more than half in a region counts, or where it is too thin for that, what lies deepest in it.
        values = [layer[0][:, share >= min(0.5, share.max())] for share in (inside, around)]
        moments = [(part.mean(1), part.std(1, unbiased=False)) for part in values]
        total += sum((a - b).norm().item() for a, b in zip(*moments))
    return total


def seam(lpips: LPIPS, picture: np.ndarray, before: np.ndarray, mask: np.ndarray, ring: np.ndarray) -> float:
    across, within = [], []
    for axis in (0, 1):
        steps = np.abs(np.diff(picture.astype(float), axis=axis)).mean(-1)
        across.append(steps[np.diff(mask, axis=axis)])
        ends = np.moveaxis(ring, axis, 0)
        within.append(np.moveaxis(steps, axis, 0)[ends[1:] & ends[:-1]])
    means = [np.concatenate(values).mean() + 0.5 for values in (across, within)]  # half a grey level, for flat skies
    return float(abs(np.log(means[0] / means[1])))


MEASURES = {"change of the ring": change_of_ring, "strangeness": strangeness, "seam": seam}


@torch.no_grad()
def compare(report: dict, folder: Path, lpips: LPIPS, width: int) -> str:
    """
    Compares the measures with LPIPS in the hole, as a Markdown table.

    Args:
        report (`dict`): `report.json` of `quality.py`, with LPIPS measured.
        folder (`Path`): Its folder of pictures.
        lpips ([`LPIPS`]): The network of the measures.
        width (`int`): Of the ring in pixels.
    """
    methods = list(report["means"]["all"]["scores"])
    names = [picture["name"] for picture in report["pictures"]]

    def read(method, name, mode="RGB"):
        with Image.open(picture_path(folder, method, name)) as image:
            return np.asarray(image.convert(mode))

    agree = {measure: [] for measure in MEASURES}
    prefers = {measure: {method: [] for method in (*methods, "the object")} for measure in MEASURES}
    for number, picture in enumerate(report["pictures"]):
        name, scores = picture["name"], picture["scores"]
        photo, mask = read("photo", name), read("mask", name, "L") > 0
        other = Image.fromarray(read("photo", names[(number + 1) % len(names)])).resize(mask.shape[::-1])
        before = np.where(mask[..., None], np.asarray(other), photo)
        ring = dilate_mask(mask, width) & ~mask
        results = {method: read(method, name) for method in methods} | {"the object": before, "truth": photo}
        for measure, function in MEASURES.items():
            values = {key: function(lpips, result, before, mask, ring) for key, result in results.items()}
            for a, b in combinations(methods, 2):
                agree[measure].append((values[a] < values[b]) == (scores[a]["lpips_hole"] < scores[b]["lpips_hole"]))
            for key, wins in prefers[measure].items():
                wins.append(values["truth"] < values[key])
    heads = ["pairs ordered as LPIPS", *(f"truth before {key}" for key in (*methods, "the object"))]
    lines = [f"| {len(names)} pictures | " + " | ".join(heads) + " |", "|---|" + "---:|" * len(heads)]
    for measure in MEASURES:
        shares = [agree[measure], *prefers[measure].values()]
        lines.append(f"| {measure} | " + " | ".join(f"{np.mean(share):.0%}" for share in shares) + " |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("results", type=Path, help="folder that quality.py was given as --results, with an --output")
    add("--lpips_weights", help="safetensors file; default: the network of the `lpips` package")
    add("--width", type=int, default=32, help="of the ring in pixels (default: 32)")
    args = parser.parse_args(arguments)
    file = args.results / "report.json"
    if not file.is_file():
        raise ValueError(f"`results` must be a folder with a report, but there is no {file}.")
    report = json.loads(file.read_text())
    pictures = report["settings"]["output"]
    if pictures is None or len(report["means"]["all"]["scores"]) < 2:
        raise ValueError("`results` must be of two methods or more, and have pictures (`--output`).")
    print(compare(report, Path(pictures), LPIPS.from_pretrained(args.lpips_weights), args.width))


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"without_truth.py: {error}")
