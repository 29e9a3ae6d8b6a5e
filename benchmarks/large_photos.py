#!/usr/bin/env python3
"""What the detail stage gives back to fillings that were enlarged: sharpness and LPIPS on large photos.

    python benchmarks/large_photos.py photos/*.jpg --lpips_weights alex.safetensors

Any model's structure is taken for right here: the filling is the true photo, reduced to the size at which a model of
512 px works and enlarged again. An ellipse of 1,000×800 px in the middle of each photo is filled by it, as it is and
with `detail="enlarged"`. Gradient energy is the mean squared difference of neighbouring pixels in the hole, relative
to that of the true photo there, and of the 100 px around; LPIPS and PSNR are those in the hole.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from quality_metrics import lpips_in_hole_and_picture, psnr

from diffusers_moebius.evaluation.lpips import LPIPS
from diffusers_moebius.pictures.detail import add_detail
from diffusers_moebius.pictures.files import read_image
from diffusers_moebius.pictures.mask import dilate_mask, mask_box
from diffusers_moebius.pictures.picture import load_pictures
from diffusers_moebius.pictures.region import ModelSizes, find_region


def gradient_energy(picture: np.ndarray, where: np.ndarray) -> float:
    """Mean squared differences of neighbours, of a picture `[H, W, 3]`, over the pixels of `where` `[H, W]`."""
    picture = picture.astype(np.float32)
    down, right = (np.square(np.diff(picture, axis=axis)).mean(2) for axis in (0, 1))
    return float(down[where[1:]].mean() + right[where[:, 1:]].mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("photos", nargs="+", type=Path)
    add("--hole", type=int, nargs=2, default=(1000, 800), help="width and height of the ellipse")
    add("--lpips_weights", type=Path, help="safetensors file; default: the `lpips` package's")
    args = parser.parse_args()
    lpips = LPIPS.from_pretrained(args.lpips_weights)
    print("| photo | enlarged by | filling | energy / truth | energy / around | LPIPS ↓ | PSNR ↑ |")
    print("|---|---:|---|---:|---:|---:|---:|")
    rows = []
    for path in args.photos:
        (picture,) = load_pictures(read_image(path)[0].convert("RGB"))
        canvas = Image.new("L", (picture.width, picture.height))
        middle = np.array([picture.width, picture.height]) / 2
        ImageDraw.Draw(canvas).ellipse([*(middle - np.divide(args.hole, 2)), *(middle + np.divide(args.hole, 2))], 255)
        mask = np.asarray(canvas) > 0
        region = find_region(picture, mask, ModelSizes())
        filling = region.fill(region.tensors()[0][0] / 2 + 0.5)
        detailed = add_detail(filling, region, "enlarged", torch.Generator().manual_seed(0))
        left, top, right, bottom = mask_box(mask, 164)
        part = slice(top, bottom), slice(left, right)
        hole, truth = mask[part], np.asarray(picture.rgb((left, top, right, bottom)))
        around = dilate_mask(hole, 100) & ~hole
        truth = (truth * 255).round().astype(np.uint8)
        for name, result in (("enlarged", filling), ("with detail", detailed)):
            result = np.where(hole[..., None], (result[part] * 255).round().clip(0, 255).astype(np.uint8), truth)
            energy = gradient_energy(result, hole)
            row = [
                energy / gradient_energy(truth, hole),
                energy / gradient_energy(truth, around),
                lpips_in_hole_and_picture(lpips, result, truth, hole)[0],
                psnr(result[hole], truth[hole]),
            ]
            rows.append(row)
            cells = f"{row[0]:.0%} | {row[1]:.0%} | {row[2]:.3f} | {row[3]:.2f}"
            print(f"| {path.stem} | {region.enlargement:.1f} | {name} | {cells} |", flush=True)
    for i, name in enumerate(("enlarged", "with detail")):
        row = np.mean(rows[i::2], 0)
        print(f"| mean | | {name} | {row[0]:.0%} | {row[1]:.0%} | {row[2]:.3f} | {row[3]:.2f} |")


if __name__ == "__main__":
    main()
