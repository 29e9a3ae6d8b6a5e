"""
WebDataset tar shards as streams, from disk or by URL: read once from front to back, never stored whole.

`datasets` opens the shards and StatefulDataLoader keeps the place of every worker. What is ours is the loop over the
members of a shard: that of `datasets` ends at the first broken shard and resumes a shuffled stream without what was in
its buffer, and `webdataset` keeps no place at all.
"""

import logging
import tarfile
from collections.abc import Iterator

import numpy as np
import torch

from .crops import Crop, Cropper, number_of_name, raise_unreadable
from .picture_sources import MASK_SUFFIX, Record, is_picture, read_picture, shard_record

logger = logging.getLogger(__name__)


class ShardError(Exception):
    """A shard, or the rest of it, that could not be read."""


class _StrictTarInfo(tarfile.TarInfo):
    """The standard reader takes a broken header behind the first one for the end of the archive, without a word."""

    @classmethod
    def fromtarfile(cls, archive):
        try:
            return super().fromtarfile(archive)
        except (tarfile.TruncatedHeaderError, tarfile.InvalidHeaderError) as error:
            raise tarfile.ReadError(f"broken at byte {archive.offset}: {error}") from error


def read_shard(shard: str) -> Iterator[Record]:
    """
    Reads the samples of a shard in order; `datasets` opens URLs, with the token of the hub and its retries.

    Members of one sample (`KEY.jpg`, `KEY.json`, `KEY.mask.png`) follow each other, as WebDataset has it.

    Args:
        shard (`str`): Path or URL: `http(s)://`, or `hf://[datasets/]owner/name[@revision]/path`.

    Raises:
        ShardError: When the rest cannot be read.
    """
    from datasets.utils.file_utils import xopen

    try:
        with xopen(shard, "rb") as file, tarfile.open(fileobj=file, mode="r|", tarinfo=_StrictTarInfo) as archive:
            key, members = None, {}
            for member in archive:
                # A stream keeps no members: a shard of a million would fill the memory with their headers.
                archive.members = []
                folder, _, name = member.name.rpartition("/")
                if not member.isfile() or not (is_picture(name) or name.endswith((MASK_SUFFIX, ".json"))):
                    continue
                if (folder, name.partition(".")[0]) != key:
                    yield from (shard_record(shard, name, members) for name in members if is_picture(name))
                    key, members = (folder, name.partition(".")[0]), {}
                members[member.name] = archive.extractfile(member).read()
            yield from (shard_record(shard, name, members) for name in members if is_picture(name))
    except (tarfile.TarError, OSError, EOFError) as error:
        raise ShardError(f"{shard}: {type(error).__name__}: {error}") from error


class StreamedPictureDataset(torch.utils.data.IterableDataset):
    """
    An endless stream of random crops with random holes from tar shards; samples as in [`PictureDataset`].

    The shards of all epochs form one sequence, each epoch in another order; reader `r` of `R` (the workers of all
    processes) reads numbers `r`, `r + R`, `r + 2R` and so on. So each shard is read by exactly one reader in each
    epoch. Samples are shuffled in blocks of the same shard. Crops and holes depend on the seed, the epoch and the
    sample's name (its shard's URL and its name there) alone.

    A loader that keeps state stores `state_dict`, the place of its worker: number of the shard and samples given.

    Args:
        shards (`list[str]`): Paths, `http(s)://` or `hf://` URLs; see [`expand_shards`].
        cropper ([`Cropper`]): Cuts the pictures; its seed is that of the order too.
        shuffle_buffer_size (`int`, defaults to 1000): Samples, as files, that each reader holds and shuffles; 1 leaves
            their order.
        process_index (`int`, defaults to 0): Rank of this process.
        num_processes (`int`, defaults to 1): Number of processes.
    """

    def __init__(
        self,
        shards: list[str],
        cropper: Cropper,
        shuffle_buffer_size: int = 1000,
        process_index: int = 0,
        num_processes: int = 1,
    ):
        if shuffle_buffer_size < 1:
            raise ValueError(f"`shuffle_buffer_size` must be at least 1, but is {shuffle_buffer_size}.")
        self.shards, self.cropper, self.shuffle_buffer_size = shards, cropper, shuffle_buffer_size
        self.process_index, self.num_processes = process_index, num_processes
        self.turn: int | None = None  # number of the shard in the sequence over all epochs
        self.given = 0  # samples of that shard that have been given out, readable or not

    def state_dict(self) -> dict:
        return {"turn": self.turn, "given": self.given}

    def load_state_dict(self, state: dict) -> None:
        self.turn, self.given = state["turn"], state["given"]

    def crop_record(self, record: Record, epoch: int, num_masks: int) -> Crop | None:
        """A crop with so many masks; `None` if it is unreadable."""
        picture = read_picture(record)
        return picture and self.cropper(picture, (epoch, number_of_name(record.name)), num_masks)

    def _blocks(self, shard: str, lost: list[str]) -> Iterator[list[Record]]:
        block: list[Record] = []
        try:
            for record in read_shard(shard):
                block.append(record)
                if len(block) == self.shuffle_buffer_size:
                    yield block
                    block = []
        except ShardError as error:
            logger.warning("skipped the rest of a shard: %s", error)
            lost.append(str(error))
        yield block

    def __iter__(self) -> Iterator[dict]:
        worker = torch.utils.data.get_worker_info()
        number, count = (worker.id, worker.num_workers) if worker is not None else (0, 1)
        if self.turn is None:
            self.turn = self.process_index + self.num_processes * number
        seed = self.cropper.seed
        skipped: list[str] = []  # since the last sample
        fruitless = 0  # shards since then
        while fruitless <= len(self.shards):
            epoch, position = divmod(self.turn, len(self.shards))
            shard = self.shards[np.random.default_rng((seed, epoch)).permutation(len(self.shards))[position]]
            first = 0
            for block in self._blocks(shard, skipped):
                order = np.random.default_rng((seed, self.turn, first)).permutation(len(block))
                for index in range(max(0, self.given - first), len(block)):
                    self.given = first + index + 1
                    record = block[order[index]]
                    if (crop := self.crop_record(record, epoch, 1)) is None:
                        skipped.append(record.name)
                        continue
                    yield crop.sample(skipped)
                    skipped, fruitless = [], 0
                first += len(block)
            self.turn, self.given = self.turn + self.num_processes * count, 0
            fruitless += 1
        raise_unreadable(len(skipped), skipped)

    # What a latent cache is built from: units that are done as a whole.
    @property
    def num_cache_units(self) -> int:
        return len(self.shards)

    def cache_unit(self, unit: int, epoch: int, num_masks: int) -> Iterator[Crop | None]:
        for record in read_shard(self.shards[unit]):
            yield self.crop_record(record, epoch, num_masks)
