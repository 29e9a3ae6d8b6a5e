"""Random crops of pictures with their holes: what a training sample is."""

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from PIL import Image, ImageOps

from .masks import random_mask
from .picture_sources import CATEGORIES, Picture, PictureReader

CROP_SCALE = (0.35, 1.0)
CACHE_UNIT = 100  # pictures in a shard of a latent cache
BOX_TRIES = 10  # at a crop that shows a part of the picture's own mask


def random_box(
    size: tuple[int, int], generator: np.random.Generator, scale: tuple[float, float] = CROP_SCALE
) -> tuple[int, int, int]:
    """Left, top and side of a square inside a picture; `scale` is its area, as a share of the largest that fits."""
    side = max(1, round(min(size) * math.sqrt(generator.uniform(*scale))))
    left = int(generator.integers(0, size[0] - side, endpoint=True))
    top = int(generator.integers(0, size[1] - side, endpoint=True))
    return left, top, side


def box_with_mask(
    mask: np.ndarray, generator: np.random.Generator, scale: tuple[float, float] = CROP_SCALE
) -> tuple[int, int, int]:
    """A [`random_box`] that shows a part of the picture's mask `[H, W]`, which is not empty."""
    height, width = mask.shape
    for _ in range(BOX_TRIES):
        left, top, side = random_box((width, height), generator, scale)
        if mask[top : top + side, left : left + side].any():
            return left, top, side
    # A small object in a large picture: move the square to where one of its pixels is in the middle.
    rows, columns = np.nonzero(mask)
    pixel = int(generator.integers(len(rows)))
    left = min(max(0, int(columns[pixel]) - side // 2), width - side)
    top = min(max(0, int(rows[pixel]) - side // 2), height - side)
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


def number_of_name(name: str) -> int:
    """A number that stands for a sample's name, the same on every machine."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big")


@dataclass(frozen=True)
class Crop:
    """A crop `pixels` `[3, H, W]` in [-1, 1], its `masks` `[M, 1, H, W]` of 0 and 1, and the category's number."""

    pixels: torch.Tensor
    masks: torch.Tensor
    category: int

    def sample(self, skipped: list[str]) -> dict:
        """What a batch is made of, with the names of the unreadable pictures that were met on the way to it."""
        category = torch.tensor(self.category)
        return {"pixel_values": self.pixels, "mask": self.masks[0], "category": category, "skipped": skipped}


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
    """

    resolution: int
    mask_presets: Sequence[str]
    seed: int = 0
    random_flip: bool = True
    crop_scale: tuple[float, float] = CROP_SCALE

    def __post_init__(self):
        if self.resolution < 8 or self.resolution % 8:
            raise ValueError(f"`resolution` must be a positive multiple of 8, but is {self.resolution}.")

    def __call__(
        self,
        picture: Picture,
        number: tuple[int, ...],
        num_masks: int,
        object_mask: Callable[[np.random.Generator], np.ndarray | None] | None = None,
    ) -> Crop:
        """A crop of a picture, which depends on `seed` and the sample's number alone."""
        generator = np.random.default_rng((self.seed, *number))
        own, category = picture.mask, picture.category
        # As the release trains: a background sample has a random mask half of the time and its own otherwise.
        if own is not None and category == CATEGORIES["background"] and generator.random() < 0.5:
            own = None
        size, side = picture.image.size, self.resolution
        if own is None:
            box = random_box(size, generator, self.crop_scale)
        else:
            box = box_with_mask(own, generator, self.crop_scale)
        flip = generator.random() < 0.5 and self.random_flip
        corners = (box[0], box[1], box[0] + box[2], box[1] + box[2])
        image = picture.image.resize((side, side), Image.Resampling.LANCZOS, box=corners)
        masks = []
        for _ in range(num_masks):
            if own is not None:
                mask = crop_mask(own, box, side, flip)
            else:
                mask = random_mask(side, side, str(generator.choice(self.mask_presets)), generator)
            # Half of the background holes have the outline of another picture's object.
            if category == CATEGORIES["background"] and object_mask is not None and generator.random() < 0.5:
                other = object_mask(generator)
                if other is not None and (mask & other).any():
                    mask = mask & other
            masks.append(mask)
        pixels = picture_to_tensor(ImageOps.mirror(image) if flip else image)
        return Crop(pixels, torch.from_numpy(np.stack(masks))[:, None].float(), category)


class PictureDataset(torch.utils.data.Dataset):
    """
    Random crops with random holes, in pixels.

    A sample is a `dict` with `pixel_values` `[3, H, W]` in [-1, 1], `mask` `[1, H, W]` of 0 and 1 (1 is to be filled),
    `category`, a scalar: 0 background, 1 foreground, -1 not given; and `skipped`, names of unreadable pictures. The
    place of one of these is taken by another picture, which `seed` and the index choose: batches keep their size.

    An index beyond the number of pictures means another epoch: the same picture with other crops and holes.

    Args:
        reader ([`PictureReader`]): Where the pictures come from.
        cropper ([`Cropper`]): Cuts them.
    """

    def __init__(self, reader: PictureReader, cropper: Cropper):
        self.reader, self.cropper = reader, cropper

    def __len__(self) -> int:
        return len(self.reader)

    @property
    def description(self) -> str:
        """How much there is, for caches."""
        return f"{len(self):,} pictures"

    def _object_mask(self, generator: np.random.Generator) -> np.ndarray | None:
        index = self.reader.object_indices[int(generator.integers(len(self.reader.object_indices)))]
        picture = self.reader.read_picture(index)
        if picture is None:
            return None
        size = (self.cropper.resolution,) * 2
        return np.asarray(Image.fromarray(picture.mask).resize(size, Image.Resampling.NEAREST))

    def crop(self, index: int, num_masks: int) -> Crop | None:
        """A crop with so many masks; `None` for an unreadable file."""
        epoch, index = divmod(index, len(self))
        picture = self.reader.read_picture(index)
        if picture is None:
            return None
        return self.cropper(
            picture, (epoch, index), num_masks, self._object_mask if self.reader.object_indices else None
        )

    def __getitem__(self, index: int) -> dict:
        epoch, first = divmod(index, len(self))
        start = int(np.random.default_rng((self.cropper.seed, epoch, first, 1)).integers(len(self)))
        skipped: list[str] = []
        for other in (first, *((start + offset) % len(self) for offset in range(len(self)))):
            if (crop := self.crop(epoch * len(self) + other, 1)) is not None:
                return crop.sample(skipped)
            if self.reader.records[other].name not in skipped:
                skipped.append(self.reader.records[other].name)
        raise_unreadable(len(self), skipped)

    # What a latent cache is built from: units that are done as a whole.
    @property
    def num_cache_units(self) -> int:
        return -(-len(self) // CACHE_UNIT)

    def cache_unit(self, unit: int, epoch: int, num_masks: int) -> Iterator[partial]:
        for index in range(unit * CACHE_UNIT, min((unit + 1) * CACHE_UNIT, len(self))):
            yield partial(self.crop, epoch * len(self) + index, num_masks)


def raise_unreadable(number: int, skipped: Sequence[str]) -> None:
    """Raises the error of a source in which nothing can be read."""
    raise ValueError(
        f"The training data hold no readable picture: all {number} were skipped, among them {', '.join(skipped[-3:])}."
    )
