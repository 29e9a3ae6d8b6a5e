#!/usr/bin/env python3
"""Measures how well a model fills holes, beside OpenCV's two methods and a mean-colour fill, as a Markdown table.

    python benchmarks/quality.py --model nano --data photos-val.tar --lpips_weights alex.safetensors

The data is a folder or a tar file of photos `NAME.jpg` (or .png) with a mask `NAME.mask.png` (white = hole) and, if
there is one, a `NAME.json` whose `mask` names the kind of hole.

No method sees what was in the hole: it is blanked with the mean colour of the visible pixels first, which is also the
mean-colour fill. What a method returns is pasted onto the photo with a hard edge, so that methods differ in the hole
alone; the model is asked for its raw picture (`paste=None`), since a feathered paste would blend the blank colour in.
The scores, each the mean over the pictures of its value for one picture, on 8-bit RGB at the photo's size:

- PSNR: 10 log10(255² / mean squared error), the error taken over the hole's pixels alone, in dB.
- SSIM: the map of the structural similarity (Wang et al. 2004: Gaussian window of deviation 1.5, a map for each
  channel) between pasted picture and photo, averaged over the hole.
- LPIPS in the hole: the map of the LPIPS (each layer's distances brought to the picture's size by bilinear
  interpolation, then summed) between pasted picture and photo, averaged over the hole.
- LPIPS of the picture: the usual LPIPS of the pasted picture as a whole, which grows with the hole's share of it.

LPIPS is that on AlexNet, version 0.1, unless the weights given are those on VGG16.
"""

import argparse
import io
import json
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image, ImageDraw
from skimage.metrics import structural_similarity
from tqdm.auto import tqdm

from diffusers_moebius.training.perceptual import LPIPS, distance_map

METRICS = {
    "psnr": "PSNR in the hole ↑",
    "ssim": "SSIM in the hole ↑",
    "lpips_hole": "LPIPS in the hole ↓",
    "lpips_picture": "LPIPS of the picture ↓",
    "seconds": "s/picture",
}
FORMATS = {"psnr": "{:.2f}", "ssim": "{:.3f}", "lpips_hole": "{:.3f}", "lpips_picture": "{:.3f}", "seconds": "{:.2f}"}
PHOTO_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")

Method = Callable[[np.ndarray, np.ndarray, int], np.ndarray]


@dataclass
class Sample:
    """
    A photo with its hole.

    Args:
        name (`str`): Name of the photo without its suffix.
        photo (`np.ndarray` of shape `[H, W, 3]`): RGB, `uint8`.
        mask (`np.ndarray` of shape `[H, W]`): `True` in the hole.
        kind (`str`): What sort of hole it is.
    """

    name: str
    photo: np.ndarray
    mask: np.ndarray
    kind: str


def read_samples(data: str | Path, limit: int | None = None, resolution: int | None = None) -> Iterator[Sample]:
    """
    Reads photos and masks from a folder or a tar file, sorted by name.

    Args:
        data (`str` or `Path`): Folder or tar file.
        limit (`int`, *optional*): Number of photos to read, spread evenly over all of them; all by default.
        resolution (`int`, *optional*): Resizes each photo so that its shorter side has so many pixels.

    Returns:
        Iterator over `Sample`.

    Raises:
        ValueError: If there are no photos, a photo has no mask, or a mask is of another size or empty.
    """
    data = Path(data)
    if data.is_dir():
        files = {path.relative_to(data).as_posix(): path.read_bytes for path in sorted(data.rglob("*.*"))}
    elif data.is_file() and tarfile.is_tarfile(data):
        archive = tarfile.open(data)  # noqa: SIM115, read from until the last sample is out
        members = sorted((member for member in archive if member.isfile()), key=lambda member: member.name)
        files = {member.name: lambda member=member: archive.extractfile(member).read() for member in members}
    else:
        raise ValueError(f"`data` must be a folder or a tar file, but {str(data)!r} is neither.")

    is_photo = lambda name: name.lower().endswith(PHOTO_SUFFIXES) and not name.endswith(".mask.png")  # noqa: E731
    photos = [name for name in files if is_photo(name)]
    if not photos:
        raise ValueError(f"`data` must hold photos ({', '.join(PHOTO_SUFFIXES)}), but {str(data)!r} does not.")
    if limit is not None:
        photos = [photos[i] for i in sorted({round(i) for i in np.linspace(0, len(photos) - 1, limit)})]
    for name in photos:
        stem = name.rpartition(".")[0]
        if f"{stem}.mask.png" not in files:
            raise ValueError(f"`data` must hold a mask for each photo, but there is no {stem}.mask.png.")
        photo = Image.open(io.BytesIO(files[name]())).convert("RGB")
        mask = Image.open(io.BytesIO(files[f"{stem}.mask.png"]())).convert("L")
        if mask.size != photo.size:
            raise ValueError(f"`data` must hold masks of the photos' sizes, but {stem}: {photo.size} and {mask.size}.")
        if resolution is not None:
            scale = resolution / min(photo.size)
            size = tuple(round(scale * side) for side in photo.size)
            photo, mask = photo.resize(size, Image.Resampling.LANCZOS), mask.resize(size, Image.Resampling.NEAREST)
        mask = np.asarray(mask) >= 128
        if not mask.any() or mask.all():
            raise ValueError(
                f"`data` must hold masks with a hole and something around it, but that of {stem} does not."
            )
        details = json.loads(files[f"{stem}.json"]()) if f"{stem}.json" in files else {}
        yield Sample(stem, np.array(photo), mask, details.get("mask", "any"))


def blank_hole(photo: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """
    Paints the hole in the mean colour of the visible pixels.

    Args:
        photo (`np.ndarray` of shape `[H, W, 3]`): `uint8`.
        mask (`np.ndarray` of shape `[H, W]`): `True` in the hole.

    Returns:
        `np.ndarray` of shape `[H, W, 3]`, `uint8`, in which nothing of the hole's content is left.
    """
    blanked = photo.copy()
    blanked[mask] = photo[~mask].mean(0).round().astype(np.uint8)
    return blanked


def mean_colour(blanked: np.ndarray, mask: np.ndarray, index: int) -> np.ndarray:
    """Leaves the hole as it was blanked."""
    return blanked


def telea(blanked: np.ndarray, mask: np.ndarray, index: int) -> np.ndarray:
    """OpenCV's fast marching method (Telea 2004) with a radius of 3 px."""
    return cv2.inpaint(blanked, mask.astype(np.uint8), 3, cv2.INPAINT_TELEA)


def navier_stokes(blanked: np.ndarray, mask: np.ndarray, index: int) -> np.ndarray:
    """OpenCV's Navier–Stokes method (Bertalmio et al. 2001) with a radius of 3 px."""
    return cv2.inpaint(blanked, mask.astype(np.uint8), 3, cv2.INPAINT_NS)


BASELINES: dict[str, Method] = {
    "mean colour": mean_colour,
    "OpenCV Telea": telea,
    "OpenCV Navier–Stokes": navier_stokes,
}


def load_model(args: argparse.Namespace) -> Method:
    """Returns a method that runs the pipeline; picture `i` is drawn with the seed `args.seed + i`."""
    from diffusers_moebius import MoebiusInpaintPipeline, bundled_checkpoint

    is_bundled = args.model == "nano" and not Path(args.model).is_dir()
    source = bundled_checkpoint(args.model) if is_bundled else args.model
    options = {} if args.checkpoint is None else {"checkpoint": args.checkpoint}
    pipe = MoebiusInpaintPipeline.from_pretrained(source, dtype=getattr(torch, args.dtype), **options)
    pipe.to(args.device)
    pipe.set_progress_bar_config(disable=True)
    call = {"num_inference_steps": args.steps, "guidance_scale": args.guidance_scale, "strength": args.strength}
    call = {name: value for name, value in call.items() if value is not None}

    def method(blanked: np.ndarray, mask: np.ndarray, index: int) -> np.ndarray:
        result = pipe(
            image=Image.fromarray(blanked),
            mask_image=Image.fromarray(mask.astype(np.uint8) * 255),
            generator=torch.Generator().manual_seed(args.seed + index),
            paste=None,
            **call,
        ).images[0]
        return np.asarray(result.convert("RGB"))

    return method


def paste(photo: np.ndarray, result: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Takes the hole from `result` and everything else from `photo`."""
    return np.where(mask[..., None], result, photo)


def psnr_in_hole(picture: np.ndarray, photo: np.ndarray, mask: np.ndarray) -> float:
    """
    Peak signal-to-noise ratio over the pixels of the hole.

    Args:
        picture (`np.ndarray` of shape `[H, W, 3]`): `uint8`.
        photo (`np.ndarray` of shape `[H, W, 3]`): `uint8`.
        mask (`np.ndarray` of shape `[H, W]`): `True` in the hole.

    Returns:
        `float`: dB; infinite if the hole is equal.
    """
    error = np.square(picture[mask].astype(np.float64) - photo[mask]).mean()
    return float("inf") if error == 0 else float(10 * np.log10(255**2 / error))


def ssim_in_hole(picture: np.ndarray, photo: np.ndarray, mask: np.ndarray) -> float:
    """
    Structural similarity, its map averaged over the hole.

    Args:
        picture (`np.ndarray` of shape `[H, W, 3]`): `uint8`.
        photo (`np.ndarray` of shape `[H, W, 3]`): `uint8`.
        mask (`np.ndarray` of shape `[H, W]`): `True` in the hole.

    Returns:
        `float`: From -1 to 1; 1 if the pictures are equal.

    Formula: Wang et al., "Image quality assessment: from error visibility to structural similarity" (2004), with its
    window, a Gaussian of deviation 1.5 px.
    """
    _, similarity = structural_similarity(
        picture,
        photo,
        channel_axis=-1,
        data_range=255,
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
        full=True,
    )
    return float(similarity[mask].mean())


@torch.no_grad()
def lpips_in_hole_and_picture(
    lpips: LPIPS, picture: np.ndarray, photo: np.ndarray, mask: np.ndarray
) -> tuple[float, float]:
    """
    LPIPS averaged over the hole, and LPIPS of the picture as a whole.

    Args:
        lpips ([`LPIPS`]): The network.
        picture (`np.ndarray` of shape `[H, W, 3]`): `uint8`.
        photo (`np.ndarray` of shape `[H, W, 3]`): `uint8`.
        mask (`np.ndarray` of shape `[H, W]`): `True` in the hole.

    Returns:
        `tuple[float, float]`: Both are 0 if the pictures are equal.
    """
    device = lpips.shift.device
    to_tensor = lambda array: torch.tensor(array, device=device).permute(2, 0, 1)[None].float() / 127.5 - 1  # noqa: E731
    distances = lpips.distances(to_tensor(picture), to_tensor(photo))
    in_hole = distance_map(distances, mask.shape)[0, torch.from_numpy(mask).to(device)]
    return in_hole.mean().item(), sum(layer.mean().item() for layer in distances)


def measure(sample: Sample, method: Method, index: int, lpips: LPIPS) -> tuple[dict[str, float], np.ndarray]:
    """
    Lets a method fill the hole of one photo and scores it.

    Args:
        sample (`Sample`): The photo; the method gets it with its hole blanked.
        method (callable): Takes blanked photo, mask and `index`, returns a picture `[H, W, 3]` in `uint8`.
        index (`int`): Number of the photo.
        lpips ([`LPIPS`]): The network.

    Returns:
        `tuple[dict[str, float], np.ndarray]`: The values of `METRICS`, and the pasted picture.
    """
    start = time.perf_counter()
    result = method(blank_hole(sample.photo, sample.mask), sample.mask.copy(), index)
    seconds = time.perf_counter() - start
    picture = paste(sample.photo, result, sample.mask)
    in_hole, whole = lpips_in_hole_and_picture(lpips, picture, sample.photo, sample.mask)
    scores = {
        "psnr": psnr_in_hole(picture, sample.photo, sample.mask),
        "ssim": ssim_in_hole(picture, sample.photo, sample.mask),
        "lpips_hole": in_hole,
        "lpips_picture": whole,
        "seconds": seconds,
    }
    return scores, picture


def side_by_side(panels: dict[str, np.ndarray]) -> Image.Image:
    """Sets pictures of one size in a row, each under its name."""
    height, width = next(iter(panels.values())).shape[:2]
    sheet = Image.new("RGB", (len(panels) * width, height + 20), "white")
    draw = ImageDraw.Draw(sheet)
    for column, (name, array) in enumerate(panels.items()):
        draw.text((column * width + 4, 4), name.replace("–", "-"), fill="black")
        sheet.paste(Image.fromarray(array), (column * width, 20))
    return sheet


def summarise(pictures: list[dict]) -> dict[str, dict]:
    """
    Averages the scores over all pictures and over those of each kind of hole.

    Args:
        pictures (`list[dict]`): Each with `mask`, the kind of hole, and `scores`, metrics by method.

    Returns:
        `dict`: `{"all": {"count": int, "scores": {method: {metric: float}}}, kind: ...}`.
    """
    kinds = sorted({picture["mask"] for picture in pictures})
    groups = {"all": pictures}
    if len(kinds) > 1:
        groups |= {kind: [picture for picture in pictures if picture["mask"] == kind] for kind in kinds}
    return {
        kind: {
            "count": len(members),
            "scores": {
                method: {
                    metric: float(np.mean([picture["scores"][method][metric] for picture in members]))
                    for metric in METRICS
                }
                for method in members[0]["scores"]
            },
        }
        for kind, members in groups.items()
    }


def markdown_table(summary: dict[str, dict]) -> str:
    """Writes what `summarise` returns as one Markdown table for each kind of hole."""
    tables = []
    for kind, group in summary.items():
        title = "All holes" if kind == "all" else f"Holes: {kind}"
        lines = [f"**{title}** ({group['count']} pictures)", ""]
        lines.append("| method | " + " | ".join(METRICS.values()) + " |")
        lines.append("|---|" + "---:|" * len(METRICS))
        for method, scores in group["scores"].items():
            cells = [FORMATS[metric].format(scores[metric]) for metric in METRICS]
            lines.append(f"| {method} | " + " | ".join(cells) + " |")
        tables.append("\n".join(lines))
    return "\n\n".join(tables)


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--model", help="`nano`, a pipeline folder or a hub repository; without it the baselines alone")
    add("--checkpoint", help="checkpoint of a published repository")
    add("--data", required=True, help="folder or tar file of photos with masks")
    add("--lpips_weights", help="safetensors file with the LPIPS network; default: that of the `lpips` package")
    add("--steps", type=int, help="denoising steps; default: the pipeline's")
    add("--guidance_scale", type=float, help="default: the pipeline's")
    add("--strength", type=float, help="default: the pipeline's")
    add("--limit", type=int, help="number of photos, spread evenly over the data; default: all")
    add("--resolution", type=int, help="resize photos and masks to this shorter side before anything else")
    add("--output", help="folder for side-by-side pictures")
    add("--json", dest="json_file", help="file for settings, means and the scores of each picture")
    add("--seed", type=int, default=0)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--dtype", choices=("float32", "float16", "bfloat16"), default="float32")
    args = parser.parse_args(arguments)
    for name in ("steps", "limit", "resolution"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"`--{name}` must be at least 1, but is {getattr(args, name)}")
    return args


def main(arguments: list[str] | None = None) -> None:
    args = parse_args(arguments)
    lpips = LPIPS.from_pretrained(args.lpips_weights).to(args.device)
    methods = dict(BASELINES)
    if args.model is not None:
        methods[Path(args.model).name] = load_model(args)
    samples = list(read_samples(args.data, args.limit, args.resolution))
    if args.output is not None:
        Path(args.output).mkdir(parents=True, exist_ok=True)

    pictures = []
    for index, sample in enumerate(tqdm(samples, file=sys.stderr)):
        scores, panels = {}, {"input": blank_hole(sample.photo, sample.mask)}
        for name, method in methods.items():
            scores[name], panels[name] = measure(sample, method, index, lpips)
        pictures.append(
            {"name": sample.name, "mask": sample.kind, "mask_area": float(sample.mask.mean()), "scores": scores}
        )
        if args.output is not None:
            sheet = side_by_side(panels | {"photo": sample.photo})
            sheet.save(Path(args.output) / f"{sample.name.replace('/', '_')}.png")

    summary = summarise(pictures)
    print(markdown_table(summary))
    if args.json_file is not None:
        report = {"settings": vars(args), "means": summary, "pictures": pictures}
        Path(args.json_file).write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
