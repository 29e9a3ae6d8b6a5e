#!/usr/bin/env python3
"""
Removes the rocket from a photo with the bundled model and writes input, mask and result side by side.

    python examples/demo.py --output demo_output

The photo (640x427, public domain, SpaceX) comes with scikit-image: `pip install diffusers-moebius[examples]`.
"""

import argparse
import os
from pathlib import Path

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # It warns of parts that are not needed here.

import skimage
import torch
from diffusers.utils import make_image_grid
from PIL import Image, ImageDraw

from diffusers_moebius import MoebiusInpaintPipeline


def rocket_and_mask() -> tuple[Image.Image, Image.Image]:
    """The photo, and a mask of its size in which the rocket is white."""
    photo = Image.fromarray(skimage.data.rocket())
    mask = Image.new("L", photo.size)
    ImageDraw.Draw(mask).rounded_rectangle((292, 116, 352, 404), radius=28, fill=255)
    return photo, mask


def main() -> None:
    parser = argparse.ArgumentParser(description="Removes the rocket from a photo.")
    parser.add_argument("--output", type=Path, default=Path("demo_output"), help="folder for the pictures")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    photo, mask = rocket_and_mask()
    pipe = MoebiusInpaintPipeline.from_pretrained("nano")
    result = pipe(
        image=photo, mask_image=mask, padding_mask_crop=64, generator=torch.Generator().manual_seed(args.seed)
    ).images[0]

    args.output.mkdir(parents=True, exist_ok=True)
    photo.save(args.output / "photo.png")
    mask.save(args.output / "mask.png")
    result.save(args.output / "result.png")
    grid = args.output / "side_by_side.png"
    make_image_grid([photo, mask.convert("RGB"), result], rows=1, cols=3).save(grid)
    print(f"Input, mask and result side by side: {grid.resolve()}")


if __name__ == "__main__":
    main()
