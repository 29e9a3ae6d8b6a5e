#!/usr/bin/env python3
"""
Removals: a contact sheet on free photos, good and bad, and scores where the truth is known.

    python benchmarks/removals.py --output docs/removals.jpg
    python benchmarks/removals.py --data photos-val.tar --lpips_weights alex.safetensors vgg.safetensors

The sheet shows photo with mask, and result. Its photos come with scikit-image (extra `examples`). Nothing was chosen
by its result: the list was fixed before the first run, and holds what is known to be hard (a face, an eye, a
half-hidden cup).

With `--data`, a folder or a tar file of photos, things are cut from some and pasted onto others, with a soft edge and
a shadow, and are removed again with masks as hands draw them: shaky, a few pixels too large, and without the shadow.
The scores count over the drawn mask and 24 px around it, where the photo without the thing is the truth. Each row
names by how many pixels the mask grew before the method got it; the command line lets it grow over rims alone.
"""

import argparse
from pathlib import Path

import numpy as np
import skimage
import torch
from diffusers.utils import make_image_grid
from PIL import Image, ImageDraw, ImageFilter, ImageOps
from quality_data import Protocol, Samples
from quality_metrics import lpips_in_hole_and_picture, psnr
from tqdm.auto import tqdm

from diffusers_moebius import MoebiusInpaintPipeline
from diffusers_moebius.evaluation.lpips import ALEXNET, LPIPS
from diffusers_moebius.evaluation.methods import Method, make_method
from diffusers_moebius.pictures.mask import dilate_mask, grow_over_rims, mask_box

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
SIDE = 512  # of the photos that things are pasted onto
AROUND = 24  # pixels around a drawn mask that are scored with it


def draw_outline(centre: np.ndarray, radii: np.ndarray) -> Image.Image:
    """A filled outline by its distance from a centre in directions that are spread evenly, as a mask of a photo."""
    angles = np.linspace(0, 2 * np.pi, len(radii), endpoint=False)
    points = centre + radii[:, None] * np.stack([np.cos(angles), np.sin(angles)], 1)
    mask = Image.new("L", (SIDE, SIDE))
    ImageDraw.Draw(mask).polygon([tuple(point) for point in points], fill=255)
    return mask


def waves(generator: np.random.Generator, frequencies: range, falloff: float) -> np.ndarray:
    """A smooth random function of 256 directions with a mean square of 1."""
    angles = np.linspace(0, 2 * np.pi, 256, endpoint=False)
    values = sum(
        generator.normal() / k**falloff * np.cos(k * angles + generator.uniform(0, 2 * np.pi)) for k in frequencies
    )
    return values / np.sqrt(np.square(values).mean())


def paste_thing(photo: np.ndarray, other: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """
    Pastes a thing from one photo onto another, and draws the mask of somebody who wants it away.

    Args:
        photo (`np.ndarray` of shape `[SIDE, SIDE, 3]`): `uint8`.
        other (`np.ndarray` of shape `[SIDE, SIDE, 3]`): `uint8`, what the thing is cut from.
        seed (`int`): Decides place and outline.

    Returns:
        `tuple[np.ndarray, np.ndarray]`: The picture with the thing, and a boolean mask `[SIDE, SIDE]`.
    """
    generator = np.random.default_rng(seed)
    centre, radius = generator.uniform(0.25, 0.75, 2) * SIDE, generator.uniform(0.06, 0.14) * SIDE
    radii = radius * (1 + 0.2 * waves(generator, range(2, 7), 1))
    outline = draw_outline(centre, radii)
    shadow = draw_outline(centre + radius * np.array([0.1, 0.2]), radii)
    edge = np.asarray(outline.filter(ImageFilter.GaussianBlur(1)), np.float32)[..., None] / 255
    shade = np.asarray(shadow.filter(ImageFilter.GaussianBlur(0.1 * radius)), np.float32)[..., None] / 255
    picture = edge * other + (1 - edge) * (1 - 0.4 * shade) * photo
    drawn = draw_outline(centre, radii + 3 + 2 * waves(generator, range(3, 20), 0.5))
    return picture.round().astype(np.uint8), np.asarray(drawn) > 0


def score_removals(args: argparse.Namespace) -> None:
    """Prints a table of what methods make of pasted things."""
    samples = Samples(args.data, protocol=Protocol("photos", SIDE, "medium_512"), limit=args.limit)  # holes unused
    networks = {
        "LPIPS-Alex" if net.layers is ALEXNET else "LPIPS-VGG": net
        for net in map(LPIPS.from_pretrained, args.lpips_weights)
    }
    ours = Path(args.model).name
    methods: dict[tuple[str, int | None], Method] = {(ours, None): make_method(args.model, padding_mask_crop=64)}
    plain = make_method(args.model, padding_mask_crop=64, detail=None)
    methods |= {(f"{ours} without detail", pixels): plain for pixels in (0, 4, 8, 12)}
    methods |= {(name, pixels): make_method(name) for name in args.methods for pixels in (4, 8)}
    scores = {method: [] for method in methods}
    for index in tqdm(range(len(samples))):
        photo, other = samples[index].photo, samples[(index + 1) % len(samples)].photo
        picture, drawn = paste_thing(photo, other, args.seed + index)
        counts = dilate_mask(drawn, AROUND)
        left, top, right, bottom = mask_box(counts, 64)  # what lies farther out has hardly any influence
        part = slice(top, bottom), slice(left, right)
        for (name, pixels), method in methods.items():
            mask = grow_over_rims(drawn, Image.fromarray(picture)) if pixels is None else dilate_mask(drawn, pixels)
            result = np.where(mask[..., None], method(picture, mask, samples.names[index], args.seed + index), picture)
            row = [
                lpips_in_hole_and_picture(net, result[part], photo[part], counts[part])[0] for net in networks.values()
            ]
            scores[name, pixels].append([*row, psnr(result[counts], photo[counts])])
    print(f"| {len(samples)} things, mask grown by | {' | '.join(f'{name} ↓' for name in networks)} | PSNR ↑ |")
    print("|---|" + "---:|" * (len(networks) + 1))
    for (name, pixels), rows in scores.items():
        *distances, noise = np.mean(rows, 0)
        growth = "over rims" if pixels is None else f"{pixels} px"
        print(f"| {name}, {growth} | {' | '.join(f'{value:.3f}' for value in distances)} | {noise:.2f} |")


def draw_sheet(args: argparse.Namespace) -> None:
    """Writes the contact sheet."""
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
            mask_image=grow_over_rims(np.asarray(mask) > 0, photo),
            padding_mask_crop=64,
            generator=torch.Generator().manual_seed(args.seed),
        ).images[0]
        marked = np.asarray(photo).copy()
        hole = np.asarray(mask) > 0
        marked[hole] = 0.5 * marked[hole] + 0.5 * np.array([255, 64, 64])
        pair = make_image_grid([Image.fromarray(marked), result], rows=1, cols=2)
        tiles.append(ImageOps.contain(pair, (2 * WIDTH, WIDTH)))
    rows = [tiles[number : number + 2] for number in range(0, len(tiles), 2)]
    sheet = Image.new("RGB", (4 * WIDTH, sum(max(tile.height for tile in row) for row in rows)), "white")
    top = 0
    for row in rows:
        for column, tile in enumerate(row):
            sheet.paste(tile, (2 * WIDTH * column, top))
        top += max(tile.height for tile in row)
    sheet.save(args.output, quality=80)
    print(args.output)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--model", default="nano", help="the bundled model, a folder or a repository")
    add("--output", type=Path, default=Path("removals.jpg"), help="the contact sheet to be written")
    add("--data", help="folder or tar file of photos: score pasted things instead")
    add("--lpips_weights", nargs="+", default=[None], help="safetensors files; default: that of the `lpips` package")
    add("--methods", nargs="*", default=["patchmatch", "telea"], help="what to compare with, for `--data`")
    add("--limit", type=int, help="number of photos, spread evenly over the data; default: all")
    add("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    draw_sheet(args) if args.data is None else score_removals(args)


if __name__ == "__main__":
    main()
