"""Training data: opens any source, and makes batches whose order can be resumed."""

import argparse
import logging
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from .crops import Cropper
from .latent_cache import LatentCacheDataset, build_latent_cache
from .picture_sources import (
    CATEGORIES,
    Record,
    expand_shards,
    is_url,
    list_pictures,
    number_of_name,
    read_metadata,
    read_shard,
    read_table,
)

logger = logging.getLogger(__name__)
CACHE_UNIT = 100  # pictures in a shard of a latent cache


class PictureDataset(Dataset):
    """
    Random crops with random holes, in pixels: what [`Cropper`] returns, with one mask `[1, H, W]`.

    The place of an unreadable picture is taken by another one, which `seed` and the index choose: batches keep their
    size. A sample's `skipped` has the names of those. An index beyond the number of pictures means another epoch: the
    same picture with other crops and holes.

    Args:
        records (`list[Record]`): The pictures.
        cropper ([`Cropper`]): Cuts them.
    """

    def __init__(self, records: list[Record], cropper: Cropper):
        objects = [record for record in records if record.category == CATEGORIES["foreground"]]
        self.records, self.cropper = records, replace(cropper, objects=objects)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict:
        epoch, first = divmod(index, len(self))
        start = int(np.random.default_rng((self.cropper.seed, epoch, first, 1)).integers(len(self)))
        skipped: list[str] = []
        for other in (first, *((start + offset) % len(self) for offset in range(len(self)))):
            if (crop := self.cropper(self.records[other], (epoch, other))) is not None:
                return crop | {"mask": crop["mask"][0], "skipped": skipped}
            if self.records[other].name not in skipped:
                skipped.append(self.records[other].name)
        raise_unreadable(len(self), skipped)

    # What a latent cache is built from: units that are done as a whole, of records with their numbers.
    @property
    def num_cache_units(self) -> int:
        return -(-len(self) // CACHE_UNIT)

    def cache_unit(self, unit: int) -> Iterator[tuple[int, Record]]:
        first = unit * CACHE_UNIT
        return enumerate(self.records[first : first + CACHE_UNIT], first)


class StreamedPictureDataset(IterableDataset):
    """
    An endless stream of samples, as in [`PictureDataset`], from tar shards that are read once, from front to back.

    The shards of all epochs form one sequence, each epoch in another order; reader `r` of `R` (the workers of all
    processes) reads numbers `r`, `r + R`, `r + 2R` and so on. So each shard is read by exactly one reader in each
    epoch. Samples are shuffled in blocks of the same shard. Crops and holes depend on the seed, the epoch and the
    sample's name (its shard's URL and its name there) alone.

    `datasets` opens the shards and StatefulDataLoader keeps `state_dict`, the place of every worker: number of the
    shard and samples given. The sequence is ours: that of `datasets` 5.2 ends at a truncated shard, takes a broken
    header for the end of one, and resumes without what was in its buffer; `webdataset` keeps no place at all.

    Args:
        shards (`list[str]`): Paths, `http(s)://` or `hf://` URLs; see [`expand_shards`].
        cropper ([`Cropper`]): Cuts the pictures; its seed is that of the order too.
        shuffle_buffer_size (`int`, defaults to 1000): Samples, as files, that each reader holds and shuffles; 1 leaves
            their order.
    """

    def __init__(self, shards: list[str], cropper: Cropper, shuffle_buffer_size: int = 1000):
        self.shards, self.cropper, self.shuffle_buffer_size = shards, cropper, shuffle_buffer_size
        self.process_index, self.num_processes = 0, 1  # set by `TrainingBatches`
        self.turn: int | None = None  # number of the shard in the sequence over all epochs
        self.given = 0  # samples of that shard that have been given out, readable or not

    def state_dict(self) -> dict:
        return {"turn": self.turn, "given": self.given}

    def load_state_dict(self, state: dict) -> None:
        self.turn, self.given = state["turn"], state["given"]

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
            records, first = read_shard(shard, skipped), 0
            while block := list(islice(records, self.shuffle_buffer_size)):
                order = np.random.default_rng((seed, self.turn, first)).permutation(len(block))
                for index in range(max(0, self.given - first), len(block)):
                    self.given = first + index + 1
                    record = block[order[index]]
                    if (crop := self.cropper(record, (epoch, number_of_name(record.name)))) is None:
                        skipped.append(record.name)
                        continue
                    yield crop | {"mask": crop["mask"][0], "skipped": skipped[:]}
                    skipped.clear()  # and no new one: `read_shard` has this one
                    fruitless = 0
                first += len(block)
            self.turn, self.given = self.turn + self.num_processes * count, 0
            fruitless += 1
        raise_unreadable(len(skipped), skipped)

    @property
    def num_cache_units(self) -> int:
        return len(self.shards)

    def cache_unit(self, unit: int) -> Iterator[tuple[int, Record]]:
        return ((number_of_name(record.name), record) for record in read_shard(self.shards[unit], []))


def raise_unreadable(number: int, skipped: Sequence[str]) -> None:
    """Raises the error of a source in which nothing can be read."""
    raise ValueError(
        f"The training data hold no readable picture: all {number} were skipped, among them {', '.join(skipped[-3:])}."
    )


def index_batches(
    num_samples: int, batch_size: int, seed: int, first_batch: int = 0, process_index: int = 0, num_processes: int = 1
) -> Iterator[list[int]]:
    """
    Shuffled batches of indices without end, dealt out to the processes in turn.

    Batch `i` depends on `seed` and `i` alone, so that a resumed run goes on exactly where it stopped. Indices grow by
    `num_samples` with every epoch, which tells the data set which epoch it is; the remainder of an epoch that fills no
    batch is left out.
    """
    per_epoch = num_samples // batch_size
    batch = first_batch * num_processes + process_index
    order_epoch = order = None
    while True:
        epoch, position = divmod(batch, per_epoch)
        if epoch != order_epoch:
            order = torch.randperm(num_samples, generator=torch.Generator().manual_seed(seed + epoch))
            order_epoch = epoch
        yield (order[position * batch_size : (position + 1) * batch_size] + epoch * num_samples).tolist()
        batch += num_processes


def _collate(samples: list[dict]) -> dict:
    skipped = [name for sample in samples for name in sample.pop("skipped", [])]
    return {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]} | {"skipped": skipped}


class TrainingBatches:
    """
    The batches of one process from a number on, without end.

    Batches are `dict`s of tensors: `pixel_values` `[B, 3, H, W]` and `mask` `[B, 1, H, W]`, or from a latent cache
    `latents`, `masked_latents` `[B, C, h, w]` and `mask`; and `category` `[B]` (int64: 0 background, 1 foreground, -1
    for the script to draw).

    Args:
        dataset ([`PictureDataset`], [`LatentCacheDataset`] or [`StreamedPictureDataset`]): The samples.
        batch_size (`int`): Samples in a batch of one process.
        seed (`int`): Seed of the order.
        first_batch (`int`, defaults to 0): Number of the first batch; of a stream, `states` decide.
        process_index (`int`, defaults to 0): Rank of this process.
        num_processes (`int`, defaults to 1): Number of processes.
        num_workers (`int`, defaults to 0): Processes that read for this one.
        states (`list` of one each process, *optional*): What `state_dict` was after `first_batch` batches.

    Attributes:
        skipped (`Counter`): Names of what could not be read, with how often that was met.

    Raises:
        ValueError: If there are fewer samples than a batch has, or `states` of a stream do not fit.
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
        states: list | None = None,
    ):
        self.skipped: Counter[str] = Counter()
        options = {
            "num_workers": num_workers,
            "collate_fn": _collate,
            "pin_memory": torch.cuda.is_available(),
            "generator": torch.Generator(),  # the loader draws a seed: leave the run's own generator alone
        }
        if not isinstance(dataset, IterableDataset):
            if batch_size > len(dataset):
                raise ValueError(
                    f"`--train_batch_size` must be at most the number of samples, {len(dataset)}, but is {batch_size}."
                )
            batches = index_batches(len(dataset), batch_size, seed, first_batch, process_index, num_processes)
            self.loader = DataLoader(dataset, batch_sampler=batches, **options)
            return
        from torchdata.stateful_dataloader import StatefulDataLoader

        dataset.process_index, dataset.num_processes = process_index, num_processes
        self.loader = StatefulDataLoader(dataset, batch_size, **options)
        if not first_batch:
            return
        if states is None or [state["workers"] for state in states] != [num_workers] * num_processes:
            saved = "" if states is None else f"{len(states)} processes with {states[0]['workers']}"
            raise ValueError(
                "A run on a stream goes on with the `--dataloader_num_workers` and the number of processes that it had"
                f" ({saved or 'unknown'}), but there are {num_processes} with {num_workers}."
            )
        self.loader.load_state_dict(states[process_index]["loader"])

    def state_dict(self) -> dict | None:
        """Where this process is in a stream; `None` where the number of batches says it."""
        if not hasattr(self.loader, "state_dict"):
            return None
        return {"workers": self.loader.num_workers, "loader": self.loader.state_dict()}

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        for batch in self.loader:
            self.skipped.update(batch.pop("skipped"))
            yield batch


def open_pictures(args: argparse.Namespace) -> PictureDataset | StreamedPictureDataset:
    """
    Opens the pictures to train on.

    Args:
        args: See `add_picture_arguments`.

    Returns:
        [`StreamedPictureDataset`] if a URL is among the shards or `stream_shards` is set, else [`PictureDataset`].

    Raises:
        ValueError: If no source is given, one does not exist, or a stream is to be mixed with other sources.
    """
    folders, shards, metadata = (
        [*(source or [])] for source in (args.train_data_dir, args.train_shards_path_or_url, args.train_metadata)
    )
    others = folders or metadata or args.dataset_name
    if not (others or shards):
        raise ValueError(
            "One of `train_data_dir`, `train_shards_path_or_url`, `train_metadata` and `dataset_name` must be given."
        )
    crop_scale = (args.min_crop_area, 1.0)
    cropper = Cropper(args.resolution, tuple(args.mask_presets), args.seed, args.random_flip, crop_scale)
    if any(is_url(shard) for shard in shards) or (shards and args.stream_shards):
        if others or args.max_train_samples:
            raise ValueError(
                "Streamed `train_shards_path_or_url` cannot be mixed with `train_data_dir`, `train_metadata`,"
                " `dataset_name` or `max_train_samples`."
            )
        shards = [path for shard in shards for path in expand_shards(shard)]
        return StreamedPictureDataset(shards, cropper, args.shuffle_buffer_size)
    records = list_pictures([*folders, *shards]) + [record for path in metadata for record in read_metadata(path)]
    if args.dataset_name:
        records += read_table(args.dataset_name, args.dataset_config_name, args.dataset_split, args.image_column)
    return PictureDataset(records[: args.max_train_samples], cropper)


def build_dataset(args: argparse.Namespace, accelerator: Accelerator, vae: nn.Module | None = None):
    """
    The training data that the arguments name; with `vae` and `cache_latents` the cache, which is filled first.

    `num_train_epochs` is turned into `max_train_steps`.
    """
    cache = args.cache_latents if vae is not None else None
    sources = (args.train_data_dir, args.train_shards_path_or_url, args.train_metadata, args.dataset_name)
    dataset = open_pictures(args) if cache is None or any(sources) else None
    if cache is not None:
        if dataset is not None:
            place = accelerator.process_index, accelerator.num_processes
            build_latent_cache(vae, dataset, cache, args.cache_masks_per_picture, args.cache_crops_per_picture, *place)
            accelerator.wait_for_everyone()
        dataset = LatentCacheDataset(cache, args.max_train_samples)
    if args.num_train_epochs is not None:
        if isinstance(dataset, IterableDataset):
            raise ValueError("`--num_train_epochs` needs data of known length: for a stream give `--max_train_steps`.")
        batches = args.num_train_epochs * (len(dataset) // args.train_batch_size)
        steps = batches / accelerator.num_processes / args.gradient_accumulation_steps
        args.max_train_steps = max(1, math.ceil(steps))
    return dataset


def describe_dataset(args: argparse.Namespace, dataset) -> str:
    """What a run was trained on, for its log and its model card: the number of samples and where they are from."""
    names = [*(args.train_data_dir or []), *(args.train_shards_path_or_url or []), *(args.train_metadata or [])]
    names = [Path(name).name for name in names] + ([args.dataset_name] if args.dataset_name else [])
    size = f"{len(dataset):,} samples" if hasattr(dataset, "__len__") else "a stream of samples"
    return f"{size} from {', '.join(names)}" if names else size
