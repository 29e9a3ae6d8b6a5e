"""Masks: boolean arrays `[H, W]` in which `True` means fill."""

import math
from itertools import pairwise, product

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.image_processor import PipelineImageInput
from diffusers.utils import logging
from PIL import Image

from .picture import LUMA, Picture, read_picture, split_batch

logger = logging.get_logger(__name__)

MASK_SOURCES = ("auto", "alpha", "transparent", "luminance")
# Shares of a photo from which on a mask is remarked upon: pixels of middle grey, and pixels to be filled.
GREY_SHARE = 0.05
LARGE_SHARE = 0.6
# What is left of an object is looked for in rings around its mask, of 2 px where the photo's shorter side has 512.
RINGS = 4  # that a mask may take
STRETCH = 64  # rings' widths: for so long a stretch of the mask it is decided at once
GAP, REACH = 2.5, 16  # a ring is compared with the next 16 after a gap
USUAL = (6, 8, 10)  # rings so far out tell what difference is usual
FOREIGN = 1.5  # times the usual difference


def load_masks(
    mask_image: PipelineImageInput, pictures: list[Picture], threshold: float = 0.5, source: str = "auto"
) -> list[np.ndarray]:
    """
    Reads the masks of a call, brings them to the size of their photos and warns of what may not be meant.

    Args:
        mask_image: One mask for all photos or as many masks as photos, in the forms of [`load_pictures`] or boolean;
            a three-dimensional torch tensor is a batch `[B, H, W]`.
        pictures (`list[Picture]`): The photos.
        threshold (`float`, defaults to 0.5): As in [`read_mask`].
        source (`str`, defaults to `"auto"`): As in [`read_mask`].

    Returns:
        `list[np.ndarray]`: One boolean array `[H, W]` a photo.
    """
    elements = split_batch(mask_image, "mask_image")
    if len(elements) not in (1, len(pictures)):
        raise ValueError(
            f"`mask_image` holds {len(elements)} masks for {len(pictures)} pictures; allowed are one for all or one "
            "each."
        )
    masks = []
    for element in elements:
        mask, remarks = read_mask(element, threshold, source)
        for remark in remarks:
            logger.warning(f"`mask_image`: {remark}.")
        masks.append(mask)
    masks = masks * len(pictures) if len(masks) == 1 else masks
    return [fit_mask(mask, picture.height, picture.width) for mask, picture in zip(masks, pictures)]


def read_mask(
    value: Image.Image | np.ndarray | torch.Tensor, threshold: float = 0.5, source: str = "auto", invert: bool = False
) -> tuple[np.ndarray, list[str]]:
    """
    Reads one mask, and says what about it may not be meant.

    Args:
        value (`PIL.Image.Image`, `np.ndarray` or `torch.Tensor`): One mask. Whole numbers of which none is above 1 are
            taken as 0 and 1, all others as a share of the largest number of their type.
        threshold (`float`, defaults to 0.5): Share of white, or of opaque, from which on a pixel is filled.
        source (`str`, defaults to `"auto"`): What says which pixels are filled. `"luminance"`: brightness, white is
            filled. `"alpha"`: the alpha channel, opaque is filled, whatever its colour. `"transparent"`: the alpha
            channel, transparent is filled. `"auto"`: alpha where it is not opaque everywhere, else luminance.
        invert (`bool`, defaults to `False`): Fills what the mask would keep, and keeps what it would fill.

    Returns:
        `tuple[np.ndarray, list[str]]`: A boolean array `[H, W]`, and remarks to be shown to whoever made the mask.

    Raises:
        ValueError: If the mask cannot be read, or `source` asks for an alpha channel that it does not have.
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"`mask_threshold` must be above 0 and at most 1, but is {threshold}.")
    values = mask_values(value, source)
    remarks = []
    grey = np.mean((values > 0.25) & (values < 0.75))
    if grey > GREY_SHARE:
        remarks.append(
            f"{grey:.0%} of its pixels are neither dark nor bright; those from {threshold:g} of white on are filled"
        )
    mask = (values >= threshold) != invert
    share, border = mask.mean(), np.concatenate([mask[0], mask[-1], mask[:, 0], mask[:, -1]])
    if share > LARGE_SHARE or border.all():
        what = f"{share:.0%} of the photo" if share > LARGE_SHARE else "the whole border of the photo"
        remarks.append(f"{what} is filled; if the rest is meant, invert the mask (`--invert-mask`)")
    return mask, remarks


def fit_mask(mask: np.ndarray, height: int, width: int, stretch: bool = False) -> np.ndarray:
    """
    Brings a mask to the size of its photo, such that no stroke gets lost.

    Args:
        mask (`np.ndarray` of shape `[H, W]`): Boolean mask.
        height (`int`): Height of the photo in pixels.
        width (`int`): Width of the photo in pixels.
        stretch (`bool`, defaults to `False`): Also where the aspect ratios differ.

    Returns:
        `np.ndarray` of shape `[height, width]`.

    Raises:
        ValueError: If the aspect ratios differ by more than a pixel and `stretch` is not set.
    """
    if mask.shape == (height, width):
        return mask
    scale = mask.shape[1] / width
    if not stretch and abs(mask.shape[0] - height * scale) >= max(1, scale):
        hint = "the same aspect ratio"
        if mask.shape == (width, height):
            hint += ". One of them lies on its side: an EXIF orientation turns it upright where viewers show it"
        raise ValueError(
            f"`mask_image` is {mask.shape[1]}×{mask.shape[0]} px, but its `image` is {width}×{height} px; both must "
            f"have the same size, or at least {hint}."
        )
    shares = Image.fromarray(mask.astype(np.float32)).resize((width, height), Image.Resampling.BOX)
    return np.asarray(shares) > 0


def mask_values(value: Image.Image | np.ndarray | torch.Tensor, source: str = "auto") -> np.ndarray:
    """
    What a mask says of each pixel, before it is taken as black or white.

    Args:
        value (`PIL.Image.Image`, `np.ndarray` or `torch.Tensor`): One mask, as in [`read_mask`].
        source (`str`, defaults to `"auto"`): As in [`read_mask`].

    Returns:
        `np.ndarray` of shape `[H, W]`, floats from 0 (keep) to 1 (fill).
    """
    if source not in MASK_SOURCES:
        raise ValueError(f"`mask_source` must be one of {', '.join(map(repr, MASK_SOURCES))}, but is {source!r}.")
    if isinstance(value, torch.Tensor) and value.dtype == torch.bool:
        value = value.cpu().numpy()
    if isinstance(value, np.ndarray) and value.dtype == bool:
        value = value.astype(np.uint8)
    picture = read_picture(value, "mask_image")
    if source == "auto":
        source = "luminance" if picture.alpha is None or (picture.alpha == picture.peak).all() else "alpha"
    if source != "luminance":
        if picture.alpha is None:
            raise ValueError(f"`mask_source` is {source!r}, but `mask_image` has no alpha channel.")
        alpha = picture.alpha[..., 0] / np.float32(picture.peak)
        return 1 - alpha if source == "transparent" else alpha
    if picture.color == "L":
        # Label maps and boolean masks that were cast have 1 for what others write as 255.
        peak = 1 if picture.samples.max() <= 1 else picture.peak
        return picture.samples[..., 0] / np.float32(peak)
    return picture.rgb() @ np.asarray(LUMA, np.float32)


def dilate_mask(mask: np.ndarray, pixels: int) -> np.ndarray:
    """
    Grows a mask by a square neighbourhood.

    Args:
        mask (`np.ndarray` of shape `[H, W]`): Boolean mask.
        pixels (`int`): By how much, in every direction.

    Returns:
        `np.ndarray` of shape `[H, W]`.
    """
    if not mask.any():
        return mask
    left, top, right, bottom = mask_box(mask, pixels)
    result = np.zeros_like(mask)
    result[top:bottom, left:right] = grow(torch.from_numpy(mask[top:bottom, left:right].copy()), pixels).numpy()
    return result


def grow(mask: torch.Tensor, pixels: int) -> torch.Tensor:
    """[`dilate_mask`] for a tensor."""
    for dim in (0, 1):
        # Along each axis, by windows that double, so that the cost hardly grows with `pixels`.
        reach = F.pad(mask, (0, 0, pixels, pixels) if dim == 0 else (pixels, pixels))
        span, window = 1, 2 * pixels + 1
        while span < window:
            step = min(span, window - span)
            kept = reach.shape[dim] - step
            reach = reach.narrow(dim, step, kept) | reach.narrow(dim, 0, kept)
            span += step
        mask = reach
    return mask


def grow_over_rims(mask: np.ndarray, image: Image.Image) -> np.ndarray:
    """
    Grows a mask as long as the colours just outside are foreign, as those of an object's rim or shadow are.

    They are foreign if they are farther from the nearest ones a little farther out than is usual around this stretch
    of the mask. What is in the mask is not looked at.

    Args:
        mask (`np.ndarray` of shape `[H, W]`): Boolean mask.
        image (`PIL.Image.Image`): The photo, of the mask's size.

    Returns:
        `np.ndarray` of shape `[H, W]`: The mask. Each stretch has grown by 0, 2, 4, 6 or 8 px where the photo's
        shorter side has 512, in proportion for others, and by 0 to 4 px for those below 256.
    """
    if not mask.any():
        return mask
    side = min(image.size)
    width, step = max(1, side / 256), max(1, side // 512)  # of a ring; large photos are looked at in steps
    margin = round((max(USUAL) + 1 + GAP + REACH) * width)
    left, top, right, bottom = mask_box(mask)
    rows, columns = (
        np.linspace(start, stop, 1 + max(1, round((stop - start) / (STRETCH * width)))).astype(int).tolist()
        for start, stop in ((top, bottom), (left, right))
    )
    grown = mask.copy()
    for (top, bottom), (left, right) in product(pairwise(rows), pairwise(columns)):
        x, y = max(left - margin, 0), max(top - margin, 0)
        part = slice(y, bottom + margin), slice(x, right + margin)
        own = np.zeros_like(mask[part])
        own[top - y : bottom - y, left - x : right - x] = mask[top:bottom, left:right]
        if own.any():
            photo = read_picture(image.crop((x, y, x + own.shape[1], y + own.shape[0])), "image")
            colours = torch.from_numpy(photo.rgb()[::step, ::step]).float()
            masks = torch.from_numpy(np.stack([own, mask[part]])).float()
            rings = _count_foreign(colours, *(F.max_pool2d(masks, step, ceil_mode=True) > 0), width / step)
            grown[part] |= grow(torch.from_numpy(own), round(rings * width)).numpy()
    return grown


def _count_foreign(colours: torch.Tensor, hole: torch.Tensor, unknown: torch.Tensor, width: float) -> int:
    """How many rings around a hole are foreign, of a width in pixels of `colours` `[H, W, 3]`."""

    def ring(start: float, stop: float, count: int) -> torch.Tensor:
        found = colours[grow(hole, round(stop * width)) & ~grow(hole, round(start * width)) & ~unknown]
        return found[:: -(-len(found) // count) or 1]

    def difference(start: float) -> float:
        beside, farther = ring(start, start + 1, 512), ring(start + 1 + GAP, start + 1 + GAP + REACH, 2048)
        return torch.cdist(beside, farther).amin(1).mean().item() if len(farther) else math.nan

    usual = np.mean([difference(start) for start in USUAL]) + 0.001  # a quarter of a grey level
    # Where there is nothing to compare with, no number is greater.
    return next((rings for rings in range(RINGS) if not difference(rings) > FOREIGN * usual), RINGS)


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
