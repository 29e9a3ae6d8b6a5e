"""Random crops of pictures with their holes: what a training sample is."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageOps

from ..pictures.random_mask import random_mask
from .picture_sources import CATEGORIES, Record, read_picture

CROP_SCALE = (0.35, 1.0)


def random_box(
    size: tuple[int, int],
    generator: np.random.Generator,
    scale: tuple[float, float] = CROP_SCALE,
    mask: np.ndarray | None = None,
) -> tuple[int, int, int]:
    """
    Left, top and side of a square inside a picture.

    Args:
        size (`tuple[int, int]`): Width and height of the picture.
        generator (`np.random.Generator`): Source of randomness.
        scale (`tuple[float, float]`, defaults to `(0.35, 1.0)`): Its area, as a share of the largest that fits.
        mask (`np.ndarray` of shape `[H, W]` and dtype bool, *optional*): It shows one of the pixels that this marks.
    """
    side = max(1, round(min(size) * math.sqrt(generator.uniform(*scale))))
    lowest, highest = (0, 0), (size[0] - side, size[1] - side)
    if mask is not None:
        marked = np.flatnonzero(mask)
        pixel = divmod(int(marked[generator.integers(len(marked))]), size[0])[::-1]
        lowest = [max(0, place - side + 1) for place in pixel]
        highest = [min(place, last) for place, last in zip(pixel, highest)]
    left, top = (int(generator.integers(low, high, endpoint=True)) for low, high in zip(lowest, highest))
    return left, top, side


def crop_mask(mask: np.ndarray, box: tuple[int, int, int], resolution: int, flip: bool) -> np.ndarray:
    """
    Cuts a square out of a mask and resizes it so that whatever the mask touches stays marked.

    Args:
        mask (`np.ndarray` of shape `[H, W]` and dtype bool): The mask.
        box (`tuple[int, int, int]`): Left, top and side in pixels.
        resolution (`int`): Side of the result.
        flip (`bool`): Whether to mirror it.

    Returns:
        `np.ndarray` of shape `[resolution, resolution]` and dtype bool.
    """
    left, top, side = box
    mask = mask[top : top + side, left : left + side]
    nearest = (2 * np.arange(resolution) + 1) * side // (2 * resolution)  # where the middle of a pixel was
    resized = mask[np.ix_(nearest, nearest)]
    rows, columns = np.nonzero(mask)  # thin parts that a smaller size would step over
    resized[(2 * rows + 1) * resolution // (2 * side), (2 * columns + 1) * resolution // (2 * side)] = True
    return resized[:, ::-1] if flip else resized


def picture_to_tensor(image: Image.Image) -> torch.Tensor:
    """Turns an RGB picture into a `[3, H, W]` tensor in [-1, 1]."""
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).float() / 127.5 - 1


@dataclass(frozen=True)
class Cropper:
    """
    Cuts random crops with holes out of pictures.

    The hole of a foreground picture is its own mask. A background picture has its own mask half of the time, if it has
    one, and a random one otherwise; half of its holes are cut to the outline of a foreground picture's mask, if there
    are any. A picture without category has its own mask, or a random one if it has none.

    Args:
        resolution (`int`): Side of a crop in pixels, a multiple of 8.
        mask_presets (sequence of `str`): Names of the mask presets to draw from, in equal shares.
        seed (`int`, defaults to 0): Seed of crops and holes.
        random_flip (`bool`, defaults to `True`): Mirror half of the crops.
        crop_scale (`tuple[float, float]`, defaults to `(0.35, 1.0)`): See [`random_box`].
        objects (sequence of `Record`, *optional*): Foreground pictures, whose outlines background holes are cut to.
    """

    resolution: int
    mask_presets: Sequence[str]
    seed: int = 0
    random_flip: bool = True
    crop_scale: tuple[float, float] = CROP_SCALE
    objects: Sequence[Record] = ()

    def __call__(self, record: Record, number: tuple[int, int], num_masks: int = 1) -> dict[str, torch.Tensor] | None:
        """
        A crop of a picture, which depends on `seed` and the sample's number (its epoch, and which picture) alone.

        Returns:
            `dict` with `pixel_values` `[3, H, W]` in [-1, 1], `mask` `[M, 1, H, W]` of 0 and 1 (1 is to be filled) and
            `category`, a scalar: 0 background, 1 foreground, -1 not given. `None` if the picture is unreadable.
        """
        picture = read_picture(record)
        if picture is None:
            return None
        generator = np.random.default_rng((self.seed, *number))
        (image, own), is_background = picture, record.category == CATEGORIES["background"]
        # As the release trains: a background sample has a random mask half of the time and its own otherwise.
        if own is not None and is_background and generator.random() < 0.5:
            own = None
        side, box = self.resolution, random_box(image.size, generator, self.crop_scale, own)
        flip = generator.random() < 0.5 and self.random_flip
        corners = (box[0], box[1], box[0] + box[2], box[1] + box[2])
        image = image.resize((side, side), Image.Resampling.LANCZOS, box=corners)
        masks = []
        for _ in range(num_masks):
            if own is not None:
                mask = crop_mask(own, box, side, flip)
            else:
                mask = random_mask(side, side, str(generator.choice(self.mask_presets)), generator)
            # Half of the background holes have the outline of another picture's object.
            if is_background and self.objects and generator.random() < 0.5:
                other = read_picture(self.objects[int(generator.integers(len(self.objects)))])
                if other is not None:
                    outline = Image.fromarray(other[1]).resize((side, side), Image.Resampling.NEAREST)
                    cut = mask & np.asarray(outline)
                    mask = cut if cut.any() else mask
            masks.append(mask)
        return {
            "pixel_values": picture_to_tensor(ImageOps.mirror(image) if flip else image),
            "mask": torch.from_numpy(np.stack(masks))[:, None].float(),
            "category": torch.tensor(record.category),
        }
