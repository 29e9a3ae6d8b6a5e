#!/usr/bin/env python3
"""
A contact sheet of removals on free photos, good and bad: photo with mask, and result.

    python benchmarks/removals.py --output docs/removals.jpg

The photos come with scikit-image (extra `examples`). Nothing was chosen by its result: the list was fixed before the
first run, and holds what is known to be hard (a face, an eye, a half-hidden cup).
"""

import argparse
from pathlib import Path

import numpy as np
import skimage
import torch
from PIL import Image, ImageDraw

from diffusers_moebius import MoebiusInpaintPipeline
from diffusers_moebius.pictures.mask import removal_dilation

# Photo of skimage.data, and an ellipse (left, top, right, bottom) or a polygon of what is to go.
CASES = (
    ("rocket", ((295, 135), (320, 118), (346, 135), (346, 300), (362, 345), (362, 405), (280, 405), (280, 345))),
    ("rocket", (440, 110, 460, 400)),
    ("astronaut", (128, 342, 216, 430)),
    ("astronaut", (10, 380, 90, 460)),
    ("hubble_deep_field", (300, 300, 420, 420)),
    ("immunohistochemistry", (200, 200, 300, 300)),
    ("chelsea", (250, 90, 300, 130)),
    ("astronaut", ((400, 0), (436, 0), (462, 45), (462, 175), (478, 290), (350, 290), (348, 190), (370, 40))),
    ("coffee", ((396, 64), (428, 64), (422, 112), (413, 285), (365, 333), (317, 285), (350, 225), (400, 130))),
    ("coffee", (120, 60, 330, 250)),
    ("chelsea", (100, 60, 180, 140)),
    ("astronaut", (170, 60, 280, 190)),
)
WIDTH = 320


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", default="nano", help="the bundled model, a folder or a repository")
    parser.add_argument("--output", type=Path, default=Path("removals.jpg"), help="the picture to be written")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    pipe = MoebiusInpaintPipeline.from_pretrained(args.model)
    pipe.set_progress_bar_config(disable=True)
    tiles = []
    for name, shape in CASES:
        photo = Image.fromarray(getattr(skimage.data, name)()).convert("RGB")
        mask = Image.new("L", photo.size)
        draw = ImageDraw.Draw(mask)
        (draw.polygon if isinstance(shape[0], tuple) else draw.ellipse)(shape, fill=255)
        result = pipe(
            image=photo,
            mask_image=mask,
            padding_mask_crop=64,
            mask_dilation=removal_dilation(*photo.size),
            generator=torch.Generator().manual_seed(args.seed),
        ).images[0]
        marked = np.asarray(photo).copy()
        hole = np.asarray(mask) > 0
        marked[hole] = 0.5 * marked[hole] + 0.5 * np.array([255, 64, 64])
        tile = Image.new("RGB", (2 * WIDTH, WIDTH), "white")
        for column, picture in enumerate((Image.fromarray(marked), result)):
            picture.thumbnail((WIDTH - 4, WIDTH - 4))
            tile.paste(picture, (column * WIDTH, 0))
        tiles.append(tile)
    sheet = Image.new("RGB", (4 * WIDTH, WIDTH * ((len(tiles) + 1) // 2)), "white")
    for number, tile in enumerate(tiles):
        sheet.paste(tile, (2 * WIDTH * (number % 2), WIDTH * (number // 2)))
    sheet.save(args.output, quality=85)
    print(args.output)


if __name__ == "__main__":
    main()
