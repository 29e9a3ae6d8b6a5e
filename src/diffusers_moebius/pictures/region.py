"""What the model sees of a photo: the region around the hole, its working size, and a first filling."""

import math
from dataclasses import dataclass
from numbers import Integral
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.image_processor import PipelineImageInput

from .mask import dilate_mask, load_masks, mask_box
from .picture import Picture, load_pictures

# A working area may be this many times longer than it is wide.
MAX_ASPECT_RATIO = 16
MASKED_CONTENT = ("original", "fill", "noise")


class ModelSizes(NamedTuple):
    """
    What a model asks of the sizes at which it works, in pixels.

    Args:
        latent (`int`, defaults to 8): Side of one latent.
        native (`int`, defaults to 512): Side of the pictures that the model was trained on.
        multiple (`int`, defaults to 32): What a working size must be divisible by.
    """

    latent: int = 8
    native: int = 512
    multiple: int = 32


@dataclass
class Region:
    """
    Where in a photo the model works, and at which size.

    Args:
        picture (`Picture`): The photo.
        mask (`np.ndarray` of shape `[H, W]`): Boolean mask of the whole photo.
        box (`tuple[int, int, int, int]`): The part to work on, `(left, top, right, bottom)`.
        content_size (`tuple[int, int]`): Height and width at which the box runs.
        multiple (`int`): What the size in the model must be divisible by; the box is padded to it.
    """

    picture: Picture
    mask: np.ndarray
    box: tuple[int, int, int, int]
    content_size: tuple[int, int]
    multiple: int

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in the model, padding included."""
        return tuple(math.ceil(length / self.multiple) * self.multiple for length in self.content_size)

    @property
    def enlargement(self) -> float:
        """How many pixels of the photo a side there are for one of the model's."""
        left, top, right, bottom = self.box
        return max((bottom - top) / self.content_size[0], (right - left) / self.content_size[1])

    def tensors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The box as the model sees it: picture `[1, 3, H, W]` in [-1, 1] and mask `[1, 1, H, W]`."""
        left, top, right, bottom = self.box
        image = torch.from_numpy(np.ascontiguousarray(self.picture.rgb(self.box), np.float32)).permute(2, 0, 1)[None]
        mask = torch.from_numpy(np.ascontiguousarray(self.mask[top:bottom, left:right], np.float32))[None, None]
        image, mask = 2 * resize(image, *self.content_size) - 1, resize_mask(mask, *self.content_size)
        return pad_to_multiple(image, self.multiple), pad_to_multiple(mask, self.multiple)

    def fill(self, decoded: torch.Tensor) -> np.ndarray:
        """What the model made of the box, `[3, H, W]` in [0, 1], in the box's own size `[h, w, 3]`."""
        left, top, right, bottom = self.box
        height, width = self.content_size
        fill = resize(decoded[None, :, :height, :width].cpu(), bottom - top, right - left)
        return fill[0].permute(1, 2, 0).numpy()


def find_regions(
    image: PipelineImageInput,
    mask_image: PipelineImageInput,
    sizes: ModelSizes,
    mask_dilation: int = 0,
    padding_mask_crop: int | None = None,
    height: int | None = None,
    width: int | None = None,
    mask_threshold: float = 0.5,
    mask_source: str = "auto",
) -> list[Region]:
    """
    Reads photos and masks, and finds where in each photo the model is to work.

    Args:
        image: The photos, in the forms of [`load_pictures`].
        mask_image: Their masks, in the forms of [`load_masks`].
        sizes ([`ModelSizes`]): What the model asks of sizes.
        mask_dilation (`int`, defaults to 0): Pixels by which the masks grow first.
        padding_mask_crop (`int`, *optional*): Margin around the mask's box; by default the whole photo is worked on.
        height (`int`, *optional*): Height to work at, see [`working_size`].
        width (`int`, *optional*): Width to work at.
        mask_threshold (`float`, defaults to 0.5): As in [`load_masks`].
        mask_source (`str`, defaults to `"auto"`): As in [`load_masks`].

    Returns:
        `list[Region]`: One a photo.
    """
    for name, value in (("height", height), ("width", width)):
        if value is not None and (not isinstance(value, Integral) or value < 1 or value % sizes.multiple):
            raise ValueError(f"`{name}` must be a positive multiple of {sizes.multiple}, but is {value}.")
    for name, value in (("mask_dilation", mask_dilation), ("padding_mask_crop", padding_mask_crop)):
        if value is not None and (not isinstance(value, Integral) or value < 0):
            raise ValueError(f"`{name}` must be a whole number of at least 0, but is {value}.")
    pictures = load_pictures(image)
    masks = load_masks(mask_image, pictures, mask_threshold, mask_source)
    masks = [dilate_mask(mask, mask_dilation) for mask in masks]
    return [
        find_region(picture, mask, sizes, padding_mask_crop, height, width) for picture, mask in zip(pictures, masks)
    ]


def find_region(
    picture: Picture,
    mask: np.ndarray,
    sizes: ModelSizes,
    padding_mask_crop: int | None = None,
    height: int | None = None,
    width: int | None = None,
) -> Region:
    """Finds where in one photo the model is to work; the arguments are those of [`find_regions`]."""
    min_size = 2 * sizes.latent
    if min(picture.height, picture.width) < min_size:
        raise ValueError(
            f"`image` is {picture.width}×{picture.height} px; both sides must have at least {min_size} px."
        )
    box = (0, 0, picture.width, picture.height)
    if padding_mask_crop is not None and mask.any():
        box = crop_region(mask, padding_mask_crop, min_size)
    box_height, box_width = box[3] - box[1], box[2] - box[0]
    if max(box_height, box_width) > MAX_ASPECT_RATIO * min(box_height, box_width):
        raise ValueError(
            f"`image` has {box_width}×{box_height} px to work on; one side may be at most {MAX_ASPECT_RATIO} times "
            "the other. With `padding_mask_crop` only the mask's surroundings count."
        )
    content_size = working_size(box_height, box_width, sizes.native, height, width)
    return Region(picture, mask, box, content_size, sizes.multiple)


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
