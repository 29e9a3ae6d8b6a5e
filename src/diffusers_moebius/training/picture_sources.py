"""Pictures with their masks and categories: from folders, tar shards, JSON lines and `datasets`."""

import io
import json
import logging
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

logger = logging.getLogger(__name__)
PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
MASK_SUFFIX = ".mask.png"
# What a batch's `category` says. A sample without one leaves the choice to the training script.
CATEGORIES = {"background": 0, "foreground": 1}
NO_CATEGORY = -1
UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)


@dataclass(frozen=True, slots=True)
class FilePart:
    """Bytes of a file: all of it, or `size` bytes from `offset` on (a member of a tar shard)."""

    path: Path
    offset: int = 0
    size: int = -1

    def read(self) -> bytes:
        # Opened anew each time: processes that share a file handle would share its position too.
        with self.path.open("rb") as file:
            file.seek(self.offset)
            return file.read(self.size)


@dataclass(frozen=True, slots=True)
class Cell:
    """A picture in a table of `datasets`; where the data set is made of files, the table has their paths."""

    table: Any
    row: int
    column: str

    def read(self) -> bytes:
        entry = self.table[self.row][self.column]
        if entry is None:
            raise ValueError("there is no picture")
        return entry["bytes"] if entry["bytes"] is not None else Path(entry["path"]).read_bytes()


@dataclass(frozen=True, slots=True)
class Record:
    """One picture of a source, not read yet, with its name in reports."""

    name: str
    picture: FilePart | Cell | bytes
    mask: FilePart | bytes | None = None
    category: int = NO_CATEGORY


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture that was read: RGB, its own mask `[H, W]` if it has one, and its category's number or -1."""

    image: Image.Image
    mask: np.ndarray | None = None
    category: int = NO_CATEGORY


def is_picture(name: str) -> bool:
    """Whether a file name is that of a picture and not of a picture's mask."""
    name = name.lower()
    return name.endswith(PICTURE_SUFFIXES) and not name.endswith(MASK_SUFFIX)


def make_record(name: str, picture, mask, category: str | None, where: str) -> Record:
    """A record with a checked category; errors say `where` it stands."""
    if category is not None and category not in CATEGORIES:
        raise ValueError(f"`category` must be one of {', '.join(CATEGORIES)}, but is {category!r} in {where}.")
    if category == "foreground" and mask is None:
        raise ValueError(f"`category` foreground needs the object's `mask`, but {where} has none.")
    return Record(name, picture, mask, CATEGORIES.get(category, NO_CATEGORY))


def shard_record(shard: str | Path, name: str, members: dict) -> Record:
    """
    A record of a tar shard: `KEY.json` may name a `category`, and `KEY.mask.png` is then the mask.

    A mask without a category does not count: evaluation sets have masks too.

    Args:
        shard (`str` or `Path`): The shard.
        name (`str`): Name of the picture in it.
        members (`dict`): What there is of its sample, by name; the JSON file as bytes.
    """
    key = name.rpartition(".")[0]
    try:
        entry = json.loads(members.get(f"{key}.json", b"null"))
    except ValueError:
        entry = None
    category = entry.get("category") if isinstance(entry, dict) else None
    mask = members.get(key + MASK_SUFFIX) if category is not None else None
    return make_record(f"{shard}/{name}", members[name], mask, category, f"{shard}/{name}")


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
    if is_url(source):
        if "*" in str(source):
            raise ValueError(f"`sources` may use braces in URLs but no `*`: {str(source)!r}.")
        return names
    shards = []
    for path in map(Path, names):
        found = [path] if path.is_file() else sorted(path.parent.glob(path.name))
        if not found:
            raise ValueError(f"`sources` must name folders or tar shards, but {str(path)!r} does not exist.")
        shards += map(str, found)
    return shards


def index_shard(shard: str) -> list[Record]:
    """The pictures of a local tar shard."""
    members = {}
    try:
        with tarfile.open(shard) as archive:
            for member in archive:
                if member.isfile():
                    part = FilePart(Path(shard), member.offset_data, member.size)
                    members[member.name] = part.read() if member.name.endswith(".json") else part
    except tarfile.TarError as error:
        raise ValueError(f"`sources` must name folders or tar shards, but {shard!r} is none: {error}.") from error
    return [shard_record(shard, name, members) for name in members if is_picture(name)]


def read_metadata(path: str | Path) -> list[Record]:
    """
    Reads a file of JSON lines: `image`, optionally `mask` and `category`, paths relative to the file.

    Args:
        path (`str` or `Path`): The file.

    Returns:
        `list[Record]`: One for each line that is not blank.

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
        except json.JSONDecodeError as error:
            raise ValueError(f"`train_metadata` must hold JSON lines, but {where} is none: {error}.") from None
        if not isinstance(entry, dict) or not isinstance(entry.get("image"), str):
            raise ValueError(f"`train_metadata` must have a path `image` in every line, but {where} has not.")
        mask = entry.get("mask")
        if mask is not None and not isinstance(mask, str):
            raise ValueError(f"`mask` must be a path, but is {mask!r} in {where}.")
        parts = [FilePart(path.parent / name) if name is not None else None for name in (entry["image"], mask)]
        records.append(make_record(f"{entry['image']} ({where})", *parts, entry.get("category"), where))
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
    return [Record(f"row {row}", Cell(table, row, image_column)) for row in range(len(table))]


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
            records += [Record(str(file), FilePart(file)) for file in files]
        else:
            records += [record for shard in expand_shards(source) for record in index_shard(shard)]
    if sources and not records:
        raise ValueError(f"`sources` must hold pictures ({', '.join(PICTURE_SUFFIXES)}), but {[*sources]} do not.")
    return records


def read_picture(record: Record) -> Picture | None:
    """
    Decodes a picture to RGB with its EXIF orientation applied, and its mask, where at least half bright is hole.

    Returns:
        [`Picture`], or `None` if one of the two cannot be read.

    Raises:
        ValueError: If the mask can be read and does not fit: a mistake in the data that skipping would hide.
    """

    def open_upright(part, mode: str) -> Image.Image:
        file = io.BytesIO(part if isinstance(part, bytes) else part.read())
        return ImageOps.exif_transpose(Image.open(file)).convert(mode)

    try:
        image = open_upright(record.picture, "RGB")
        mask = open_upright(record.mask, "L") if record.mask is not None else None
    except UNREADABLE as error:
        logger.warning("skipped, unreadable: %s: %s", record.name, error)
        return None
    if mask is None:
        return Picture(image, None, record.category)
    if mask.size != image.size:
        raise ValueError(
            f"`mask` must have the size of its picture, {image.width}×{image.height}, but is"
            f" {mask.width}×{mask.height} in {record.name}."
        )
    mask = np.asarray(mask) >= 128
    if not mask.any():
        raise ValueError(f"`mask` must mark something, but is empty in {record.name}.")
    return Picture(image, mask, record.category)
