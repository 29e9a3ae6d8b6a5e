"""Latents of pictures with holes: encoded in a step, or once into a cache of safetensors shards."""

import json
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from .picture_sources import NO_CATEGORY
from .shard_streams import number_of_name

CACHE_FORMAT = 1


def encode_latents(vae, pixel_values: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
    """
    Encodes pictures into scaled latents.

    Args:
        vae (`AutoencoderKL` or `AutoencoderTiny`): The autoencoder; a posterior is sampled where there is one.
        pixel_values (`torch.Tensor` of shape `[B, 3, H, W]`): Pictures in [-1, 1].
        generator (`torch.Generator`, *optional*): Source of randomness for the posterior.

    Returns:
        `torch.Tensor` of shape `[B, C, H / 8, W / 8]`.
    """
    encoded = vae.encode(pixel_values.to(vae.dtype))
    latents = encoded.latent_dist.sample(generator) if hasattr(encoded, "latent_dist") else encoded.latents
    return latents * vae.config.scaling_factor


def mask_to_latent_size(mask: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """Resizes `[B, 1, H, W]` masks to latent size by nearest interpolation, as the pipeline does."""
    return F.interpolate(mask.float(), size=tuple(size), mode="nearest")


def hole_at_latent_size(mask: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """Marks every latent cell that the hole touches; `[B, 1, H, W]` to `[B, 1, *size]`."""
    return F.adaptive_max_pool2d(mask.float(), tuple(size))


def _save_atomically(tensors: dict[str, torch.Tensor], path: Path) -> None:
    temporary = path.with_suffix(".part")
    save_file(tensors, temporary)
    temporary.replace(path)


def _write_atomically(text: str, path: Path, process_index: int) -> None:
    temporary = path.with_name(f"{path.name}.{process_index}.part")
    temporary.write_text(text)
    temporary.replace(path)


def _encode_shard(vae, samples: list[tuple[str, tuple[torch.Tensor, torch.Tensor, int]]]) -> dict[str, torch.Tensor]:
    shard = {"latents": [], "masked_latents": [], "masks": [], "categories": []}
    for name, (pixels, masks, category) in samples:
        on_device, holes = pixels.to(vae.device), masks.to(vae.device)
        # A cache that was interrupted is the same as one that was not, where a posterior is sampled too.
        generator = torch.Generator().manual_seed(number_of_name(name))
        encoded = encode_latents(vae, torch.cat([on_device[None], on_device * (1 - holes)]), generator)
        shard["latents"].append(encoded[0].half().cpu())
        shard["masked_latents"].append(encoded[1:].half().cpu())
        shard["masks"].append(torch.from_numpy(np.packbits(masks[:, 0].numpy().astype(bool), axis=-1)))
        shard["categories"].append(torch.tensor(category))
    return {name: torch.stack(values).contiguous() for name, values in shard.items()}


@torch.no_grad()
def build_latent_cache(
    vae,
    dataset,
    cache_dir: str | Path,
    masks_per_picture: int = 3,
    crops_per_picture: int = 1,
    shard_size: int = 100,
    process_index: int = 0,
    num_processes: int = 1,
    progress=None,
) -> None:
    """
    Encodes every crop once whole and once for each of its holes, and writes float16 safetensors shards.

    What is already there is kept, so an interrupted run goes on where it stopped. A shard gets its name when all of it
    is written, and an unfinished cache is refused by [`LatentCacheDataset`].

    Args:
        vae (`AutoencoderKL` or `AutoencoderTiny`): The autoencoder.
        dataset ([`PictureDataset`] or [`StreamedPictureDataset`]): Crops and holes.
        cache_dir (`str` or `Path`): Folder for `latents-EEE-NNNNN.safetensors` with `latents` `[N, C, h, w]`,
            `masked_latents` `[N, M, C, h, w]`, `masks` `[N, M, H, W / 8]`, bits packed along the width, and
            `categories` `[N]`. From a stream they are `latents-EEE-NNNNN-PPPPP.safetensors`, parts of each tar shard.
        masks_per_picture (`int`, defaults to 3): Holes M for each crop.
        crops_per_picture (`int`, defaults to 1): Crops of each picture.
        shard_size (`int`, defaults to 100): Pictures in a shard.
        process_index (`int`, defaults to 0): Rank of this process; shards are dealt out in turn.
        num_processes (`int`, defaults to 1): Number of processes that build the same cache.
        progress (callable, *optional*): Called with the number of shards done and the number of shards.
    """
    cache_dir = Path(cache_dir)
    cache_dir.mkdir(parents=True, exist_ok=True)
    settings = {
        "format": CACHE_FORMAT,
        "resolution": dataset.resolution,
        "seed": dataset.seed,
        "mask_presets": list(dataset.mask_presets),
        "masks_per_picture": masks_per_picture,
        "shard_size": shard_size,
        "source": dataset.description,
    }
    settings_file = cache_dir / "cache.json"
    if settings_file.exists():
        existing = json.loads(settings_file.read_text())
        if existing != {name: settings[name] for name in settings if name != "source" or name in existing}:
            raise ValueError(f"`cache_dir` {cache_dir} was built with {existing}, but {settings} are asked for.")
    else:
        _write_atomically(json.dumps(settings, indent=2) + "\n", settings_file, process_index)
    for path in cache_dir.glob("unfinished-*"):  # of an interrupted run with more processes than now
        if int(path.name.rpartition("-")[2]) >= num_processes:
            path.unlink(missing_ok=True)
    unfinished = cache_dir / f"unfinished-{process_index}"
    unfinished.touch()

    jobs = [(epoch, unit) for epoch in range(crops_per_picture) for unit in range(dataset.num_cache_units(shard_size))]
    for number, (epoch, unit) in enumerate(jobs):
        name = f"{epoch:03d}-{unit:05d}"
        if number % num_processes != process_index:
            continue
        done = cache_dir / f"done-{name}"
        if not done.exists() and not (cache_dir / f"latents-{name}.safetensors").exists():
            # A part is known by the numbers of its samples in the unit, readable or not.
            crops = enumerate(dataset.cache_unit(unit, epoch, masks_per_picture, shard_size))
            parts = 0
            for part, numbered in groupby(crops, lambda pair: pair[0] // shard_size):
                path = cache_dir / f"latents-{name}{dataset.cache_part_suffix(part)}.safetensors"
                samples = [
                    (f"{dataset.seed}/{name}/{position}", sample)
                    for position, read in numbered
                    if not path.exists() and (sample := read()) is not None
                ]
                if samples:
                    _save_atomically(_encode_shard(vae, samples), path)
                parts += 1
            _write_atomically(f"{parts} parts\n", done, process_index)
        if progress is not None:
            progress(number + 1, len(jobs))
    unfinished.unlink()


class LatentCacheDataset(torch.utils.data.Dataset):
    """
    The crops and holes of a latent cache, held in memory.

    Args:
        cache_dir (`str` or `Path`): A folder that [`build_latent_cache`] wrote.

    Raises:
        ValueError: If the folder holds no cache, an unfinished one, or one of another format.
    """

    def __init__(self, cache_dir: str | Path):
        cache_dir = Path(cache_dir)
        settings_file = cache_dir / "cache.json"
        shards = sorted(cache_dir.glob("latents-*.safetensors"))
        if not settings_file.exists() or not shards:
            raise ValueError(
                f"`cache_dir` must be a folder with a latent cache, but {str(cache_dir)!r} holds none. (One that was"
                " built of unreadable pictures alone is empty.)"
            )
        self.settings = json.loads(settings_file.read_text())
        if self.settings["format"] != CACHE_FORMAT:
            raise ValueError(f"`cache_dir` must be of format {CACHE_FORMAT}, but is {self.settings['format']}.")
        if any(cache_dir.glob("unfinished-*")):
            raise ValueError(
                f"`cache_dir` {str(cache_dir)!r} is unfinished: name its pictures again, and the cache is completed."
            )
        loaded = [load_file(shard) for shard in shards]
        self.latents = torch.cat([shard["latents"] for shard in loaded])  # [N, C, h, w]
        self.masked_latents = torch.cat([shard["masked_latents"] for shard in loaded])  # [N, M, C, h, w]
        self.masks = torch.cat([shard["masks"] for shard in loaded])  # [N, M, H, W / 8]
        # Caches of the first version have no categories.
        self.categories = torch.cat(
            [shard.get("categories", torch.full(shard["masks"].shape[:1], NO_CATEGORY)) for shard in loaded]
        )  # [N]

    def __len__(self) -> int:
        return self.masks.shape[0] * self.masks.shape[1]

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        picture, number = divmod(index % len(self), self.masks.shape[1])
        mask = np.unpackbits(self.masks[picture, number].numpy(), axis=-1)
        return {
            "latents": self.latents[picture].float(),
            "masked_latents": self.masked_latents[picture, number].float(),
            "mask": torch.from_numpy(mask)[None].float(),
            "category": self.categories[picture],
        }
