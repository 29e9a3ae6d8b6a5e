"""What the model sees of a photo: the region around the hole, its working size, and a first filling."""

import math

import numpy as np
import torch
import torch.nn.functional as F

from .mask import mask_box

# A working area may be this many times longer than it is wide.
MAX_ASPECT_RATIO = 16
MASKED_CONTENT = ("original", "fill", "noise")


def _widen(start: int, stop: int, length: int, limit: int) -> tuple[int, int]:
    """The interval around `[start, stop)` of at least `length`, as far as it fits into `[0, limit)`."""
    length = min(length, limit)
    missing = length - (stop - start)
    if missing <= 0:
        return start, stop
    start = max(min(start - missing // 2, limit - length), 0)
    return start, start + length


def crop_region(mask: np.ndarray, margin: int, min_size: int) -> tuple[int, int, int, int]:
    """
    The part of a picture to work on: the mask's box and a margin.

    A box with a side below `min_size` or more elongated than 16:1 grows to these limits where the picture has room.

    Args:
        mask (`np.ndarray` of shape `[H, W]`): Boolean mask, not empty.
        margin (`int`): Pixels on every side.
        min_size (`int`): Shortest side in pixels.

    Returns:
        `tuple[int, int, int, int]`: `(left, top, right, bottom)`.
    """
    left, top, right, bottom = mask_box(mask, margin)
    shortest = max(min_size, math.ceil(max(right - left, bottom - top) / MAX_ASPECT_RATIO))
    left, right = _widen(left, right, shortest, mask.shape[1])
    top, bottom = _widen(top, bottom, shortest, mask.shape[0])
    return left, top, right, bottom


def working_size(
    height: int, width: int, native: int, target_height: int | None = None, target_width: int | None = None
) -> tuple[int, int]:
    """
    The size at which a picture runs through the model, before it is padded to the model's multiple.

    With a short side from a half to 5/4 of the native size it runs as it is. A larger picture is reduced until its
    short side has the native size. A smaller one is enlarged until its long side has it, and left alone if the long
    side has it already. The aspect ratio changes only if both targets are given.

    Args:
        height (`int`): Height of the picture in pixels.
        width (`int`): Width of the picture in pixels.
        native (`int`): Side of the pictures that the model was trained on, in pixels.
        target_height (`int`, *optional*): Height to work at; alone it keeps the aspect ratio.
        target_width (`int`, *optional*): Width to work at; alone it keeps the aspect ratio.

    Returns:
        `tuple[int, int]`: Height and width in pixels.
    """
    if target_height is not None and target_width is not None:
        return target_height, target_width
    short, long = min(height, width), max(height, width)
    if target_height is not None:
        scale = target_height / height
    elif target_width is not None:
        scale = target_width / width
    elif short > 1.25 * native:
        scale = native / short
    elif 2 * short < native:
        scale = max(native / long, 1)
    else:
        scale = 1
    return max(round(height * scale), 1), max(round(width * scale), 1)


def resize(image: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """
    Resizes pictures by antialiased bicubic interpolation.

    Args:
        image (`torch.Tensor` of shape `[B, C, H, W]`): Floats in [0, 1].
        height (`int`): New height in pixels.
        width (`int`): New width in pixels.

    Returns:
        `torch.Tensor` of shape `[B, C, height, width]`, in [0, 1].
    """
    if image.shape[-2:] == (height, width):
        return image
    return F.interpolate(image, (height, width), mode="bicubic", antialias=True).clamp(0, 1)


def resize_mask(mask: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """
    Resizes masks such that a new pixel is masked if any pixel that it covers is, so that thin strokes survive.

    Args:
        mask (`torch.Tensor` of shape `[B, 1, H, W]`): Zeros and ones.
        height (`int`): New height in pixels.
        width (`int`): New width in pixels.

    Returns:
        `torch.Tensor` of shape `[B, 1, height, width]`.
    """
    return F.adaptive_max_pool2d(mask, (height, width))


def pad_to_multiple(image: torch.Tensor, multiple: int) -> torch.Tensor:
    """
    Continues pictures or masks by reflection at the bottom and the right, up to a multiple.

    Args:
        image (`torch.Tensor` of shape `[B, C, H, W]`): Pictures or masks.
        multiple (`int`): What height and width are to be divisible by.

    Returns:
        `torch.Tensor` of shape `[B, C, H', W']`.
    """
    for dim in (2, 3):
        length = image.shape[dim]
        missing = -length % multiple
        if missing:
            index = np.pad(np.arange(length), (0, missing), mode="reflect" if length > 1 else "edge")
            image = image.index_select(dim, torch.from_numpy(index).to(image.device))
    return image


def fill_hole(image: torch.Tensor, mask: torch.Tensor, smoothing_steps: int = 4) -> torch.Tensor:
    """
    Fills holes with colours that go over smoothly into those around them: the classical pull-push pyramid.

    On the way down each level averages the known pixels of the finer one; on the way up what is unknown is taken from
    the coarser level and smoothed (Gortler et al., "The Lumigraph", 1996, section 3.4).

    Args:
        image (`torch.Tensor` of shape `[B, 3, H, W]`): Pictures; what they have in the holes is not looked at.
        mask (`torch.Tensor` of shape `[B, 1, H, W]`): 1 in the holes, 0 elsewhere. Where all is hole the result is 0.
        smoothing_steps (`int`, defaults to 4): Averages over 3x3 pixels on each level.

    Returns:
        `torch.Tensor` of shape `[B, 3, H, W]`, equal to `image` outside the holes.
    """
    levels = [(image * (1 - mask), 1 - mask)]  # colours times how much of each pixel is known, and that share
    while min(levels[-1][1].shape[2:]) > 1:
        levels.append(tuple(F.avg_pool2d(values, 2, ceil_mode=True) for values in levels[-1]))
    colors, known = levels.pop()
    filled = colors / known.clamp(min=1e-6)
    for colors, known in reversed(levels):
        filled = F.interpolate(filled, known.shape[2:], mode="bilinear", align_corners=False)
        for _ in range(smoothing_steps):
            filled = colors + (1 - known) * filled
            filled = F.avg_pool2d(F.pad(filled, (1, 1, 1, 1), mode="replicate"), 3, 1)
        filled = colors + (1 - known) * filled
    return torch.where(mask > 0, filled, image)
