"""Random crops of pictures with their holes: what a training sample is."""

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
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
    """
    Draws a square inside a picture.

    Args:
        size (`tuple[int, int]`): Width and height of the picture.
        generator (`np.random.Generator`): Source of randomness.
        scale (`tuple[float, float]`, defaults to `(0.35, 1.0)`): Range of the square's area, as a share of the largest
            square that fits.

    Returns:
        `tuple[int, int, int]`: Left, top and side in pixels.
    """
    side = max(1, round(min(size) * math.sqrt(generator.uniform(*scale))))
    left = int(generator.integers(0, size[0] - side, endpoint=True))
    top = int(generator.integers(0, size[1] - side, endpoint=True))
    return left, top, side


def _cut(image: Image.Image, box: tuple[int, int, int], resolution: int, flip: bool) -> Image.Image:
    left, top, side = box
    image = image.resize((resolution, resolution), Image.Resampling.LANCZOS, box=(left, top, left + side, top + side))
    return ImageOps.mirror(image) if flip else image


def box_with_mask(
    mask: np.ndarray, generator: np.random.Generator, scale: tuple[float, float] = CROP_SCALE
) -> tuple[int, int, int]:
    """
    Draws a square inside a picture that shows a part of its mask.

    Args:
        mask (`np.ndarray` of shape `[H, W]`): Not empty.
        generator (`np.random.Generator`): Source of randomness.
        scale (`tuple[float, float]`, defaults to `(0.35, 1.0)`): See [`random_box`].

    Returns:
        `tuple[int, int, int]`: Left, top and side in pixels.
    """
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


class Crops:
    """What all data sets of pictures with holes have in common."""

    def __init__(
        self,
        resolution: int,
        mask_presets: Sequence[str],
        seed: int,
        random_flip: bool = True,
        crop_scale: tuple[float, float] = CROP_SCALE,
    ):
        if resolution < 8 or resolution % 8:
            raise ValueError(f"`resolution` must be a positive multiple of 8, but is {resolution}.")
        self.resolution, self.mask_presets, self.seed = resolution, tuple(mask_presets), seed
        self.random_flip, self.crop_scale = random_flip, crop_scale

    def crop_picture(
        self,
        picture: Picture,
        generator: np.random.Generator,
        num_masks: int,
        object_mask: Callable[[np.random.Generator], np.ndarray | None] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, int]:
        """One crop `[3, H, W]` with masks `[M, 1, H, W]` and the category's number."""
        own, category = picture.mask, picture.category
        # As the release trains: a background sample has a random mask half of the time and its own otherwise.
        if own is not None and category == CATEGORIES["background"] and generator.random() < 0.5:
            own = None
        size, scale = picture.image.size, self.crop_scale
        box = random_box(size, generator, scale) if own is None else box_with_mask(own, generator, scale)
        flip = generator.random() < 0.5 and self.random_flip
        pixels = picture_to_tensor(_cut(picture.image, box, self.resolution, flip))
        masks = []
        for _ in range(num_masks):
            if own is not None:
                mask = crop_mask(own, box, self.resolution, flip)
            else:
                preset = str(generator.choice(self.mask_presets))
                mask = random_mask(self.resolution, self.resolution, preset, generator)
            # Half of the background holes have the outline of another picture's object.
            if category == CATEGORIES["background"] and object_mask is not None and generator.random() < 0.5:
                other = object_mask(generator)
                if other is not None and (mask & other).any():
                    mask = mask & other
            masks.append(mask)
        return pixels, torch.from_numpy(np.stack(masks))[:, None].float(), category


def as_sample(crop: tuple[torch.Tensor, torch.Tensor, int], skipped: list[str]) -> dict:
    """A sample of one crop, with the names of the unreadable pictures that were met on the way to it."""
    return {"pixel_values": crop[0], "mask": crop[1][0], "category": torch.tensor(crop[2]), "skipped": skipped}


def number_of_name(name: str) -> int:
    """A number that stands for a sample's name, the same on every machine."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big")


def raise_unreadable(number: int, skipped: Iterable[str]) -> None:
    """Raises the error of a source in which nothing can be read."""
    examples = ", ".join(list(skipped)[-3:])
    raise ValueError(f"The training data hold no readable picture: all {number} were skipped, among them {examples}.")


class PictureDataset(Crops, torch.utils.data.Dataset):
    """
    Random crops with random holes, in pixels.

    A sample is a `dict` with `pixel_values` `[3, H, W]` in [-1, 1], `mask` `[1, H, W]` of 0 and 1 (1 is to be filled),
    `category`, a scalar: 0 background, 1 foreground, -1 not given; and `skipped`, names of unreadable pictures. The
    place of one of these is taken by another picture, which `seed` and the index choose: batches keep their size.

    The hole of a foreground picture is its own mask. A background picture has its own mask half of the time, if it has
    one, and a random one otherwise; half of its holes are cut to the outline of a foreground picture's mask, if there
    are any. A picture without category has its own mask, or a random one if it has none.

    Args:
        reader ([`PictureReader`]): Where the pictures come from.
        resolution (`int`): Side of a crop in pixels, a multiple of 8.
        mask_presets (sequence of `str`): Names of the mask presets to draw from, in equal shares.
        seed (`int`, defaults to 0): Crops and holes depend on `seed` and the index alone. An index beyond the number
            of pictures means another epoch: the same picture with other crops and holes.
        random_flip (`bool`, defaults to `True`): Mirror half of the crops.
        crop_scale (`tuple[float, float]`, defaults to `(0.35, 1.0)`): See [`random_box`].
    """

    def __init__(
        self,
        reader: PictureReader,
        resolution: int,
        mask_presets: Sequence[str],
        seed: int = 0,
        random_flip: bool = True,
        crop_scale: tuple[float, float] = CROP_SCALE,
    ):
        super().__init__(resolution, mask_presets, seed, random_flip, crop_scale)
        self.reader = reader

    def __len__(self) -> int:
        return len(self.reader)

    @property
    def description(self) -> str:
        """How much there is, for model cards and caches."""
        return f"{len(self):,} pictures"

    def _object_mask(self, generator: np.random.Generator) -> np.ndarray | None:
        index = self.reader.object_indices[int(generator.integers(len(self.reader.object_indices)))]
        picture = self.reader.read_picture(index)
        if picture is None:
            return None
        mask = Image.fromarray(picture.mask).resize((self.resolution, self.resolution), Image.Resampling.NEAREST)
        return np.asarray(mask)

    def crop(self, index: int, num_masks: int) -> tuple[torch.Tensor, torch.Tensor, int] | None:
        """A crop `[3, H, W]`, `num_masks` masks `[M, 1, H, W]` and the category; `None` for an unreadable file."""
        epoch, index = divmod(index, len(self))
        picture = self.reader.read_picture(index)
        if picture is None:
            return None
        generator = np.random.default_rng((self.seed, epoch, index))
        return self.crop_picture(
            picture, generator, num_masks, self._object_mask if self.reader.object_indices else None
        )

    def __getitem__(self, index: int) -> dict:
        epoch, first = divmod(index, len(self))
        start = int(np.random.default_rng((self.seed, epoch, first, 1)).integers(len(self)))
        skipped: list[str] = []
        for other in (first, *((start + offset) % len(self) for offset in range(len(self)))):
            if (crop := self.crop(epoch * len(self) + other, 1)) is not None:
                return as_sample(crop, skipped)
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
