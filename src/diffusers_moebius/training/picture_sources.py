"""Pictures with their masks and categories: from folders, tar shards, JSON lines and `datasets`, read by number."""

import io
import json
import logging
import re
import tarfile
from collections.abc import Iterable, Sequence
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


def is_picture(name: str) -> bool:
    """Whether a file name is that of a picture and not of a picture's mask."""
    name = name.lower()
    return name.endswith(PICTURE_SUFFIXES) and not name.endswith(MASK_SUFFIX)


def category_number(category: str | None, where: str) -> int:
    """The number of a category by name, -1 without one; an error says `where` another name stands."""
    if category is None:
        return NO_CATEGORY
    if category not in CATEGORIES:
        raise ValueError(f"`category` must be one of {', '.join(CATEGORIES)}, but is {category!r} in {where}.")
    return CATEGORIES[category]


def expand_braces(pattern: str) -> list[str]:
    """
    Expands `{000000..000007}` and `{a,b}` as a shell does.

    Args:
        pattern (`str`): A path or URL.

    Returns:
        `list[str]`: Every combination; the pattern alone if it has no braces.
    """
    match = re.search(r"\{([^{}]*)\}", pattern)
    if match is None:
        return [pattern]
    inside = match[1]
    if numbers := re.fullmatch(r"(\d+)\.\.(\d+)", inside):
        first, last = int(numbers[1]), int(numbers[2])
        if last < first:
            raise ValueError(f"A range in braces must rise, but {inside!r} in {pattern!r} does not.")
        width = len(numbers[1]) if numbers[1].startswith("0") else 0
        options = [f"{number:0{width}d}" for number in range(first, last + 1)]
    elif "," in inside:
        options = inside.split(",")
    else:
        raise ValueError(
            f"Braces must hold a range as 000..007 or a list as a,b, but are {match[0]!r} in {pattern!r}."
        )
    rests = expand_braces(pattern[match.end() :])
    return [pattern[: match.start()] + option + rest for option in options for rest in rests]


def is_url(source: str | Path) -> bool:
    return str(source).startswith(("http://", "https://", "hf://"))


def find_shards(source: str | Path) -> list[Path]:
    """The local tar shards that a path, a glob pattern or a pattern with braces names, sorted where it is a glob."""
    shards = []
    for name in [str(source)] if Path(source).is_file() else expand_braces(str(source)):
        path = Path(name)
        found = [path] if path.is_file() else sorted(path.parent.glob(path.name))
        if not found:
            raise ValueError(f"`sources` must name folders or tar shards, but {name!r} does not exist.")
        shards += found
    return shards


def decode_picture(data: bytes) -> Image.Image:
    """Decodes a picture to RGB with its EXIF orientation applied; raises one of `UNREADABLE`."""
    return ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")


def decode_mask(data: bytes, size: tuple[int, int], where: str) -> np.ndarray:
    """
    Decodes a mask.

    Args:
        data (`bytes`): A picture file; at least half bright is hole.
        size (`tuple[int, int]`): Width and height of the picture that it belongs to.
        where (`str`): What an error calls the mask.

    Returns:
        `np.ndarray` of shape `[height, width]` and dtype bool.
    """
    mask = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("L")
    if mask.size != size:
        raise MaskError(
            f"`mask` must have the size of its picture, {size[0]}×{size[1]}, but is {mask.width}×{mask.height}"
            f" in {where}."
        )
    mask = np.asarray(mask) >= 128
    if not mask.any():
        raise MaskError(f"`mask` must mark something, but is empty in {where}.")
    return mask


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
    picture: FilePart | int  # an int is the row of the `datasets` table
    mask: FilePart | None = None
    category: int = NO_CATEGORY


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture that was read: RGB, its own mask `[H, W]` if it has one, and its category's number or -1."""

    image: Image.Image
    mask: np.ndarray | None = None
    category: int = NO_CATEGORY


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
        category = category_number(entry.get("category"), where)
        mask = entry.get("mask")
        if mask is not None and not isinstance(mask, str):
            raise ValueError(f"`mask` must be a path, but is {mask!r} in {where}.")
        if category == CATEGORIES["foreground"] and mask is None:
            raise ValueError(f"`category` foreground needs the object's `mask`, but {where} has none.")
        mask = FilePart(path.parent / mask) if mask is not None else None
        records.append(Record(f"{entry['image']} ({where})", FilePart(path.parent / entry["image"]), mask, category))
    if not records:
        raise ValueError(f"`train_metadata` must have lines, but {str(path)!r} has none.")
    return records


def index_shard(shard: Path) -> list[Record]:
    """The pictures of a local tar shard; `KEY.json` may name a `category`, and `KEY.mask.png` is then the mask."""
    try:
        with tarfile.open(shard) as archive:
            members = [member for member in archive if member.isfile()]
            categories = {}
            for member in members:
                if member.name.endswith(".json"):
                    categories[member.name.removesuffix(".json")] = shard_category(archive.extractfile(member).read())
    except tarfile.TarError as error:
        raise ValueError(f"`sources` must name folders or tar shards, but {str(shard)!r} is none: {error}.") from error
    parts = {member.name: FilePart(shard, member.offset_data, member.size) for member in members}
    records = []
    for name, part in parts.items():
        if is_picture(name):
            key = name.rpartition(".")[0]
            records.append(shard_record(f"{shard}/{name}", part, parts.get(key + MASK_SUFFIX), categories.get(key)))
    return records


def shard_category(data: bytes) -> str | None:
    """The `category` in the JSON member of a sample; `None` if there is none or the member is no JSON object."""
    try:
        entry = json.loads(data)
    except ValueError:
        return None
    return entry.get("category") if isinstance(entry, dict) else None


def shard_record(name: str, picture, mask, category: str | None) -> Record:
    """A record of a shard. Its mask counts only beside a category: evaluation sets have masks too."""
    number = category_number(category, name)
    if number == CATEGORIES["foreground"] and mask is None:
        raise ValueError(f"`category` foreground needs the object's `mask`, but {name} has none.")
    return Record(name, picture, mask if number != NO_CATEGORY else None, number)


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

    Raises:
        ValueError: If a source does not exist or there is no picture in any of them.
    """

    def __init__(
        self,
        sources: Sequence[str | Path] = (),
        metadata: Sequence[str | Path] = (),
        table=None,
        image_column: str = "image",
    ):
        self.records: list[Record] = []
        self.skipped: dict[str, int] = {}
        self.table, self.image_column = table, image_column
        for source in sources:
            path = Path(source)
            if path.is_dir():
                files = (file for file in sorted(path.rglob("*")) if is_picture(file.name))
                self.records += [Record(str(file), FilePart(file)) for file in files]
            else:
                self.records += [record for shard in find_shards(source) for record in index_shard(shard)]
        for path in metadata:
            self.records += read_metadata(path)
        if table is not None:
            self.records += [Record(f"row {row}", row) for row in range(len(table))]
        if not self.records:
            raise ValueError(
                f"`sources` must hold pictures ({', '.join(PICTURE_SUFFIXES)}), but {[*sources, *metadata]} do not."
            )
        foreground = CATEGORIES["foreground"]
        self.object_indices = [index for index, record in enumerate(self.records) if record.category == foreground]

    def __len__(self) -> int:
        return len(self.records)

    def read_picture(self, index: int) -> Picture | None:
        """
        Reads one picture with its mask and category.

        Args:
            index (`int`): Its number.

        Returns:
            [`Picture`], or `None` if the picture or its mask is unreadable.
        """
        record = self.records[index]
        try:
            if isinstance(record.picture, int):
                entry = self.table[record.picture][self.image_column]
                if entry is None:
                    raise ValueError("there is no picture")
                data = entry["bytes"] if entry["bytes"] is not None else Path(entry["path"]).read_bytes()
            else:
                data = record.picture.read()
            image = decode_picture(data)
            mask = decode_mask(record.mask.read(), image.size, record.name) if record.mask is not None else None
        except UNREADABLE as error:
            self.report(record.name, error)
            return None
        except MaskError as error:
            raise ValueError(str(error)) from None
        return Picture(image, mask, record.category)

    def read(self, index: int) -> Image.Image | None:
        """Reads one picture alone: `PIL.Image.Image` in RGB, or `None` if it is unreadable."""
        picture = self.read_picture(index)
        return picture.image if picture is not None else None

    def report(self, name: str, error: Exception) -> None:
        """Counts a picture that cannot be read, and logs it the first time."""
        if name not in self.skipped:
            logger.warning("skipped, unreadable: %s: %s", name, error)
        self.skipped[name] = self.skipped.get(name, 0) + 1


def check_some_readable(number: int, skipped: Iterable[str]) -> None:
    """Raises the error of a source in which nothing can be read."""
    examples = ", ".join(list(skipped)[-3:])
    raise ValueError(f"The training data hold no readable picture: all {number} were skipped, among them {examples}.")
