"""Pictures with their masks and categories: from folders, tar shards, JSON lines and `datasets`, read by number."""

import io
import json
import logging
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

logger = logging.getLogger(__name__)
PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
MASK_SUFFIX = ".mask.png"
# What a batch's `category` says. A sample without one leaves the choice to the training script.
CATEGORIES = {"background": 0, "foreground": 1}
NO_CATEGORY = -1
UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)


class MaskError(Exception):
    """A mask that can be read and does not fit: a mistake in the data that skipping would hide."""


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
class Record:
    """One picture of a source, with what is said of it in a report."""

    name: str
    picture: FilePart | bytes | int  # an int is the row of the `datasets` table
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


def load_hub_table(name: str, config_name: str | None, split: str, image_column: str):
    """A split of a `datasets` data set whose pictures are left as bytes, so that each is decoded here."""
    try:
        import datasets
    except ImportError:
        raise ValueError(
            f"`dataset_name` {name!r} needs the package `datasets`: pip install 'diffusers-moebius[train]'."
        ) from None
    table = datasets.load_dataset(name, config_name, split=split)
    if image_column not in table.column_names:
        raise ValueError(f"`image_column` must be one of {', '.join(table.column_names)}, but is {image_column!r}.")
    if not isinstance(table.features[image_column], datasets.Image):
        raise ValueError(
            f"`image_column` must hold pictures, but {image_column!r} holds {table.features[image_column]}."
        )
    # In a data set made of files the bytes stay in the files, whose paths are in the table.
    return table.cast_column(image_column, datasets.Image(decode=False))


def decode_record(record: Record, table=None, image_column: str = "image") -> Picture:
    """
    Decodes a picture to RGB with its EXIF orientation applied, and its mask, where at least half bright is hole.

    Raises:
        One of `UNREADABLE`: If the picture or its mask cannot be read.
        MaskError: If the mask does not fit.
    """

    def data_of(part) -> bytes:
        if isinstance(part, int):
            entry = table[part][image_column]
            if entry is None:
                raise ValueError("there is no picture")
            return entry["bytes"] if entry["bytes"] is not None else Path(entry["path"]).read_bytes()
        return part if isinstance(part, bytes) else part.read()

    def open_upright(part, mode: str) -> Image.Image:
        return ImageOps.exif_transpose(Image.open(io.BytesIO(data_of(part)))).convert(mode)

    image = open_upright(record.picture, "RGB")
    if record.mask is None:
        return Picture(image, None, record.category)
    mask = open_upright(record.mask, "L")
    if mask.size != image.size:
        raise MaskError(
            f"`mask` must have the size of its picture, {image.width}×{image.height}, but is"
            f" {mask.width}×{mask.height} in {record.name}."
        )
    mask = np.asarray(mask) >= 128
    if not mask.any():
        raise MaskError(f"`mask` must mark something, but is empty in {record.name}.")
    return Picture(image, mask, record.category)


class PictureReader:
    """
    Reads pictures by number, in a fixed order.

    A file that is no readable picture is skipped: its name is logged, and counted in `skipped`. A mask of another size
    than its picture is an error.

    Args:
        sources (sequence of `str` or `Path`, defaults to none): Folders (searched recursively), `.tar` shards, or
            patterns of them with `*` or braces (`photos-{000..007}.tar`). In both, `KEY.mask.png` is no picture.
        metadata (sequence of `str` or `Path`, defaults to none): Files of JSON lines, see [`read_metadata`].
        table (`datasets.Dataset`, *optional*): See [`load_hub_table`].
        image_column (`str`, defaults to `"image"`): The column of `table` with the pictures.
        max_samples (`int`, *optional*): Only the first so many pictures.

    Raises:
        ValueError: If a source does not exist or there is no picture in any of them.
    """

    def __init__(
        self,
        sources: Sequence[str | Path] = (),
        metadata: Sequence[str | Path] = (),
        table=None,
        image_column: str = "image",
        max_samples: int | None = None,
    ):
        self.records: list[Record] = []
        self.skipped: dict[str, int] = {}
        self.table, self.image_column = table, image_column
        for source in sources:
            if Path(source).is_dir():
                files = (file for file in sorted(Path(source).rglob("*")) if is_picture(file.name))
                self.records += [Record(str(file), FilePart(file)) for file in files]
            else:
                self.records += [record for shard in expand_shards(source) for record in index_shard(shard)]
        for path in metadata:
            self.records += read_metadata(path)
        if table is not None:
            self.records += [Record(f"row {row}", row) for row in range(len(table))]
        if not self.records:
            raise ValueError(
                f"`sources` must hold pictures ({', '.join(PICTURE_SUFFIXES)}), but {[*sources, *metadata]} do not."
            )
        self.records = self.records[:max_samples]
        foreground = CATEGORIES["foreground"]
        self.object_indices = [index for index, record in enumerate(self.records) if record.category == foreground]

    def __len__(self) -> int:
        return len(self.records)

    def read_picture(self, index: int) -> Picture | None:
        """Reads the picture of a number with its mask and category; `None` if one of them is unreadable."""
        record = self.records[index]
        try:
            return decode_record(record, self.table, self.image_column)
        except UNREADABLE as error:
            if record.name not in self.skipped:
                logger.warning("skipped, unreadable: %s: %s", record.name, error)
            self.skipped[record.name] = self.skipped.get(record.name, 0) + 1
            return None
        except MaskError as error:
            raise ValueError(str(error)) from None

    def read(self, index: int) -> Image.Image | None:
        """Reads one picture alone: `PIL.Image.Image` in RGB, or `None` if it is unreadable."""
        picture = self.read_picture(index)
        return picture.image if picture is not None else None
