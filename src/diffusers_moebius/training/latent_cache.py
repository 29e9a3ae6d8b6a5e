"""Latents of pictures with holes: encoded in a step, or once into a cache of safetensors shards."""

import json
import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save
from torch import nn

from ..pictures.files import replace_file
from ..pipelines.latents import encode_latents
from .picture_sources import number_of_name

logger = logging.getLogger(__name__)
CACHE_FORMAT = 2


@torch.no_grad()
def with_latents(
    batch: dict[str, torch.Tensor], vae: nn.Module, generators: torch.Generator | list[torch.Generator]
) -> dict[str, torch.Tensor]:
    """A batch with `latents` and `masked_latents`, encoded from its `pixel_values` if it comes without."""
    if "latents" in batch:
        return batch
    pixels = batch["pixel_values"]
    latents = encode_latents(vae, pixels, generators)
    masked_latents = encode_latents(vae, pixels * (1 - batch["mask"]), generators)
    return batch | {"latents": latents, "masked_latents": masked_latents}


def mask_to_latent_size(mask: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """Resizes `[B, 1, H, W]` masks to latent size by nearest interpolation, as the pipeline does."""
    return F.interpolate(mask.float(), size=tuple(size), mode="nearest")


def hole_at_latent_size(mask: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """Marks every latent cell that the hole touches; `[B, 1, H, W]` to `[B, 1, *size]`."""
    return F.adaptive_max_pool2d(mask.float(), tuple(size))


@torch.no_grad()
def build_latent_cache(
    vae,
    dataset,
    cache_dir: str | Path,
    masks_per_picture: int = 3,
    crops_per_picture: int = 1,
    process_index: int = 0,
    num_processes: int = 1,
) -> None:
    """
    Encodes every crop once whole and once for each of its holes, and writes float16 safetensors shards.

    What is already there is kept, so an interrupted run goes on where it stopped. A shard gets its name when all of it
    is written, and an unfinished cache is refused by [`LatentCacheDataset`].

    Args:
        vae (`AutoencoderKL` or `AutoencoderTiny`): The autoencoder.
        dataset ([`PictureDataset`] or [`StreamedPictureDataset`]): Crops and holes; a shard is made of a hundred
            pictures or of a tar shard.
        cache_dir (`str` or `Path`): Folder for `latents-EEE-NNNNN.safetensors` with `latents` `[N, C, h, w]`,
            `masked_latents` `[N, M, C, h, w]`, `masks` `[N, M, H, W / 8]`, bits packed along the width, and
            `categories` `[N]`; and for `cache.json`, which says how many these will be.
        masks_per_picture (`int`, defaults to 3): Holes M for each crop.
        crops_per_picture (`int`, defaults to 1): Crops of each picture.
        process_index (`int`, defaults to 0): Rank of this process; shards are dealt out in turn.
        num_processes (`int`, defaults to 1): Number of processes that build the same cache.

    Raises:
        ValueError: If the folder holds a cache of other pictures or settings.
    """
    cache_dir, cropper = Path(cache_dir), dataset.cropper
    cache_dir.mkdir(parents=True, exist_ok=True)
    jobs = [(epoch, unit) for epoch in range(crops_per_picture) for unit in range(dataset.num_cache_units)]
    settings = {
        "format": CACHE_FORMAT,
        "resolution": cropper.resolution,
        "seed": cropper.seed,
        "mask_presets": list(cropper.mask_presets),
        "masks_per_picture": masks_per_picture,
        "pictures": len(dataset) if hasattr(dataset, "__len__") else "a stream",
        "shards": len(jobs),
    }
    settings_file = cache_dir / "cache.json"
    existing = json.loads(settings_file.read_text()) if settings_file.exists() else settings
    if existing != settings:
        raise ValueError(f"`cache_dir` {cache_dir} was built with {existing}, but {settings} are asked for.")
    with replace_file(settings_file) as file:
        file.write(json.dumps(settings, indent=2).encode())
    for number in range(process_index, len(jobs), num_processes):
        epoch, unit = jobs[number]
        path = cache_dir / f"latents-{epoch:03d}-{unit:05d}.safetensors"
        if path.exists():
            continue
        shard = {"latents": [], "masked_latents": [], "masks": [], "categories": []}
        for position, (index, record) in enumerate(dataset.cache_unit(unit)):
            crop = cropper(record, (epoch, index), masks_per_picture)
            if crop is None:
                continue
            pixels, masks = crop["pixel_values"].to(vae.device), crop["mask"].to(vae.device)
            # A cache that was interrupted is the same as one that was not, where a posterior is sampled too.
            generator = torch.Generator().manual_seed(number_of_name(f"{cropper.seed}/{path.stem}/{position}"))
            encoded = encode_latents(vae, torch.cat([pixels[None], pixels * (1 - masks)]), generator).half().cpu()
            shard["latents"].append(encoded[0])
            shard["masked_latents"].append(encoded[1:])
            shard["masks"].append(torch.from_numpy(np.packbits(crop["mask"][:, 0].numpy().astype(bool), axis=-1)))
            shard["categories"].append(crop["category"])
        with replace_file(path) as file:
            file.write(save({name: torch.stack(values).contiguous() for name, values in shard.items() if values}))
        logger.info("latent cache: shard %d of %d", number + 1, len(jobs))


class LatentCacheDataset(torch.utils.data.Dataset):
    """
    The crops and holes of a latent cache, held in memory.

    Args:
        cache_dir (`str` or `Path`): A folder that [`build_latent_cache`] wrote.
        max_samples (`int`, *optional*): Only the first so many crops.

    Raises:
        ValueError: If the folder holds no cache, an unfinished one, or one of another format.
    """

    def __init__(self, cache_dir: str | Path, max_samples: int | None = None):
        settings_file = Path(cache_dir) / "cache.json"
        settings = json.loads(settings_file.read_text()) if settings_file.exists() else {"format": None}
        paths = sorted(Path(cache_dir).glob("latents-*.safetensors"))
        shards = [shard for path in paths if (shard := load_file(path))]
        for is_wrong, what in (
            (settings["format"] is None, "holds none: name its pictures too, and it is made"),
            (settings["format"] != CACHE_FORMAT, f"is not of format {CACHE_FORMAT}: make it anew"),
            (len(paths) < settings.get("shards", 0), "is unfinished: name its pictures again, and it is completed"),
            (not shards, "is empty: none of its pictures was readable"),
        ):
            if is_wrong:
                raise ValueError(f"`cache_dir` must be a folder with a latent cache, but {str(cache_dir)!r} {what}.")
        # [N, C, h, w], [N, M, C, h, w], [N, M, H, W / 8], [N]
        self.latents, self.masked_latents, self.masks, self.categories = (
            torch.cat([shard[name] for shard in shards])[:max_samples]
            for name in ("latents", "masked_latents", "masks", "categories")
        )

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
