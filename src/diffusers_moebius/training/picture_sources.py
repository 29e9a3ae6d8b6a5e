"""Pictures with their masks and categories: from folders, tar shards, JSON lines and `datasets`."""

import hashlib
import io
import json
import logging
import tarfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from glob import glob
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps

logger = logging.getLogger(__name__)
PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
MASK_SUFFIX = ".mask.png"
# What a batch's `category` says. A sample without one leaves the choice to the training script.
CATEGORIES = {"background": 0, "foreground": 1}
NO_CATEGORY = -1
UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)


class Record(NamedTuple):
    """One picture of a source, not decoded yet: files as bytes or functions that read them, and a name for reports."""

    name: str
    picture: bytes | Callable[[], bytes]
    mask: bytes | Callable[[], bytes] | None = None
    category: int = NO_CATEGORY


class _StrictTarInfo(tarfile.TarInfo):
    """The standard reader takes a broken header behind the first one for the end of the archive, without a word."""

    @classmethod
    def fromtarfile(cls, archive):
        try:
            return super().fromtarfile(archive)
        except (tarfile.TruncatedHeaderError, tarfile.InvalidHeaderError) as error:
            raise tarfile.ReadError(f"broken at byte {archive.offset}: {error}") from error


def read_part(path: Path, offset: int = 0, size: int = -1) -> bytes:
    """Reads a file, or a member of a tar shard; opened anew, as processes that share a handle share its position."""
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(size)


def read_cell(table, row: int, column: str) -> bytes:
    """Reads a picture in a table of `datasets`; where the data set is made of files, the table has their paths."""
    entry = table[row][column]
    if entry is None:
        raise ValueError("there is no picture")
    return entry["bytes"] if entry["bytes"] is not None else Path(entry["path"]).read_bytes()


def is_picture(name: str) -> bool:
    """Whether a file name is that of a picture and not of a picture's mask."""
    name = name.lower()
    return name.endswith(PICTURE_SUFFIXES) and not name.endswith(MASK_SUFFIX)


def number_of_name(name: str) -> int:
    """A number that stands for a sample's name, the same on every machine."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big")


def make_record(name: str, picture, mask, category: str | None, where: str) -> Record:
    """A record with a checked category; errors say `where` it stands."""
    if category is not None and category not in CATEGORIES:
        raise ValueError(f"`category` must be one of {', '.join(CATEGORIES)}, but is {category!r} in {where}.")
    if category == "foreground" and mask is None:
        raise ValueError(f"`category` foreground needs the object's `mask`, but {where} has none.")
    return Record(name, picture, mask, CATEGORIES.get(category, NO_CATEGORY))


def read_shard(shard: str, lost: list[str], stream: bool = True) -> Iterator[Record]:
    """
    Reads the samples of a tar shard in order, up to where it is broken.

    `datasets` opens URLs, with the token of the hub and its retries.

    Members of one sample (`KEY.jpg`, `KEY.json`, `KEY.mask.png`) follow each other, as WebDataset has it. The JSON
    file may name a `category`; a mask without one does not count, since evaluation sets have masks too.

    Args:
        shard (`str`): Path or URL: `http(s)://`, or `hf://[datasets/]owner/name[@revision]/path`.
        lost (`list[str]`): The error is appended to it if the shard, or the rest of it, cannot be read.
        stream (`bool`, defaults to `True`): Give files as bytes, read from front to back; else, of a shard on disk,
            functions that read them.

    Raises:
        ValueError: If a category is unknown, or `foreground` without a mask.
    """
    open_shard = open
    if is_url(shard):
        from datasets.utils.file_utils import xopen as open_shard

    def wanted(archive) -> Iterator[tarfile.TarInfo]:
        for member in archive:
            # The archive keeps no members: a shard of a million would fill the memory with their headers.
            archive.members = []
            if member.isfile() and member.name.lower().endswith((*PICTURE_SUFFIXES, ".json")):
                yield member

    def key(member) -> str:
        folder, slash, name = member.name.rpartition("/")
        return folder + slash + name.partition(".")[0]

    mode = "r|" if stream else "r:"
    try:
        with open_shard(shard, "rb") as file, tarfile.open(fileobj=file, mode=mode, tarinfo=_StrictTarInfo) as archive:
            for _, sample in groupby(wanted(archive), key):
                files = {}
                for member in sample:
                    if stream or member.name.endswith(".json"):
                        files[member.name] = archive.extractfile(member).read()
                    else:
                        files[member.name] = partial(read_part, Path(shard), member.offset_data, member.size)
                yield from (_shard_record(shard, name, files) for name in files if is_picture(name))
    except (tarfile.TarError, OSError, EOFError) as error:
        lost.append(f"{shard}: {type(error).__name__}: {error}")
        logger.warning("skipped the rest of a shard: %s", lost[-1])


def _shard_record(shard: str, name: str, files: dict) -> Record:
    stem, where = name.rpartition(".")[0], f"{shard}/{name}"
    try:
        entry = json.loads(files.get(f"{stem}.json", b"null"))
    except ValueError:
        entry = None
    category = entry.get("category") if isinstance(entry, dict) else None
    mask = files.get(stem + MASK_SUFFIX) if category is not None else None
    return make_record(where, files[name], mask, category, where)


def is_url(source: str | Path) -> bool:
    return str(source).startswith(("http://", "https://", "hf://"))


def expand_shards(source: str | Path) -> list[str]:
    """
    The shards that a path or URL names, in order: `{000..127}` and `{a,b}` as in a shell, and `*` in a path.

    Raises:
        ValueError: If the braces are wrong, or there is no such file.
    """
    from braceexpand import UnbalancedBracesError, braceexpand

    try:
        names = [str(source)] if Path(source).is_file() else list(braceexpand(str(source)))
    except UnbalancedBracesError as error:
        raise ValueError(f"`sources` must have braces in pairs, but are {str(source)!r}: {error}.") from error
    shards = []
    for name in names:
        found = [name] if Path(name).is_file() or (is_url(name) and "*" not in name) else sorted(glob(name))
        if not found:
            raise ValueError(f"`sources` must name folders, tar shards or, without `*`, URLs; there is no {name!r}.")
        shards += found
    return shards


def read_metadata(path: str | Path) -> list[Record]:
    """
    Reads a file of JSON lines: `image`, optionally `mask` and `category`, paths relative to the file.

    Raises:
        ValueError: With the number of the line, if it is no such object, has an unknown category, or says
            `foreground` without a mask.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"`train_metadata` must be a file of JSON lines, but {str(path)!r} does not exist.")
    records = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            entry = json.loads(line)
            names = [entry["image"], entry.get("mask")]
            picture, mask = (partial(read_part, path.parent / name) if name is not None else None for name in names)
        except (ValueError, TypeError, LookupError) as error:
            raise ValueError(
                f"`train_metadata` must hold JSON lines with paths `image` and perhaps `mask`, but {where} is {line}."
            ) from error
        records.append(make_record(f"{names[0]} ({where})", picture, mask, entry.get("category"), where))
    if not records:
        raise ValueError(f"`train_metadata` must have lines, but {str(path)!r} has none.")
    return records


def read_table(name: str, config_name: str | None, split: str, image_column: str) -> list[Record]:
    """The pictures in a column of a `datasets` data set, as files: each is decoded where it is needed."""
    import datasets

    table = datasets.load_dataset(name, config_name, split=split)
    kind = table.features.get(image_column)
    if not isinstance(kind, datasets.Image):
        raise ValueError(f"`image_column` must hold pictures, but {image_column!r} is {kind} of {table.column_names}.")
    table = table.cast_column(image_column, datasets.Image(decode=False))
    return [Record(f"row {row}", partial(read_cell, table, row, image_column)) for row in range(len(table))]


def list_pictures(sources: Sequence[str | Path]) -> list[Record]:
    """
    The pictures of folders and shards, in a fixed order.

    Args:
        sources (sequence of `str` or `Path`): Folders (searched recursively), `.tar` shards, or patterns of them with
            `*` or braces (`photos-{000..007}.tar`). In both, `KEY.mask.png` is no picture.

    Raises:
        ValueError: If a source does not exist, or none of them holds a picture.
    """
    records: list[Record] = []
    for source in sources:
        if Path(source).is_dir():
            files = (file for file in sorted(Path(source).rglob("*")) if is_picture(file.name))
            records += [Record(str(file), partial(read_part, file)) for file in files]
        else:
            for shard in expand_shards(source):
                lost: list[str] = []
                found = list(read_shard(shard, lost, stream=False))
                if lost and not found:
                    raise ValueError(f"`sources` must name folders or tar shards, but {shard!r} is none: {lost[0]}.")
                records += found
    if sources and not records:
        raise ValueError(f"`sources` must hold pictures ({', '.join(PICTURE_SUFFIXES)}), but {[*sources]} do not.")
    return records


def read_picture(record: Record) -> tuple[Image.Image, np.ndarray | None] | None:
    """
    Decodes a picture to RGB with its EXIF orientation applied, and its mask, where at least half bright is hole.

    Returns:
        The picture and its own mask `[H, W]`, if it has one; or `None` if one of the two cannot be read.

    Raises:
        ValueError: If the mask can be read and does not fit: a mistake in the data that skipping would hide.
    """

    def open_upright(part, mode: str) -> Image.Image:
        file = io.BytesIO(part if isinstance(part, bytes) else part())
        return ImageOps.exif_transpose(Image.open(file)).convert(mode)

    try:
        image = open_upright(record.picture, "RGB")
        mask = open_upright(record.mask, "L") if record.mask is not None else None
    except UNREADABLE as error:
        logger.warning("skipped, unreadable: %s: %s", record.name, error)
        return None
    if mask is None:
        return image, None
    if mask.size != image.size:
        raise ValueError(
            f"`mask` must have the size of its picture, {image.width}×{image.height}, but is"
            f" {mask.width}×{mask.height} in {record.name}."
        )
    mask = np.asarray(mask) >= 128
    if not mask.any():
        raise ValueError(f"`mask` must mark something, but is empty in {record.name}.")
    return image, mask
