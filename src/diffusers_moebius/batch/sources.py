"""Where photos and their masks are found: one file, folders, WebDataset shards, Parquet files."""

import io
import tarfile
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from PIL import Image

from ..pictures.files import picture_suffixes
from .photo import Item

_ROWS_AT_ONCE = 16


class Source(NamedTuple):
    """
    Photos to be filled.

    Args:
        items (`Iterable[Item]`): The photos; read from the disk as they are asked for.
        total (`int`, *optional*): How many there are, where that is known beforehand.
        left_out (`list[str]`): Files beside them that are no pictures.
        has_folders (`bool`): Whether there are folders beside them that are left out.
        is_single (`bool`): Whether it is a photo and not a collection of them.
    """

    items: Iterable[Item]
    total: int | None = None
    left_out: list[str] = []
    has_folders: bool = False
    is_single: bool = False


def find_photos(photo: Path, mask: Path | None, recursive: bool = False) -> Source:
    """
    Finds photos and their masks.

    Args:
        photo (`Path`): A photo; a folder of photos; or a file or a folder of `.parquet` (columns `image` and `mask`:
            contents, paths or addresses) or `.tar` (WebDataset: `NAME.jpg` and `NAME.mask.png`).
        mask (`Path`, *optional*): The mask, one for all photos; or a folder of masks that are named like their photos.
            Shards have masks of their own.
        recursive (`bool`, defaults to `False`): Whether photos are looked for in the folder's folders, too.

    Returns:
        `Source`: The photos, in the order of their names.

    Raises:
        ValueError: If there are none, or `photo` and `mask` do not fit together.
    """
    shards = _list_shards(photo)
    if mask is None and not shards:
        raise ValueError("MASK is missing: a picture in which white is filled, or a folder of such pictures.")
    if mask is not None and mask.is_dir() and (shards or not photo.is_dir()):
        raise ValueError(f"MASK must be a file, as PHOTO is, but {mask} is a folder.")
    if shards:
        read, total = (_read_tar, None) if shards[0].suffix == ".tar" else (_read_parquet, _count_rows(shards))
        return Source((item for shard in shards for item in read(shard, mask)), total)
    if not photo.is_dir():
        return Source([Item(photo.name, photo, [mask])], 1, is_single=True)

    photos, left_out = _list_pictures(photo, recursive)
    if not photos:
        raise ValueError(f"PHOTO must hold pictures, but there are none in the folder {photo}.")
    masks_of: dict[Path, list[Path]] = {}
    for path in _list_pictures(mask, recursive)[0] if mask.is_dir() else []:
        masks_of.setdefault(path.relative_to(mask).with_suffix(""), []).append(path)

    def item(path: Path) -> Item:
        relative = path.relative_to(photo)
        masks = masks_of.get(relative.with_suffix(""), []) if mask.is_dir() else [mask]
        same_name = [candidate for candidate in masks if candidate.name == path.name]
        return Item(relative.as_posix(), path, same_name or masks)

    has_folders = not recursive and any(p.is_dir() and not p.name.startswith(".") for p in photo.iterdir())
    return Source(map(item, photos), len(photos), left_out, has_folders)


def _list_pictures(folder: Path, recursive: bool) -> tuple[list[Path], list[str]]:
    suffixes = picture_suffixes()
    files = sorted(
        path
        for path in (folder.rglob("*") if recursive else folder.iterdir())
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )
    pictures = [path for path in files if path.suffix.lower() in suffixes]
    return pictures, [path.relative_to(folder).as_posix() for path in files if path.suffix.lower() not in suffixes]


def _list_shards(path: Path) -> list[Path]:
    """The shards at a path; none if pictures are beside them."""
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    if any(file.suffix.lower() in picture_suffixes() for file in files):
        return []
    by_suffix = ([file for file in files if file.suffix == suffix] for suffix in (".parquet", ".tar"))
    return next(filter(None, by_suffix), [])


def _read_tar(shard: Path, mask: Path | None) -> Iterator[Item]:
    suffixes = picture_suffixes()
    try:
        with tarfile.open(shard, "r|*") as archive:
            members = (member for member in archive if member.isfile())
            for key, group in groupby(members, lambda member: _sample_key(member.name)):
                photo, name, masks = None, key, [] if mask is None else [mask]
                for member in group:
                    extension = PurePosixPath(member.name).name.partition(".")[2].lower()
                    if f".{extension}".endswith(tuple(suffixes)):
                        contents = archive.extractfile(member).read()
                        if not extension.startswith("mask."):
                            photo, name = contents, member.name
                        elif mask is None:
                            masks.append(contents)
                if photo is not None:
                    yield Item(name, photo, masks)
    except tarfile.TarError as error:
        raise ValueError(f"{shard} cannot be read as a tar file: {error}") from error


def _sample_key(name: str) -> str:
    path = PurePosixPath(name)
    return str(path.with_name(path.name.partition(".")[0] or path.name))


def open_parquet(shard: Path) -> Any:
    """Opens a Parquet file with a column `image`."""
    try:
        from pyarrow import ArrowInvalid
        from pyarrow.parquet import ParquetFile
    except ModuleNotFoundError as error:
        raise ValueError(f"{shard}: Parquet needs `pip install diffusers-moebius[parquet]`.") from error
    try:
        file = ParquetFile(shard)
    except ArrowInvalid as error:
        raise ValueError(f"{shard} cannot be read as a Parquet file: {error}") from error
    if "image" not in file.schema_arrow.names:
        raise ValueError(f"{shard} must have a column `image`, but has {', '.join(file.schema_arrow.names)}.")
    return file


def _count_rows(shards: list[Path]) -> int:
    return sum(open_parquet(shard).metadata.num_rows for shard in shards)


def _read_parquet(shard: Path, mask: Path | None) -> Iterator[Item]:
    file = open_parquet(shard)
    columns = [name for name in ("key", "image", "mask") if name in file.schema_arrow.names]
    rows = (row for batch in file.iter_batches(_ROWS_AT_ONCE, columns=columns) for row in batch.to_pylist())
    for number, row in enumerate(rows):
        item = item_of_row(row, shard.parent, f"{shard.stem}-{number:06d}")
        yield item if mask is None else item._replace(masks=[mask])


def item_of_row(row: dict[str, Any], folder: Path, name: str) -> Item:
    """
    The photo of a row of a table.

    Args:
        row (`dict`): `image` and `mask`, each contents, a path, an address, or a dictionary of `bytes` and `path`; and
            perhaps `key`.
        folder (`Path`): Where relative paths begin.
        name (`str`): What it is called if neither key nor path say so.
    """
    photo, file_name = _cell(row["image"], folder)
    mask = row.get("mask")
    key = row.get("key") or file_name or name
    if PurePosixPath(key).suffix.lower() not in picture_suffixes():
        key = f"{key}{_suffix_of(photo)}"
    return Item(str(key), photo, [] if mask is None else [_cell(mask, folder)[0]])


def _cell(value: Any, folder: Path) -> tuple[Path | bytes | str, str | None]:
    """A picture and its name, of contents, a path, an address, or a dictionary of contents and path."""
    contents, name = (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (value, None)
    if isinstance(contents, bytes):
        return contents, name and PurePosixPath(name).name
    path = str(contents or name or "")
    if path.startswith(("http://", "https://")):
        return path, PurePosixPath(path.partition("?")[0]).name
    return folder / path, PurePosixPath(path).name if Path(path).is_absolute() else path


def _suffix_of(photo: Path | bytes | str) -> str:
    image_format = None
    if isinstance(photo, bytes):
        try:
            with Image.open(io.BytesIO(photo)) as image:
                image_format = image.format
        except (OSError, ValueError):
            pass  # Reading it will say what is wrong.
    return {"JPEG": ".jpg", "MPO": ".jpg", "TIFF": ".tif", "WEBP": ".webp", "AVIF": ".avif"}.get(image_format, ".png")
