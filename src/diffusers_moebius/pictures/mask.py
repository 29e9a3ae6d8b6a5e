"""Masks: boolean arrays `[H, W]` in which `True` means fill."""

import numpy as np
import torch
from diffusers.image_processor import PipelineImageInput
from PIL import Image

from .picture import LUMA, Picture, read_picture, split_batch


def load_masks(mask_image: PipelineImageInput, pictures: list[Picture]) -> list[np.ndarray]:
    """
    Reads the masks of a call and checks them against the photos.

    Args:
        mask_image: One mask for all photos or as many masks as photos, in the forms of [`load_pictures`] or boolean;
            a three-dimensional torch tensor is a batch `[B, H, W]`. A mask with an alpha channel that is not opaque
            everywhere is that alpha channel (opaque = fill, whatever its colour); any other is its brightness (white
            = fill). It must not hold more than two values; the threshold is half of white.
        pictures (`list[Picture]`): The photos.

    Returns:
        `list[np.ndarray]`: One boolean array `[H, W]` a photo.
    """
    elements = split_batch(mask_image, "mask_image")
    if len(elements) not in (1, len(pictures)):
        raise ValueError(
            f"`mask_image` holds {len(elements)} masks for {len(pictures)} pictures; allowed are one for all or one "
            "each."
        )
    masks = [_read_mask(element) for element in elements]
    masks = masks * len(pictures) if len(masks) == 1 else masks
    for mask, picture in zip(masks, pictures):
        if mask.shape != (picture.height, picture.width):
            raise ValueError(
                f"`mask_image` is {mask.shape[1]}×{mask.shape[0]} px, but its `image` is "
                f"{picture.width}×{picture.height} px; both must have the same size."
            )
    return masks


def mask_values(value: Image.Image | np.ndarray | torch.Tensor) -> np.ndarray:
    """
    What a mask in one of the forms of [`load_masks`] says of each pixel, before it is taken as black or white.

    Args:
        value (`PIL.Image.Image`, `np.ndarray` or `torch.Tensor`): One mask.

    Returns:
        `np.ndarray` of shape `[H, W]`: Its alpha if that is not opaque everywhere, else its brightness; floats from 0
        (keep) to 1 (fill).
    """
    if isinstance(value, torch.Tensor) and value.dtype == torch.bool:
        value = value.cpu().numpy()
    if isinstance(value, np.ndarray) and value.dtype == bool:
        value = value.astype(np.uint8) * 255
    picture = read_picture(value, "mask_image")
    if picture.alpha is not None and (picture.alpha < picture.peak).any():
        return picture.alpha[..., 0] / np.float32(picture.peak)
    if picture.color == "L":
        return picture.samples[..., 0] / np.float32(picture.peak)
    return picture.rgb() @ np.asarray(LUMA, np.float32)


def _read_mask(value: Image.Image | np.ndarray | torch.Tensor) -> np.ndarray:
    values = mask_values(value)
    low, high = values.min(), values.max()
    if not ((values == low) | (values == high)).all():
        raise ValueError(
            f"`mask_image` holds more than two values, from {low:.4g} to {high:.4g} of white; allowed are black and "
            'white. Binarise it first, e.g. `mask.convert("L").point(lambda v: 255 * (v >= 128))`.'
        )
    return values >= 0.5


def dilate_mask(mask: np.ndarray, pixels: int) -> np.ndarray:
    """
    Grows a mask by a square neighbourhood.

    Args:
        mask (`np.ndarray` of shape `[H, W]`): Boolean mask.
        pixels (`int`): By how much, in every direction.

    Returns:
        `np.ndarray` of shape `[H, W]`.
    """
    window = 2 * pixels + 1
    for _ in range(2):  # along each axis, by windows that double, so that the cost hardly grows with `pixels`
        reach, span = np.pad(mask, ((pixels, pixels), (0, 0))), 1
        while span < window:
            step = min(span, window - span)
            reach = reach[step:] | reach[:-step]
            span += step
        mask = reach.T
    return mask


def mask_box(mask: np.ndarray, margin: int = 0) -> tuple[int, int, int, int]:
    """
    The bounding box of a mask that is not empty, grown by a margin and cut at the picture's borders.

    Args:
        mask (`np.ndarray` of shape `[H, W]`): Boolean mask.
        margin (`int`, defaults to 0): Pixels on every side.

    Returns:
        `tuple[int, int, int, int]`: `(left, top, right, bottom)`.
    """
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    height, width = mask.shape
    return (
        max(int(columns[0]) - margin, 0),
        max(int(rows[0]) - margin, 0),
        min(int(columns[-1]) + 1 + margin, width),
        min(int(rows[-1]) + 1 + margin, height),
    )
