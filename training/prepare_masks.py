#!/usr/bin/env python3
"""Writes object masks for a folder of photos with a segmentation model, for the scripts' `--train_metadata`.

    python training/prepare_masks.py --pretrained_model_name_or_path facebook/mask2former-swin-tiny-coco-instance \\
        --train_data_dir photos/ --output_dir masks/

The model is one that finds instances (Mask2Former, MaskFormer, EoMT) or a SAM, which is asked at the points of a
grid. `masks/metadata.jsonl` has a line for each object: `image`, `mask` and `category`, which is `foreground`; and a
line for each photo without a mask and with the category `background`, whose holes are random. An interrupted run goes
on where it stopped when it is started again.
"""

import argparse
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import transformers
from PIL import Image
from tqdm.auto import tqdm

from diffusers_moebius.pictures.files import replace_file
from diffusers_moebius.pictures.mask import dilate_mask
from diffusers_moebius.training.arguments import training_parser
from diffusers_moebius.training.picture_sources import list_pictures, read_picture

logger = logging.getLogger("prepare_masks")
POINT_BATCH = 64  # points that a SAM is asked at once
SAME_OBJECT = 0.7  # masks that overlap more than this (intersection over union) show one object
# SAM's own automatic mask generation drops masks that grow or shrink much when their threshold moves.
STABILITY_OFFSET, MIN_STABILITY = 1.0, 0.9

Segments = list[tuple[np.ndarray, float, str | None]]  # mask [H, W], score, label


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = training_parser(__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--pretrained_model_name_or_path", required=True, help="segmentation model, a hub repository or a folder")
    add("--revision", help="its branch, tag or commit")
    add("--train_data_dir", nargs="+", required=True, help="folders of photos")
    add("--output_dir", required=True, help="for the masks and metadata.jsonl")
    add("--score_threshold", type=float, default=0.5, help="masks that the model is less sure of are dropped")
    add("--min_area", type=float, default=0.01, help="smallest mask, as a share of the photo, after the dilation")
    add("--max_area", type=float, default=0.5, help="largest mask, as a share of the photo, after the dilation")
    add("--max_masks_per_photo", type=int, default=3, help="those with the highest scores are kept")
    add("--dilation", type=int, default=0, help="pixels that a mask grows to each side")
    add("--labels", nargs="+", help="keep objects with these labels only")
    add("--background_labels", nargs="+", default=[], help="labels whose masks are of category background: sky, wall")
    add("--points_per_side", type=int, default=16, help="points at which a SAM is asked: this number squared")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(arguments)
    if not 0 <= args.min_area < args.max_area <= 1:
        parser.error(f"`--min_area` and `--max_area` must rise in 0 to 1, but are {args.min_area} and {args.max_area}")
    for name, least in (("max_masks_per_photo", 1), ("dilation", 0), ("points_per_side", 1)):
        if getattr(args, name) < least:
            parser.error(f"`--{name}` must be at least {least}, but is {getattr(args, name)}")
    return args


def load_segmenter(args: argparse.Namespace) -> Callable[[Image.Image], Segments]:
    """A function from a photo to the masks in it, from whichever of the two kinds the model is."""
    name, options = args.pretrained_model_name_or_path, {"revision": args.revision}
    config = transformers.AutoConfig.from_pretrained(name, **options)
    is_sam = config.model_type.startswith("sam")
    if not is_sam and not config.model_type.startswith(("mask2former", "maskformer", "eomt")):
        raise ValueError(
            "`pretrained_model_name_or_path` must be a Mask2Former, a MaskFormer, an EoMT or a"
            f" SAM, but {name!r} is of type {config.model_type!r}."
        )
    processor = transformers.AutoProcessor.from_pretrained(name, **options)
    model_class = transformers.AutoModelForMaskGeneration if is_sam else transformers.AutoModelForUniversalSegmentation
    model = model_class.from_pretrained(name, **options).to(args.device).eval()

    if is_sam:
        return lambda photo: segments_at_points(model, processor, photo, args.points_per_side, args.score_threshold)
    known = set(config.id2label.values())
    for option in ("labels", "background_labels"):
        if unknown := set(getattr(args, option) or []) - known:
            raise ValueError(
                f"`{option}` must be labels of the model, but {sorted(unknown)} are none: {sorted(known)}."
            )
    return lambda photo: instance_segments(model, processor, photo, args.score_threshold)


@torch.inference_mode()
def instance_segments(model, processor, photo: Image.Image, score_threshold: float) -> Segments:
    """The instances that a universal segmentation model finds in a photo."""
    inputs = processor(images=photo, return_tensors="pt").to(model.device)
    (result,) = processor.post_process_instance_segmentation(
        model(**inputs), threshold=score_threshold, target_sizes=[(photo.height, photo.width)]
    )
    numbers = np.asarray(result["segmentation"].cpu())  # [H, W], -1 or 0 where nothing is
    return [
        (numbers == segment["id"], float(segment["score"]), model.config.id2label[segment["label_id"]])
        for segment in result["segments_info"]
    ]


@torch.inference_mode()
def segments_at_points(model, processor, photo: Image.Image, points_per_side: int, score_threshold: float) -> Segments:
    """What a SAM sees at the points of a grid, without what it is unsure of and what it has seen before."""
    steps = (np.arange(points_per_side) + 0.5) / points_per_side
    points = [[[float(x * photo.width), float(y * photo.height)]] for y in steps for x in steps]
    inputs = processor(images=photo, input_points=[points], return_tensors="pt").to(model.device)
    embeddings = model.get_image_embeddings(inputs["pixel_values"])
    sizes = [inputs[name].cpu() for name in ("original_sizes", "reshaped_input_sizes") if name in inputs]
    border = getattr(processor.image_processor, "mask_threshold", 0.0)  # the logit above which a mask begins
    found: list[tuple[float, np.ndarray]] = []
    for first in range(0, len(points), POINT_BATCH):
        chunk = inputs["input_points"][:, first : first + POINT_BATCH]
        outputs = model(image_embeddings=embeddings, input_points=chunk, multimask_output=True)
        logits, scores = outputs.pred_masks[0].flatten(0, 1), outputs.iou_scores[0].flatten()  # [P × 3, h, w], [P × 3]
        smaller = (logits > border + STABILITY_OFFSET).sum((1, 2))
        larger = (logits > border - STABILITY_OFFSET).sum((1, 2))
        kept = (scores >= score_threshold) & (smaller >= MIN_STABILITY * larger) & (smaller > 0)
        if kept.any():
            (masks,) = processor.post_process_masks(logits[kept][None, :, None].cpu(), *sizes)  # [K, 1, H, W]
            found += zip(scores[kept].tolist(), masks[:, 0].numpy().astype(bool))
    found.sort(key=lambda pair: -pair[0])
    distinct: Segments = []
    for score, mask in found:
        if all((mask & other).sum() <= SAME_OBJECT * (mask | other).sum() for other, _, _ in distinct):
            distinct.append((mask, score, None))
    return distinct


def choose(segments: Segments, args: argparse.Namespace) -> list[tuple[np.ndarray, str]]:
    """The masks to keep with their categories, the surest first."""
    chosen = []
    for mask, _, label in sorted(segments, key=lambda segment: -segment[1]):
        is_background = label in args.background_labels
        if args.labels is not None and label not in args.labels and not is_background:
            continue
        mask = dilate_mask(mask, args.dilation)
        if args.min_area <= mask.mean() <= args.max_area:
            chosen.append((mask, "background" if is_background else "foreground"))
    return chosen[: args.max_masks_per_photo]


def save_mask(mask: np.ndarray, path: Path) -> None:
    with replace_file(path) as file:
        Image.fromarray(mask).convert("L").save(file, "PNG")


def finished_lines(metadata: Path) -> list[str]:
    """The lines of the photos that an interrupted run has done; each photo's last is the one without a mask."""
    lines = metadata.read_text().splitlines(keepends=True) if metadata.exists() else []
    while lines and not (lines[-1].endswith("\n") and "mask" not in json.loads(lines[-1])):
        lines.pop()
    return lines


def main(arguments: list[str] | None = None) -> None:
    args = parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    output_dir = Path(args.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    for folder in args.train_data_dir:
        if not Path(folder).is_dir():
            raise ValueError(f"`train_data_dir` must be folders, but {folder!r} is none.")
    settings = {name: value for name, value in vars(args).items() if name not in ("device", "output_dir")}
    settings_file, metadata = output_dir / "settings.json", output_dir / "metadata.jsonl"
    begun = json.loads(settings_file.read_text()) if settings_file.exists() else settings
    if begun != settings:
        raise ValueError(f"`output_dir` {args.output_dir!r} was begun with {begun}, and not with {settings}.")
    segment = load_segmenter(args)
    lines, unreadable = finished_lines(metadata), []
    done = {json.loads(line)["image"] for line in lines}
    for path, text in ((settings_file, json.dumps(settings)), (metadata, "".join(lines))):
        with replace_file(path) as file:
            file.write(text.encode())
    # Each folder by itself, for the names of its masks.
    folders = enumerate(map(Path, args.train_data_dir))
    photos = [(number, folder, record) for number, folder in folders for record in list_pictures([folder])]

    with metadata.open("a") as file:
        for number, folder, record in tqdm(photos, mininterval=5):
            path = Path(record.name)
            image = Path(os.path.relpath(path, output_dir)).as_posix()
            if image in done:
                continue
            picture = read_picture(record)
            if picture is None:
                unreadable.append(str(path))
                continue
            for count, (mask, category) in enumerate(choose(segment(picture[0]), args)):
                name = f"masks/{number}/{path.relative_to(folder).as_posix()}-{count}.mask.png"
                save_mask(mask, output_dir / name)
                lines.append(json.dumps({"image": image, "mask": name, "category": category}) + "\n")
                file.write(lines[-1])
            lines.append(json.dumps({"image": image, "category": "background"}) + "\n")
            file.write(lines[-1])
            file.flush()

    if not lines:
        raise ValueError("`train_data_dir` holds no readable photo.")
    if unreadable:
        logger.warning("%d unreadable photos skipped: %s", len(unreadable), ", ".join(unreadable))
    num_photos = len(photos) - len(unreadable)
    logger.info("%d masks in %d photos: %s", len(lines) - num_photos, num_photos, metadata)


if __name__ == "__main__":
    main()
