"""Random crops of pictures with their holes: what a training sample is."""

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageOps

from .masks import random_mask
from .picture_sources import CATEGORIES, Picture, Record, read_picture

CROP_SCALE = (0.35, 1.0)
CACHE_UNIT = 100  # pictures in a shard of a latent cache


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
        side, box = self.resolution, random_box(picture.image.size, generator, self.crop_scale, own)
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
        records (`list[Record]`): The pictures.
        cropper ([`Cropper`]): Cuts them.
    """

    def __init__(self, records: list[Record], cropper: Cropper):
        self.records, self.cropper = records, cropper
        self.objects = [record for record in records if record.category == CATEGORIES["foreground"]]

    def __len__(self) -> int:
        return len(self.records)

    def _object_mask(self, generator: np.random.Generator) -> np.ndarray | None:
        picture = read_picture(self.objects[int(generator.integers(len(self.objects)))])
        if picture is None:
            return None
        size = (self.cropper.resolution,) * 2
        return np.asarray(Image.fromarray(picture.mask).resize(size, Image.Resampling.NEAREST))

    def crop(self, index: int, num_masks: int) -> Crop | None:
        """A crop with so many masks; `None` for an unreadable file."""
        epoch, index = divmod(index, len(self))
        picture = read_picture(self.records[index])
        if picture is None:
            return None
        return self.cropper(picture, (epoch, index), num_masks, self._object_mask if self.objects else None)

    def __getitem__(self, index: int) -> dict:
        epoch, first = divmod(index, len(self))
        start = int(np.random.default_rng((self.cropper.seed, epoch, first, 1)).integers(len(self)))
        skipped: list[str] = []
        for other in (first, *((start + offset) % len(self) for offset in range(len(self)))):
            if (crop := self.crop(epoch * len(self) + other, 1)) is not None:
                return crop.sample(skipped)
            if self.records[other].name not in skipped:
                skipped.append(self.records[other].name)
        raise_unreadable(len(self), skipped)

    # What a latent cache is built from: units that are done as a whole.
    @property
    def num_cache_units(self) -> int:
        return -(-len(self) // CACHE_UNIT)

    def cache_unit(self, unit: int, epoch: int, num_masks: int) -> Iterator[Crop | None]:
        for index in range(unit * CACHE_UNIT, min((unit + 1) * CACHE_UNIT, len(self))):
            yield self.crop(epoch * len(self) + index, num_masks)


def raise_unreadable(number: int, skipped: Sequence[str]) -> None:
    """Raises the error of a source in which nothing can be read."""
    raise ValueError(
        f"The training data hold no readable picture: all {number} were skipped, among them {', '.join(skipped[-3:])}."
    )
