"""Pictures from folders and tar shards, random crops with random holes, and a cache of their latents."""

import io
import json
import math
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from safetensors.torch import load_file, save_file

from .masks import random_mask

PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
CACHE_FORMAT = 1


class PictureReader:
    """
    Reads the pictures of image folders and WebDataset tar shards, in a fixed order.

    Files whose name ends in `.mask.png` belong to a picture and are not read as one. A file that is no readable
    picture is skipped and its name kept in `skipped`.

    Args:
        sources (sequence of `str` or `Path`): Folders (searched recursively), `.tar` shards, or glob patterns of them.

    Raises:
        ValueError: If a source does not exist or there is no picture in any of them.
    """

    def __init__(self, sources: Sequence[str | Path]):
        self.files: list[tuple[Path, str | None]] = []  # (file, None) or (shard, member)
        self.skipped: list[str] = []
        for source in sources:
            path = Path(source)
            if path.is_dir():
                self.files += [(file, None) for file in sorted(path.rglob("*")) if self._is_picture(file.name)]
                continue
            shards = [path] if path.is_file() else sorted(path.parent.glob(path.name))
            if not shards:
                raise ValueError(f"`sources` must name folders or tar shards, but {str(source)!r} does not exist.")
            for shard in shards:
                with tarfile.open(shard) as archive:
                    names = [member.name for member in archive if member.isfile()]
                self.files += [(shard, name) for name in names if self._is_picture(name)]
        if not self.files:
            raise ValueError(f"`sources` must hold pictures ({', '.join(PICTURE_SUFFIXES)}), but {sources} do not.")
        self._archives: dict[Path, tarfile.TarFile] = {}

    @staticmethod
    def _is_picture(name: str) -> bool:
        name = name.lower()
        return name.endswith(PICTURE_SUFFIXES) and not name.endswith(".mask.png")

    def __len__(self) -> int:
        return len(self.files)

    def read(self, index: int) -> Image.Image | None:
        """
        Reads one picture.

        Args:
            index (`int`): Position in `files`.

        Returns:
            `PIL.Image.Image` in RGB with its EXIF orientation applied, or `None` if the file is unreadable.
        """
        path, member = self.files[index]
        try:
            if member is None:
                data = path.read_bytes()
            else:
                if path not in self._archives:
                    self._archives[path] = tarfile.open(path)  # noqa: SIM115, stays open for the next picture
                data = self._archives[path].extractfile(member).read()
            return ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
            self.skipped.append(f"{path}/{member}" if member else str(path))
            return None


def random_resized_crop(
    image: Image.Image, resolution: int, generator: np.random.Generator, scale: tuple[float, float] = (0.35, 1.0)
) -> Image.Image:
    """
    Cuts a random square out of a picture, flips it half of the time and resizes it.

    Args:
        image (`PIL.Image.Image`): The picture.
        resolution (`int`): Side of the result in pixels.
        generator (`np.random.Generator`): Source of randomness.
        scale (`tuple[float, float]`, defaults to `(0.35, 1.0)`): Range of the square's area, as a share of the largest
            square that fits.

    Returns:
        `PIL.Image.Image` of `resolution` × `resolution`.
    """
    side = round(min(image.size) * math.sqrt(generator.uniform(*scale)))
    left = int(generator.integers(0, image.width - side, endpoint=True))
    top = int(generator.integers(0, image.height - side, endpoint=True))
    image = image.resize((resolution, resolution), Image.Resampling.LANCZOS, box=(left, top, left + side, top + side))
    return ImageOps.mirror(image) if generator.random() < 0.5 else image


def picture_to_tensor(image: Image.Image) -> torch.Tensor:
    """Turns an RGB picture into a `[3, H, W]` tensor in [-1, 1]."""
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).float() / 127.5 - 1


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


class PictureDataset(torch.utils.data.Dataset):
    """
    Random crops with random holes, in pixels.

    Args:
        reader ([`PictureReader`]): Where the pictures come from.
        resolution (`int`): Side of a crop in pixels, a multiple of 8.
        mask_presets (sequence of `str`): Names of the mask presets to draw from, in equal shares.
        seed (`int`, defaults to 0): Crops and holes depend on `seed` and the index alone. An index beyond the number
            of pictures means another epoch: the same picture with other crops and holes.
    """

    def __init__(self, reader: PictureReader, resolution: int, mask_presets: Sequence[str], seed: int = 0):
        if resolution < 8 or resolution % 8:
            raise ValueError(f"`resolution` must be a positive multiple of 8, but is {resolution}.")
        self.reader, self.resolution, self.mask_presets, self.seed = reader, resolution, tuple(mask_presets), seed

    def __len__(self) -> int:
        return len(self.reader)

    def crop(self, index: int, num_masks: int) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Returns one crop `[3, H, W]` with `num_masks` masks `[M, 1, H, W]`, or `None` for an unreadable file."""
        epoch, index = divmod(index, len(self))
        image = self.reader.read(index)
        if image is None:
            return None
        generator = np.random.default_rng((self.seed, epoch, index))
        pixels = picture_to_tensor(random_resized_crop(image, self.resolution, generator))
        masks = [
            random_mask(self.resolution, self.resolution, str(generator.choice(self.mask_presets)), generator)
            for _ in range(num_masks)
        ]
        return pixels, torch.from_numpy(np.stack(masks))[:, None].float()

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        # The next readable picture stands in for an unreadable one, so that batches keep their size.
        for offset in range(len(self)):
            sample = self.crop(index + offset, 1)
            if sample is not None:
                return {"pixel_values": sample[0], "mask": sample[1][0]}
        raise ValueError("`reader` holds no readable picture.")


def _save_atomically(tensors: dict[str, torch.Tensor], path: Path) -> None:
    temporary = path.with_suffix(".part")
    save_file(tensors, temporary)
    temporary.replace(path)


@torch.no_grad()
def build_latent_cache(
    vae,
    dataset: PictureDataset,
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

    A shard that is already there is kept, so an interrupted run goes on where it stopped.

    Args:
        vae (`AutoencoderKL` or `AutoencoderTiny`): The autoencoder.
        dataset ([`PictureDataset`]): Crops and holes.
        cache_dir (`str` or `Path`): Folder for `latents-EEE-NNNNN.safetensors` with `latents` `[N, C, h, w]`,
            `masked_latents` `[N, M, C, h, w]` and `masks` `[N, M, H, W / 8]`, bits packed along the width.
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
    }
    settings_file = cache_dir / "cache.json"
    if settings_file.exists():
        existing = json.loads(settings_file.read_text())
        if existing != settings:
            raise ValueError(f"`cache_dir` {cache_dir} was built with {existing}, but {settings} are asked for.")
    else:
        temporary = cache_dir / f"cache.json.{process_index}.part"
        temporary.write_text(json.dumps(settings, indent=2) + "\n")
        temporary.replace(settings_file)

    starts = range(0, len(dataset), shard_size)
    jobs = [(epoch, start) for epoch in range(crops_per_picture) for start in starts]
    for number, (epoch, start) in enumerate(jobs):
        path = cache_dir / f"latents-{epoch:03d}-{start // shard_size:05d}.safetensors"
        if number % num_processes != process_index or path.exists():
            continue
        shard = {"latents": [], "masked_latents": [], "masks": []}
        for index in range(start, min(start + shard_size, len(dataset))):
            sample = dataset.crop(epoch * len(dataset) + index, masks_per_picture)
            if sample is None:
                continue
            pixels, masks = sample[0].to(vae.device), sample[1].to(vae.device)
            encoded = encode_latents(vae, torch.cat([pixels[None], pixels * (1 - masks)]))
            shard["latents"].append(encoded[0].half().cpu())
            shard["masked_latents"].append(encoded[1:].half().cpu())
            packed = np.packbits(sample[1][:, 0].numpy().astype(bool), axis=-1)
            shard["masks"].append(torch.from_numpy(packed))
        if shard["latents"]:
            _save_atomically({name: torch.stack(values).contiguous() for name, values in shard.items()}, path)
        if progress is not None:
            progress(number + 1, len(jobs))


class LatentCacheDataset(torch.utils.data.Dataset):
    """
    The crops and holes of a latent cache, held in memory.

    Args:
        cache_dir (`str` or `Path`): A folder that [`build_latent_cache`] wrote.

    Raises:
        ValueError: If the folder holds no cache, or one of another format.
    """

    def __init__(self, cache_dir: str | Path):
        cache_dir = Path(cache_dir)
        settings_file = cache_dir / "cache.json"
        shards = sorted(cache_dir.glob("latents-*.safetensors"))
        if not settings_file.exists() or not shards:
            raise ValueError(f"`cache_dir` must be a folder with a latent cache, but {str(cache_dir)!r} holds none.")
        self.settings = json.loads(settings_file.read_text())
        if self.settings["format"] != CACHE_FORMAT:
            raise ValueError(f"`cache_dir` must be of format {CACHE_FORMAT}, but is {self.settings['format']}.")
        loaded = [load_file(shard) for shard in shards]
        self.latents = torch.cat([shard["latents"] for shard in loaded])  # [N, C, h, w]
        self.masked_latents = torch.cat([shard["masked_latents"] for shard in loaded])  # [N, M, C, h, w]
        self.masks = torch.cat([shard["masks"] for shard in loaded])  # [N, M, H, W / 8]

    def __len__(self) -> int:
        return self.masks.shape[0] * self.masks.shape[1]

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        picture, number = divmod(index % len(self), self.masks.shape[1])
        mask = np.unpackbits(self.masks[picture, number].numpy(), axis=-1)
        return {
            "latents": self.latents[picture].float(),
            "masked_latents": self.masked_latents[picture, number].float(),
            "mask": torch.from_numpy(mask)[None].float(),
        }


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
