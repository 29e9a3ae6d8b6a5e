"""
Many photos on many machines, by Ray Data: it schedules, retries and writes; what is here fills photos and leaves out
those that are done. Needs the extra `ray`.
"""

import json
import tarfile
import time
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow
import pyarrow.parquet
import ray
from ray.data import ActorPoolStrategy, Dataset

from ..pictures.files import encode_image, picture_suffixes
from .photo import MaskOptions, fill_photos, prepare_pipeline, read_photo
from .sources import find_photos, item_of_row

# What every row of a result has; the columns of the photo and its mask are gone.
RESULT_FIELDS = {"image": pyarrow.large_binary(), "error": pyarrow.string(), "seconds": pyarrow.float64()}


class Inpainter:
    """
    Fills the photos of a batch of rows; one lives in each worker, with a pipeline of its own.

    Args:
        model (`str`): As in [`~MoebiusInpaintPipeline.from_pretrained`].
        load (`dict`): Arguments of `from_pretrained`.
        fast (`bool`): As in [`prepare_pipeline`].
        masks (`MaskOptions`): How masks are read.
        call (`dict`): Arguments of the pipeline's call.
        seed (`int`): Seed of each photo.
    """

    def __init__(
        self, model: str, load: dict[str, Any], fast: bool, masks: MaskOptions, call: dict[str, Any], seed: int
    ):
        import torch

        from .. import MoebiusInpaintPipeline

        # The device is Ray's choice: a worker sees a GPU if it was promised one.
        device = "cuda" if torch.cuda.is_available() else "cpu"
        load = {"dtype": torch.float16 if device == "cuda" else torch.float32, **load}
        self.pipeline = MoebiusInpaintPipeline.from_pretrained(model, **load).to(device)
        self.pipeline.set_progress_bar_config(disable=True)
        prepare_pipeline(self.pipeline, fast)
        self.masks, self.call, self.seed = masks, call, seed

    def __call__(self, table: pyarrow.Table) -> pyarrow.Table:
        rows = table.to_pylist()
        results: list[dict[str, Any]] = [{"image": None, "error": None, "seconds": 0.0} for _ in rows]
        photos = {}
        for number, row in enumerate(rows):
            start = time.perf_counter()
            try:
                photos[number] = read_photo(item_of_row(row, Path(), str(row["key"])), self.masks)
            except (ValueError, OSError) as error:
                results[number]["error"] = str(error)
            results[number]["seconds"] = time.perf_counter() - start
        if photos:
            start = time.perf_counter()
            pictures = fill_photos(self.pipeline, list(photos.values()), self.seed, self.call)
            share = (time.perf_counter() - start) / len(photos)
            for (number, photo), picture in zip(photos.items(), pictures):
                start = time.perf_counter()
                try:
                    if isinstance(picture, Exception):
                        raise picture
                    results[number]["image"] = encode_image(picture, photo.item.key, photo.metadata)
                except (ValueError, OSError) as error:
                    results[number]["error"] = str(error)
                results[number]["seconds"] += share + time.perf_counter() - start
        kept = table.drop_columns(
            [name for name in ("image", "mask", "error", "seconds") if name in table.column_names]
        )
        for name, kind in RESULT_FIELDS.items():
            kept = kept.append_column(name, pyarrow.array([result[name] for result in results], kind))
        return kept


def inpaint_dataset(
    dataset: Dataset,
    model: str = "nano",
    load: dict[str, Any] | None = None,
    fast: bool = False,
    masks: MaskOptions = MaskOptions(),
    call: dict[str, Any] | None = None,
    seed: int = 0,
    batch_size: int = 4,
    min_workers: int = 1,
    max_workers: int | None = None,
    num_gpus: float = 0,
    num_cpus: float = 1,
) -> Dataset:
    """
    Fills the photos of a Ray dataset, lazily, in a pool of workers that each load the pipeline once.

    A photo that cannot be done becomes a row with its error. A worker that dies is replaced by Ray, and its rows are
    done again. A photo's result does not depend on its batch, but for rounding.

    Args:
        dataset (`ray.data.Dataset`): Rows with the columns `key` (a name, whose suffix decides the result's format;
            PNG without one), `image` and `mask` (contents, paths or addresses). Other columns are kept.
        model (`str`, defaults to `"nano"`): As in [`~MoebiusInpaintPipeline.from_pretrained`]; every worker must be
            able to reach it.
        load (`dict`, *optional*): Arguments of `from_pretrained`, such as `checkpoint`.
        fast (`bool`, defaults to `False`): Few steps, and a tiny decoder where there is one, as in
            [`prepare_pipeline`].
        masks (`MaskOptions`, *optional*): How masks are read, and by how much they grow.
        call (`dict`, *optional*): Arguments of the pipeline's call; `padding_mask_crop` is 64 if it is not given.
        seed (`int`, defaults to 0): Seed of each photo.
        batch_size (`int`, defaults to 4): Rows that a worker takes at once.
        min_workers (`int`, defaults to 1): Workers at least.
        max_workers (`int`, *optional*): Workers at most; as many as `min_workers` if not given.
        num_gpus (`float`, defaults to 0): GPUs a worker; a fraction lets workers share one.
        num_cpus (`float`, defaults to 1): Processor cores a worker, which are its threads as well.

    Returns:
        `ray.data.Dataset`: Rows with `key`, `image` (contents of a picture file, or none), `error` (or none),
        `seconds`, and the other columns.
    """
    return dataset.map_batches(
        Inpainter,
        fn_constructor_args=(model, load or {}, fast, masks, {"padding_mask_crop": 64, **(call or {})}, seed),
        batch_size=batch_size,
        batch_format="pyarrow",
        compute=ActorPoolStrategy(min_size=min_workers, max_size=max_workers or min_workers),
        num_gpus=num_gpus,
        num_cpus=num_cpus,
    )


def read_source(source: str | Path, mask: str | Path | None = None, recursive: bool = False) -> Dataset:
    """
    The photos of a folder, of WebDataset shards, Parquet files or JSON lines, as rows of `key`, `image` and `mask`.

    Args:
        source (`str` or `Path`): A folder of photos; or a file or folder of `.parquet`, `.jsonl` (columns `image` and
            `mask`, perhaps `key`: contents, paths or addresses) or `.tar` (WebDataset: `NAME.jpg`, `NAME.mask.png`).
            Workers must be able to read it under the same path.
        mask (`str` or `Path`, *optional*): For a folder of photos: its folder of masks, or one mask for all.
        recursive (`bool`, defaults to `False`): Whether a folder's folders are looked into.

    Returns:
        `ray.data.Dataset`: The rows; nothing of the pictures is read yet.

    Raises:
        ValueError: If there are no photos.
    """
    source = Path(source).absolute()
    files = sorted(path for path in source.iterdir() if path.is_file()) if source.is_dir() else [source]
    for suffix, read in ((".parquet", ray.data.read_parquet), (".jsonl", ray.data.read_json), (".tar", _read_tars)):
        paths = [str(path) for path in files if path.suffix == suffix]
        if paths:
            folder = Path(paths[0]).parent
            return read(paths).map(_named_row, fn_args=(folder,))
    found = find_photos(source, None if mask is None else Path(mask).absolute(), recursive)
    items = list(found.items)
    rows = [
        {"key": i.key, "image": str(i.photo), "mask": str(i.masks[0]) if len(i.masks) == 1 else None} for i in items
    ]
    return ray.data.from_items(rows)


def _read_tars(paths: list[str]) -> Dataset:
    return ray.data.read_webdataset(paths, decoder=None).map(_row_of_sample)


def _row_of_sample(sample: dict[str, Any]) -> dict[str, Any]:
    suffixes = {suffix.lstrip(".") for suffix in picture_suffixes()}
    photo = next((name for name in sample if name.lower() in suffixes), None)
    mask = next((name for name in sample if name.lower().startswith("mask.")), None)
    return {
        "key": f"{sample['__key__']}.{photo or 'png'}",
        "image": sample.get(photo),
        "mask": sample.get(mask),
    }


def _named_row(row: dict[str, Any], folder: Path) -> dict[str, Any]:
    """A row whose paths hold wherever a worker runs, and whose key is there."""
    for name in ("image", "mask"):
        value = row.get(name)
        if isinstance(value, str) and not value.startswith(("http://", "https://")):
            row[name] = str(folder / value)
    if not row.get("key"):
        row["key"] = PurePosixPath(row["image"]).name if isinstance(row.get("image"), str) else None
    return row


def finished_rows(target: Path) -> dict[str, str | None]:
    """
    The photos that a target folder holds, in Parquet files or WebDataset shards, with their errors.

    A file that a killed run did not finish is deleted: its photos are done again.
    """
    rows: dict[str, str | None] = {}
    for path in sorted([*target.glob("*.parquet"), *target.glob("*.tar")]):
        try:
            if path.suffix == ".parquet":
                table = pyarrow.parquet.read_table(path, columns=["key", "error"])
                rows.update(zip(table.column("key").to_pylist(), table.column("error").to_pylist()))
            else:
                with tarfile.open(path) as archive:
                    samples = [json.load(archive.extractfile(m)) for m in archive if m.name.endswith(".json")]
                rows.update((sample["key"], sample["error"]) for sample in samples)
        except (pyarrow.ArrowInvalid, tarfile.TarError, OSError, EOFError, json.JSONDecodeError):
            path.unlink()
    return rows


def _sample_of_row(row: dict[str, Any]) -> dict[str, Any]:
    """A row as a sample of a WebDataset shard: the picture, and what is known of it as JSON."""
    key = PurePosixPath(row["key"])
    about = {"key": row["key"], "error": row["error"], "seconds": row["seconds"]}
    sample = {"__key__": str(key.with_suffix("")), "json": json.dumps(about).encode()}
    return sample if row["image"] is None else {**sample, key.suffix.lstrip(".") or "png": row["image"]}


def inpaint_source(
    dataset: Dataset, target: str | Path, output_format: str = "parquet", **options: Any
) -> dict[str, int]:
    """
    Fills photos into a folder of Parquet files or WebDataset shards; a run that was interrupted goes on.

    Args:
        dataset (`ray.data.Dataset`): From [`read_source`].
        target (`str` or `Path`): The folder, which workers must be able to write to under the same path.
        output_format (`str`, defaults to `"parquet"`): `"parquet"` (columns of [`inpaint_dataset`]) or `"webdataset"`
            (the picture, and `key`, `error` and `seconds` as JSON).
        options: Arguments of [`inpaint_dataset`].

    Returns:
        `dict[str, int]`: How many photos were `done` before, are `filled` now, and `failed`.

    Raises:
        ValueError: If `output_format` is neither.
    """
    if output_format not in ("parquet", "webdataset"):
        raise ValueError(f"`output_format` must be parquet or webdataset, but is {output_format!r}.")
    target = Path(target).absolute()
    target.mkdir(parents=True, exist_ok=True)
    done = finished_rows(target)
    if done:
        reference = ray.put(set(done))
        dataset = dataset.filter(lambda row: row["key"] not in ray.get(reference))
    filled = inpaint_dataset(dataset, **options)
    if output_format == "parquet":
        filled.write_parquet(str(target))
    else:
        filled.map(_sample_of_row).write_webdataset(str(target), encoder=None)
    new = {key: error for key, error in finished_rows(target).items() if key not in done}
    failed = sum(error is not None for error in new.values())
    return {"done": len(done), "filled": len(new) - failed, "failed": failed}
