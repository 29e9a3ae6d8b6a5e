"""Training data: opens any source, and makes batches whose order can be resumed."""

import argparse
import logging
import math
from collections.abc import Iterator
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from .crops import CROP_SCALE, Cropper, PictureDataset
from .latent_cache import LatentCacheDataset, build_latent_cache
from .picture_sources import expand_shards, is_url, list_pictures, read_metadata, read_table
from .shard_streams import StreamedPictureDataset

logger = logging.getLogger(__name__)


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
        skipped (`dict[str, int]`): Names of what could not be read, with how often that was met.

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
        self.skipped: dict[str, int] = {}
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
            for name in batch.pop("skipped"):
                self.skipped[name] = self.skipped.get(name, 0) + 1
            yield batch


def open_pictures(
    args: argparse.Namespace,
    process_index: int = 0,
    num_processes: int = 1,
    crop_scale: tuple[float, float] = CROP_SCALE,
) -> PictureDataset | StreamedPictureDataset:
    """
    Opens the pictures to train on.

    Args:
        args: See `add_picture_arguments`.
        process_index (`int`, defaults to 0): Rank of this process.
        num_processes (`int`, defaults to 1): Number of processes.
        crop_scale (`tuple[float, float]`, defaults to `(0.35, 1.0)`): See [`random_box`].

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
    cropper = Cropper(args.resolution, tuple(args.mask_presets), args.seed, args.random_flip, crop_scale)
    if any(is_url(shard) for shard in shards) or (shards and args.stream_shards):
        if others or args.max_train_samples:
            raise ValueError(
                "Streamed `train_shards_path_or_url` cannot be mixed with `train_data_dir`, `train_metadata`,"
                " `dataset_name` or `max_train_samples`."
            )
        shards = [path for shard in shards for path in expand_shards(shard)]
        return StreamedPictureDataset(shards, cropper, args.shuffle_buffer_size, process_index, num_processes)
    records = list_pictures([*folders, *shards]) + [record for path in metadata for record in read_metadata(path)]
    if args.dataset_name:
        records += read_table(args.dataset_name, args.dataset_config_name, args.dataset_split, args.image_column)
    return PictureDataset(records[: args.max_train_samples], cropper)


def build_dataset(args: argparse.Namespace, vae: nn.Module, accelerator: Accelerator):
    """
    The training data that the arguments name; fills the latent cache first if one is asked for.

    `--num_train_epochs` is turned into `max_train_steps`.
    """
    place = accelerator.process_index, accelerator.num_processes
    sources = (args.train_data_dir, args.train_shards_path_or_url, args.train_metadata, args.dataset_name)
    dataset = None
    if args.cache_latents is None or any(sources):
        dataset = open_pictures(args, *place)
    if args.cache_latents is not None:
        if dataset is not None:
            build_latent_cache(
                vae, dataset, args.cache_latents, args.cache_masks_per_picture, args.cache_crops_per_picture, *place
            )
            accelerator.wait_for_everyone()
        dataset = LatentCacheDataset(args.cache_latents, args.max_train_samples)
    if args.num_train_epochs is not None:
        set_train_steps(args, dataset, accelerator.num_processes)
    return dataset


def set_train_steps(args: argparse.Namespace, dataset, num_processes: int) -> None:
    """Sets `max_train_steps` to that of `--num_train_epochs` passes through the data."""
    if not hasattr(dataset, "__len__"):
        raise ValueError(
            "`--num_train_epochs` needs data of known length, which a stream is not: `--max_train_steps`."
        )
    batches = args.num_train_epochs * (len(dataset) // args.train_batch_size)
    args.max_train_steps = max(1, math.ceil(batches / num_processes / args.gradient_accumulation_steps))


def describe_dataset(args: argparse.Namespace, dataset) -> str:
    """What a run was trained on, for its log and its model card: the number of samples and where they are from."""
    names = [*(args.train_data_dir or []), *(args.train_shards_path_or_url or []), *(args.train_metadata or [])]
    names = [Path(name).name for name in names] + ([args.dataset_name] if args.dataset_name else [])
    size = f"{len(dataset):,} samples" if hasattr(dataset, "__len__") else "a stream of samples"
    return f"{size} from {', '.join(names)}" if names else size
