"""Training data: opens any source, and makes batches whose order can be resumed."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import astuple
from pathlib import Path

import torch

from .picture_datasets import PictureDataset, StreamedPictureDataset
from .picture_sources import PictureReader, is_url, load_hub_table
from .shard_streams import StreamPosition, expand_shards

logger = logging.getLogger(__name__)


class ResumableBatchSampler(torch.utils.data.Sampler):
    """
    Shuffled batches of indices without end.

    Batch `i` depends on `seed` and `i` alone, so that a resumed run goes on exactly where it stopped.
    Indices grow by `num_samples` with every epoch, which tells the data set which epoch it is.

    Args:
        num_samples (`int`): Samples of an epoch; the remainder that fills no batch is left out.
        batch_size (`int`): Samples in a batch of one process.
        seed (`int`): Seed of the order.
        first_batch (`int`, defaults to 0): Number of batches of this process to leave out at the start.
        process_index (`int`, defaults to 0): Rank of this process; batches are dealt out in turn.
        num_processes (`int`, defaults to 1): Number of processes.
    """

    def __init__(
        self,
        num_samples: int,
        batch_size: int,
        seed: int,
        first_batch: int = 0,
        process_index: int = 0,
        num_processes: int = 1,
    ):
        if batch_size < 1 or batch_size > num_samples:
            raise ValueError(
                f"`batch_size` must be from 1 to the number of samples {num_samples}, but is {batch_size}."
            )
        self.num_samples, self.batch_size, self.seed = num_samples, batch_size, seed
        self.first_batch, self.process_index, self.num_processes = first_batch, process_index, num_processes

    def __iter__(self) -> Iterator[list[int]]:
        per_epoch = self.num_samples // self.batch_size
        batch = self.first_batch * self.num_processes + self.process_index
        order_epoch = order = None
        while True:
            epoch, position = divmod(batch, per_epoch)
            if epoch != order_epoch:
                generator = torch.Generator().manual_seed(self.seed + epoch)
                order, order_epoch = torch.randperm(self.num_samples, generator=generator), epoch
            indices = order[position * self.batch_size : (position + 1) * self.batch_size]
            yield (indices + epoch * self.num_samples).tolist()
            batch += self.num_processes


def _collate(samples: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}


def _unchanged(value):
    return value


class _ReaderBatches(torch.utils.data.IterableDataset):
    """The batches that one worker makes, with the names of what was skipped and where its reader is then."""

    def __init__(self, owner: "TrainingBatches"):
        self.dataset, self.batch_size, self.seed = owner.dataset, owner.batch_size, owner.seed
        self.first_batch, self.process_index, self.num_processes = (
            owner.first_batch,
            owner.process_index,
            owner.num_processes,
        )
        self.positions = list(owner.positions)
        self.known = owner.known_position

    def __iter__(self) -> Iterator[tuple[dict[str, torch.Tensor], list[str], int, StreamPosition | None]]:
        worker = torch.utils.data.get_worker_info()
        number, count = (worker.id, worker.num_workers) if worker is not None else (0, 1)
        if isinstance(self.dataset, StreamedPictureDataset):
            yield from self._from_stream(number, count)
        else:
            yield from self._from_indices(number, count)

    def _from_indices(self, worker: int, num_workers: int):
        sampler = ResumableBatchSampler(
            len(self.dataset),
            self.batch_size,
            self.seed,
            self.first_batch,
            self.process_index,
            self.num_processes,
        )
        for number, indices in enumerate(sampler):
            if number % num_workers != worker:
                continue
            if isinstance(self.dataset, PictureDataset):
                pairs = [self.dataset.sample(index) for index in indices]
                yield (
                    _collate([sample for sample, _ in pairs]),
                    [name for _, names in pairs for name in names],
                    0,
                    None,
                )
            else:
                yield _collate([self.dataset[index] for index in indices]), [], 0, None

    def _from_stream(self, worker: int, num_workers: int):
        # The loader asks worker 0 first, whichever reader is due.
        reader = (worker + self.first_batch) % num_workers
        # Without a stored position the reader reads again, and drops, what it has given out before.
        batches_to_drop = 0 if self.known else len(range(reader, self.first_batch, num_workers))
        samples, skipped = [], []
        stream = self.dataset.samples(self.positions[reader], self.num_processes * num_workers)
        for sample, names, position in stream:
            samples.append(sample)
            skipped += names
            if len(samples) == self.batch_size:
                if batches_to_drop:
                    batches_to_drop -= 1
                else:
                    yield _collate(samples), skipped, reader, position
                samples, skipped = [], []


class TrainingBatches:
    """
    The batches of one process from a number on, without end.

    Batches are `dict`s of tensors: `pixel_values` `[B, 3, H, W]` and `mask` `[B, 1, H, W]`, or from a latent cache
    `latents`, `masked_latents` `[B, C, h, w]` and `mask`; and `category` `[B]` (int64: 0 background, 1 foreground, -1
    for the script to draw).

    Batch `i` depends on the seed and `i` alone, whatever the number of workers is. From a stream it depends on the
    numbers of processes and workers too; [`state_dict`] says where its readers are, and with the states of all
    processes a run goes on with the very next sample (as long as no connection failed for good in either run). Without
    states a stream is read again from its start up to there. With states of other numbers of processes or workers it
    goes on behind the furthest reader, and what the others had not read in that epoch is left out.

    Args:
        dataset ([`PictureDataset`], [`StreamedPictureDataset`] or [`LatentCacheDataset`]): The samples.
        batch_size (`int`): Samples in a batch of one process.
        seed (`int`): Seed of the order.
        first_batch (`int`, defaults to 0): Number of the first batch.
        process_index (`int`, defaults to 0): Rank of this process.
        num_processes (`int`, defaults to 1): Number of processes.
        num_workers (`int`, defaults to 0): Worker processes that prepare batches; 0 prepares them in this one.
        states (sequence of `dict`, *optional*): What [`state_dict`] gave in each process, in the order of their ranks.

    Attributes:
        skipped (`dict[str, int]`): What this process could not read and how many times it came by.
    """

    def __init__(
        self,
        dataset,
        batch_size: int,
        seed: int,
        first_batch: int = 0,
        process_index: int = 0,
        num_processes: int = 1,
        num_workers: int = 0,
        states: Sequence[dict] | None = None,
    ):
        self.dataset, self.batch_size, self.seed, self.first_batch = dataset, batch_size, seed, first_batch
        self.process_index, self.num_processes, self.num_workers = process_index, num_processes, num_workers
        self.skipped: dict[str, int] = {}
        self.next_batch = first_batch
        readers = max(1, num_workers)
        self.known_position = bool(states) and bool(states[0]["positions"])
        self.positions: list[StreamPosition] = []
        if isinstance(dataset, StreamedPictureDataset):
            self.positions = [StreamPosition(process_index * readers + reader) for reader in range(readers)]
            if self.known_position:
                self._restore(states)
        elif batch_size < 1 or batch_size > len(dataset):
            raise ValueError(
                f"`batch_size` must be from 1 to the number of samples {len(dataset)}, but is {batch_size}."
            )
        if batch_size < 1:
            raise ValueError(f"`batch_size` must be at least 1, but is {batch_size}.")

    def _restore(self, states: Sequence[dict]) -> None:
        if [len(state["positions"]) for state in states] == [len(self.positions)] * self.num_processes:
            state = states[self.process_index]
            if state["next_batch"] != self.first_batch:
                raise ValueError(
                    f"`states` are those of batch {state['next_batch']}, but `first_batch` is {self.first_batch}."
                )
            self.positions = [StreamPosition(*position) for position in state["positions"]]
            return
        logger.warning("Other numbers of processes or workers: the rest of this round of shards is left out.")
        furthest = max(turn for state in states for turn, _, _ in state["positions"])
        for position in self.positions:
            position.turn += furthest + 1

    def state_dict(self) -> dict:
        """Where this process is, as plain numbers: behind the last batch that was given out."""
        return {"next_batch": self.next_batch, "positions": [list(astuple(position)) for position in self.positions]}

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        loader = torch.utils.data.DataLoader(
            _ReaderBatches(self),
            batch_size=None,
            num_workers=self.num_workers,
            collate_fn=_unchanged,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # the loader draws a seed: leave the run's own generator alone
        )
        for batch, skipped, reader, position in loader:
            for name in skipped:
                self.skipped[name] = self.skipped.get(name, 0) + 1
            self.next_batch += 1
            if position is not None:
                self.positions[reader] = position
            yield batch


def open_training_data(
    resolution: int,
    mask_presets: Sequence[str],
    seed: int,
    train_data_dir: Sequence[str | Path] | None = None,
    train_shards_path_or_url: Sequence[str | Path] | None = None,
    train_metadata: Sequence[str | Path] | None = None,
    dataset_name: str | None = None,
    dataset_config_name: str | None = None,
    dataset_split: str = "train",
    image_column: str = "image",
    stream_shards: bool = False,
    shuffle_buffer_size: int = 1000,
) -> PictureDataset | StreamedPictureDataset:
    """
    Opens the pictures to train on.

    Args:
        resolution (`int`): Side of a crop in pixels.
        mask_presets (sequence of `str`): Names of `MASK_PRESETS`.
        seed (`int`): Seed of crops and holes.
        train_data_dir (sequence of `str`, *optional*): Folders of pictures.
        train_shards_path_or_url (sequence of `str`, *optional*): Tar shards, also as patterns with braces or, of local
            ones, `*`. `http(s)://` and `hf://` URLs are streamed.
        train_metadata (sequence of `str`, *optional*): Files of JSON lines, see [`read_metadata`].
        dataset_name (`str`, *optional*): A data set of the hub or a folder that `datasets` can load.
        dataset_config_name (`str`, *optional*): Its configuration.
        dataset_split (`str`, defaults to `"train"`): Its split.
        image_column (`str`, defaults to `"image"`): Its column of pictures.
        stream_shards (`bool`, defaults to `False`): Stream local shards too, instead of indexing them first.
        shuffle_buffer_size (`int`, defaults to 1000): Samples that each reader of a stream shuffles.

    Returns:
        [`StreamedPictureDataset`] if a URL is among the shards or `stream_shards` is set, else [`PictureDataset`].

    Raises:
        ValueError: If no source is given, one does not exist, or a stream is to be mixed with other sources.
    """
    folders, shards, metadata = (
        [*(source or [])] for source in (train_data_dir, train_shards_path_or_url, train_metadata)
    )
    if not (folders or shards or metadata or dataset_name):
        raise ValueError(
            "One of `train_data_dir`, `train_shards_path_or_url`, `train_metadata` and `dataset_name` must be given."
        )
    if any(is_url(shard) for shard in shards) or (shards and stream_shards):
        if folders or metadata or dataset_name:
            raise ValueError(
                "Streamed `train_shards_path_or_url` cannot be mixed with `train_data_dir`, `train_metadata` or"
                " `dataset_name`."
            )
        return StreamedPictureDataset(expand_shards(shards), resolution, mask_presets, seed, shuffle_buffer_size)
    for folder in folders:
        if not Path(folder).is_dir():
            raise ValueError(f"`train_data_dir` must be folders, but {str(folder)!r} is none.")
    table = load_hub_table(dataset_name, dataset_config_name, dataset_split, image_column) if dataset_name else None
    reader = PictureReader([*folders, *shards], metadata, table, image_column)
    return PictureDataset(reader, resolution, mask_presets, seed)
