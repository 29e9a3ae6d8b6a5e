"""How a result comes back into its photo: blended, matched in colour, and exact outside the hole."""

from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter

from .mask import dilate_mask, mask_box
from .picture import Picture

PASTE_MODES = ("exact", "seamless", "blur", None)


def feather_inwards(mask: np.ndarray) -> np.ndarray:
    """
    How much of the fill each pixel takes: nothing outside the mask, everything inside but for a ramp along its edge.

    The ramp is as wide as the hole allows, about a sixteenth of its local thickness and at most 16 px; where the hole
    is thinner than 17 px there is none. There is none along the borders of the picture either, since a hole that
    touches the border has no edge there.

    Args:
        mask (`np.ndarray` of shape `[H, W]`): Boolean mask.

    Returns:
        `np.ndarray` of shape `[H, W]`, float32 in [0, 1].
    """
    weight = np.zeros(mask.shape, np.float32)
    if not mask.any():
        return weight
    # The mask's box and, where the picture goes on, one pixel around it: what lies farther out has no influence.
    left, top, right, bottom = mask_box(mask, 1)
    hole = mask[top:bottom, left:right]
    ramp = np.zeros(hole.shape, np.uint8)
    for radius in (1, 2, 4, 8, 16):
        core = ~dilate_mask(~hole, 8 * radius)
        if not core.any():
            break
        ramp[dilate_mask(core, 8 * radius) & hole] = radius
    distance = hole.astype(np.uint8)  # to the nearest pixel outside, in steps of a chess king
    inner = hole
    for _ in range(int(ramp.max())):
        inner = ~dilate_mask(~inner, 1)
        distance += inner
    weight[top:bottom, left:right] = np.minimum(distance / (ramp + np.float32(1)), 1)
    return weight


def blur_mask(mask: np.ndarray, radius: float = 3) -> np.ndarray:
    """
    The weights of the release's blurred blend: the mask under a Gaussian.

    Args:
        mask (`np.ndarray` of shape `[H, W]`): Boolean mask.
        radius (`float`, defaults to 3): Standard deviation in pixels.

    Returns:
        `np.ndarray` of shape `[H, W]`, float32 in [0, 1].
    """
    image = Image.fromarray(mask.astype(np.uint8) * 255).filter(ImageFilter.GaussianBlur(radius))
    return np.asarray(image).astype(np.float32) / 255


def compensate_color(
    fill: np.ndarray, original: np.ndarray, mask: np.ndarray, margin: int = 5, gain: float = 1.1
) -> np.ndarray:
    """
    Shifts the colours of a result towards the original's around the hole, as the release does.

    Adds `gain` times the difference of the mean colours, taken over the unmasked part of the mask's box grown by
    `margin`. Where that part is empty nothing changes.

    Args:
        fill (`np.ndarray` of shape `[h, w, 3]`): The decoded picture, floats.
        original (`np.ndarray` of shape `[h, w, 3]`): The original in the same place.
        mask (`np.ndarray` of shape `[h, w]`): Boolean mask, not empty.
        margin (`int`, defaults to 5): Pixels on every side.
        gain (`float`, defaults to 1.1): Factor on the difference.

    Returns:
        `np.ndarray` of shape `[h, w, 3]`; it may leave the range [0, 1].
    """
    left, top, right, bottom = mask_box(mask, margin)
    known = ~mask[top:bottom, left:right]
    if not known.any():
        return fill
    difference = original[top:bottom, left:right][known] - fill[top:bottom, left:right][known]
    return fill + gain * difference.mean(axis=0)


def membrane(values: torch.Tensor, hole: torch.Tensor, sweeps: int = 6) -> torch.Tensor:
    """
    Continues what lies around a hole into it as a membrane that is fixed at the hole's edge (Laplace's equation).

    A pyramid approximates it from coarse to fine: exactly along the edge, as smoothly inside. Where the hole touches
    the border nothing is fixed.

    Args:
        values (`torch.Tensor` of shape `[C, H, W]`): What it has in the hole is not looked at.
        hole (`torch.Tensor` of shape `[H, W]`): Boolean, not empty.
        sweeps (`int`, defaults to 6): Averages over the neighbours at full size; each coarser level has twice as many,
            up to 64.

    Returns:
        `torch.Tensor` of shape `[C, H, W]`, equal to `values` outside the hole; in a hole without an edge it is 0.
    """
    inside = hole.float()[None, None]
    edge = F.max_pool2d(inside, 3, 1, 1) - inside
    levels = [(torch.where(edge > 0, values[None], 0), edge)]  # values times known share, and share
    while max(levels[-1][1].shape[2:]) > 1:
        window = [min(2, length) for length in levels[-1][1].shape[2:]]
        levels.append(tuple(F.avg_pool2d(level, window, ceil_mode=True) for level in levels[-1]))
    fixed, share = levels.pop()
    filled = fixed / share.where(share > 0, 1)
    for level, (fixed, share) in reversed(list(enumerate(levels))):
        free = (share == 0).float()
        fixed = fixed / share.where(share > 0, 1)
        filled = fixed + free * F.interpolate(filled, share.shape[2:], mode="bilinear", align_corners=False)
        for _ in range(min(sweeps * 2**level, 64)):
            padded = F.pad(filled, (1, 1, 1, 1), mode="replicate")  # nothing flows across the borders
            neighbours = padded[..., :-2, 1:-1] + padded[..., 2:, 1:-1]
            neighbours.add_(padded[..., 1:-1, :-2]).add_(padded[..., 1:-1, 2:])
            filled = torch.addcmul(fixed, neighbours, free, value=0.25)
    return torch.where(hole, filled[0], values)


def match_edges(fill: np.ndarray, original: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """
    Shifts the colours of a result inside the hole so that it meets the original at the hole's edge without a step.

    The difference between the two on the pixels around the hole goes on into it as a [`membrane`] and is added (Pérez
    et al., "Poisson Image Editing", 2003, section 2). A hole without an edge stays as it is.

    Args:
        fill (`np.ndarray` of shape `[h, w, 3]`): The decoded picture, floats.
        original (`np.ndarray` of shape `[h, w, 3]`): The original in the same place; what it has in the hole is not
            looked at.
        mask (`np.ndarray` of shape `[h, w]`): Boolean mask, not empty.

    Returns:
        `np.ndarray` of shape `[h, w, 3]`, equal to `fill` outside the hole; it may leave the range [0, 1].
    """
    left, top, right, bottom = mask_box(mask, 1)
    area = slice(top, bottom), slice(left, right)
    difference = torch.from_numpy((original[area] - fill[area]).astype(np.float32)).permute(2, 0, 1).contiguous()
    shift = membrane(difference, torch.from_numpy(mask[area])).permute(1, 2, 0).numpy()
    result = fill.copy()
    result[area] += np.where(mask[area][..., None], shift, 0)
    return result


def paste_fill(
    picture: Picture,
    fill: np.ndarray,
    mask: np.ndarray,
    box: tuple[int, int, int, int],
    paste: str | None = "exact",
    color_compensation: bool = False,
) -> Picture:
    """
    Puts a decoded result into its picture.

    Args:
        picture (`Picture`): The original.
        fill (`np.ndarray` of shape `[h, w, 3]`): The decoded picture in the box, floats in [0, 1].
        mask (`np.ndarray` of shape `[H, W]`): Boolean mask of the whole picture. An empty one gives the original back.
        box (`tuple[int, int, int, int]`): Where `fill` belongs, `(left, top, right, bottom)`.
        paste (`str`, *optional*, defaults to `"exact"`): `"exact"` changes nothing outside the mask and blends inwards
            ([`feather_inwards`]), `"seamless"` changes nothing outside either and moves the colours inside
            ([`match_edges`]), `"blur"` is the release's blend ([`blur_mask`]) with its truncation to the picture's
            depth, `None` takes all of `fill`.
        color_compensation (`bool`, defaults to `False`): Whether [`compensate_color`] comes first.

    Returns:
        `Picture`: A new picture with the alpha channel of the original.
    """
    if not mask.any():
        return picture
    left, top, right, bottom = box
    depth = picture.samples.dtype
    if paste == "blur" and picture.peak > 1:
        fill = np.floor(fill * picture.peak) / picture.peak
    if color_compensation:
        fill = compensate_color(fill, picture.rgb(box), mask[top:bottom, left:right])
    if paste == "seamless":
        fill = match_edges(fill, picture.rgb(box), mask[top:bottom, left:right]).clip(0, 1)

    original = picture.samples[top:bottom, left:right]
    weights = {"exact": feather_inwards, "seamless": np.float32, "blur": blur_mask, None: np.ones_like}
    weight = weights[paste](mask)
    weight = weight[top:bottom, left:right, None]
    blended = weight * picture.from_rgb(fill) + (1 - weight) * original
    if picture.peak > 1:
        # The nudge keeps a whole number that float arithmetic left just below itself from losing one.
        blended = np.floor(blended + 1e-3) if paste == "blur" else np.rint(blended)
    blended = blended.clip(0, picture.peak).astype(depth)

    samples = picture.samples.copy()
    samples[top:bottom, left:right] = np.where(weight > 0, blended, original)
    return replace(picture, samples=samples)
