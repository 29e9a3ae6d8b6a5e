"""Random crops of pictures with their holes: what a training sample is, from files or from streams."""

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np
import torch
from PIL import Image, ImageOps

from .masks import random_mask
from .picture_sources import (
    CATEGORIES,
    UNREADABLE,
    MaskError,
    Picture,
    PictureReader,
    check_some_readable,
    decode_mask,
    decode_picture,
)
from .shard_streams import ShardStream, StreamedSample, StreamPosition, number_of_name, read_shard

logger = logging.getLogger(__name__)
CROP_SCALE = (0.35, 1.0)
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


def random_resized_crop(
    image: Image.Image, resolution: int, generator: np.random.Generator, scale: tuple[float, float] = CROP_SCALE
) -> Image.Image:
    """
    Cuts a random square out of a picture, flips it half of the time and resizes it.

    Args:
        image (`PIL.Image.Image`): The picture.
        resolution (`int`): Side of the result in pixels.
        generator (`np.random.Generator`): Source of randomness.
        scale (`tuple[float, float]`, defaults to `(0.35, 1.0)`): See [`random_box`].

    Returns:
        `PIL.Image.Image` of `resolution` × `resolution`.
    """
    return _cut(image, random_box(image.size, generator, scale), resolution, flip=generator.random() < 0.5)


def box_with_mask(mask: np.ndarray, generator: np.random.Generator) -> tuple[int, int, int]:
    """
    Draws a square inside a picture that shows a part of its mask.

    Args:
        mask (`np.ndarray` of shape `[H, W]`): Not empty.
        generator (`np.random.Generator`): Source of randomness.

    Returns:
        `tuple[int, int, int]`: Left, top and side in pixels.
    """
    height, width = mask.shape
    for _ in range(BOX_TRIES):
        left, top, side = random_box((width, height), generator)
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


class _Crops:
    """What all data sets of pictures with holes have in common."""

    def __init__(self, resolution: int, mask_presets: Sequence[str], seed: int):
        if resolution < 8 or resolution % 8:
            raise ValueError(f"`resolution` must be a positive multiple of 8, but is {resolution}.")
        self.resolution, self.mask_presets, self.seed = resolution, tuple(mask_presets), seed

    def _crop_picture(
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
        box = random_box(picture.image.size, generator) if own is None else box_with_mask(own, generator)
        flip = generator.random() < 0.5
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


def _as_sample(crop: tuple[torch.Tensor, torch.Tensor, int]) -> dict[str, torch.Tensor]:
    return {"pixel_values": crop[0], "mask": crop[1][0], "category": torch.tensor(crop[2])}


class PictureDataset(_Crops, torch.utils.data.Dataset):
    """
    Random crops with random holes, in pixels.

    A sample is a `dict` with `pixel_values` `[3, H, W]` in [-1, 1], `mask` `[1, H, W]` of 0 and 1 (1 is to be filled)
    and `category`, a scalar: 0 background, 1 foreground, -1 not given.

    The hole of a foreground picture is its own mask. A background picture has its own mask half of the time, if it has
    one, and a random one otherwise; half of its holes are cut to the outline of a foreground picture's mask, if there
    are any. A picture without category has its own mask, or a random one if it has none.

    Args:
        reader ([`PictureReader`]): Where the pictures come from.
        resolution (`int`): Side of a crop in pixels, a multiple of 8.
        mask_presets (sequence of `str`): Names of the mask presets to draw from, in equal shares.
        seed (`int`, defaults to 0): Crops and holes depend on `seed` and the index alone. An index beyond the number
            of pictures means another epoch: the same picture with other crops and holes.
    """

    def __init__(self, reader: PictureReader, resolution: int, mask_presets: Sequence[str], seed: int = 0):
        super().__init__(resolution, mask_presets, seed)
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

    def crop_with_category(self, index: int, num_masks: int) -> tuple[torch.Tensor, torch.Tensor, int] | None:
        """A crop `[3, H, W]`, `num_masks` masks `[M, 1, H, W]` and the category; `None` for an unreadable file."""
        epoch, index = divmod(index, len(self))
        picture = self.reader.read_picture(index)
        if picture is None:
            return None
        generator = np.random.default_rng((self.seed, epoch, index))
        object_mask = self._object_mask if self.reader.object_indices else None
        return self._crop_picture(picture, generator, num_masks, object_mask)

    def crop(self, index: int, num_masks: int) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Returns one crop `[3, H, W]` with `num_masks` masks `[M, 1, H, W]`, or `None` for an unreadable file."""
        crop = self.crop_with_category(index, num_masks)
        return crop[:2] if crop is not None else None

    def sample(self, index: int) -> tuple[dict[str, torch.Tensor], list[str]]:
        """
        Returns one sample, and the names of the unreadable files that were met on the way.

        So that batches keep their size, the place of an unreadable picture is taken by another one, which `seed` and
        the index choose.
        """
        crop = self.crop_with_category(index, 1)
        if crop is not None:
            return _as_sample(crop), []
        epoch, first = divmod(index, len(self))
        skipped = [self.reader.records[first].name]
        start = int(np.random.default_rng((self.seed, epoch, first, 1)).integers(len(self)))
        for other in range(start, start + len(self)):
            other = other % len(self)
            if other == first:
                continue
            crop = self.crop_with_category(epoch * len(self) + other, 1)
            if crop is not None:
                return _as_sample(crop), skipped
            skipped.append(self.reader.records[other].name)
        check_some_readable(len(self), skipped)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return self.sample(index)[0]

    # What a latent cache is built from: units that are done as a whole.
    def num_cache_units(self, shard_size: int) -> int:
        return -(-len(self) // shard_size)

    def cache_unit(self, unit: int, epoch: int, num_masks: int, shard_size: int) -> Iterator[Callable]:
        for index in range(unit * shard_size, min((unit + 1) * shard_size, len(self))):
            yield partial(self.crop_with_category, epoch * len(self) + index, num_masks)

    def cache_part_suffix(self, part: int) -> str:
        return ""


class StreamedPictureDataset(_Crops):
    """
    Random crops with random holes from tar shards that are read as streams; samples as in [`PictureDataset`].

    Crops and holes depend on `seed`, the epoch and the sample's name (its shard's URL and its name there) alone.

    Args:
        shards (sequence of `str`): Paths, `http(s)://` or `hf://` URLs; see [`expand_shards`].
        resolution (`int`): Side of a crop in pixels, a multiple of 8.
        mask_presets (sequence of `str`): Names of the mask presets to draw from, in equal shares.
        seed (`int`, defaults to 0): Seed of order, crops and holes.
        shuffle_buffer_size (`int`, defaults to 1000): Samples, as files, that each reader holds and shuffles.
    """

    def __init__(
        self,
        shards: Sequence[str],
        resolution: int,
        mask_presets: Sequence[str],
        seed: int = 0,
        shuffle_buffer_size: int = 1000,
    ):
        super().__init__(resolution, mask_presets, seed)
        if shuffle_buffer_size < 1:
            raise ValueError(f"`shuffle_buffer_size` must be at least 1, but is {shuffle_buffer_size}.")
        self.shards, self.shuffle_buffer_size = list(shards), shuffle_buffer_size

    @property
    def description(self) -> str:
        """How much there is, for model cards and caches."""
        return f"{len(self.shards):,} streamed shards"

    def crop_sample(
        self, sample: StreamedSample, epoch: int, num_masks: int
    ) -> tuple[torch.Tensor, torch.Tensor, int] | None:
        """A crop `[3, H, W]`, `num_masks` masks `[M, 1, H, W]` and the category; `None` if it is unreadable."""
        try:
            image = decode_picture(sample.picture)
            mask = decode_mask(sample.mask, image.size, sample.name) if sample.mask is not None else None
        except UNREADABLE as error:
            logger.warning("skipped, unreadable: %s: %s", sample.name, error)
            return None
        except MaskError as error:
            raise ValueError(str(error)) from None
        generator = np.random.default_rng((self.seed, epoch, number_of_name(sample.name)))
        return self._crop_picture(Picture(image, mask, sample.category), generator, num_masks)

    def samples(
        self, position: StreamPosition, num_readers: int
    ) -> Iterator[tuple[dict[str, torch.Tensor], list[str], StreamPosition]]:
        """Yields samples without end, with the names of what was skipped before each and the position behind it."""
        stream = ShardStream(self.shards, self.seed, self.shuffle_buffer_size, position, num_readers)
        skipped: list[str] = []
        fruitless = 0
        for epoch, sample in stream:
            skipped += stream.lost
            stream.lost.clear()
            if sample is None:
                fruitless += 1
                if fruitless > len(self.shards):
                    check_some_readable(len(skipped), skipped)
                continue
            crop = self.crop_sample(sample, epoch, 1)
            if crop is None:
                skipped.append(sample.name)
                continue
            fruitless = 0
            yield _as_sample(crop), skipped, stream.position
            skipped = []

    # What a latent cache is built from: units that are done as a whole.
    def num_cache_units(self, shard_size: int) -> int:
        return len(self.shards)

    def cache_unit(self, unit: int, epoch: int, num_masks: int, shard_size: int) -> Iterator[Callable]:
        for sample in read_shard(self.shards[unit]):
            yield partial(self.crop_sample, sample, epoch, num_masks)

    def cache_part_suffix(self, part: int) -> str:
        return f"-{part:05d}"
