"""Where results go: files, WebDataset shards, Parquet files. What is written is complete or absent."""

import io
import tarfile
import threading
from collections.abc import Callable
from pathlib import Path, PurePosixPath

from PIL import Image

from ..pictures.files import check_output, encode_image, remove_leftovers, replace_file, write_image
from .photo import Item, Photo
from .sources import open_parquet

PREVIEW_SIDE = 1024


class FileSink:
    """
    A picture file a photo.

    Args:
        target_of (`Callable`): The path of a photo's result.
        overwrite (`bool`, defaults to `False`): Whether existing files are replaced.
        preview (`bool`, defaults to `False`): Whether photo, mask and result are written side by side as well.
    """

    def __init__(self, target_of: Callable[[Item], Path], overwrite: bool = False, preview: bool = False):
        self.target_of, self.overwrite, self.preview = target_of, overwrite, preview
        self._sources: dict[Path, str] = {}

    def holds(self, item: Item) -> bool:
        """Whether a photo's result is there already."""
        try:
            return self.target_of(item).exists()
        except ValueError:  # `check` says why
            return False

    def check(self, photo: Photo) -> list[str]:
        """Checks that a photo's result can be written, and says what its format cannot hold."""
        target = self.target_of(photo.item)
        first = self._sources.setdefault(target, photo.item.key)
        if first != photo.item.key:
            raise ValueError(f"{photo.item.name} and {first} would both be written to {target}.")
        loss = check_output(target, photo.image.mode, photo.metadata, self.overwrite)
        if self.preview:
            check_output(_preview_of(target), "RGB", overwrite=self.overwrite)
        return [loss] if loss else []

    def write(self, photo: Photo, result: Image.Image) -> list[Path]:
        """Writes a result; returns the paths that are complete by now."""
        target = self.target_of(photo.item)
        write_image(result, target, photo.metadata, self.overwrite)
        if not self.preview:
            return [target]
        preview = _preview_of(target)
        write_image(_side_by_side(photo, result), preview, overwrite=self.overwrite)
        return [target, preview]

    def close(self) -> list[Path]:
        """Writes what is left; returns the paths."""
        return []


def _preview_of(target: Path) -> Path:
    return target.with_name(f"{target.name}.preview.png")


def _side_by_side(photo: Photo, result: Image.Image) -> Image.Image:
    from diffusers.utils import make_image_grid, numpy_to_pil

    from ..pictures.picture import load_pictures

    pictures = [photo.image, Image.fromarray(photo.mask), result]
    pictures = [numpy_to_pil(picture.rgb())[0] for picture in load_pictures(pictures)]
    for picture in pictures:
        picture.thumbnail((PREVIEW_SIDE, PREVIEW_SIDE))
    return make_image_grid(pictures, rows=1, cols=3)


def named_in(folder: Path, pattern: str = "{folder}/{name}") -> Callable[[Item], Path]:
    """
    Where in a folder results go.

    Args:
        folder (`Path`): The folder.
        pattern (`str`): Path below it, in which `{folder}`, `{name}`, `{stem}` and `{suffix}` stand for the parts of
            the photo's own.

    Returns:
        `Callable`: The path of a photo's result.

    Raises:
        ValueError: If the pattern names something else, or a result would be outside the folder.
    """

    def target_of(item: Item) -> Path:
        key = PurePosixPath(item.key)
        parts = {"folder": str(key.parent), "name": key.name, "stem": key.stem, "suffix": key.suffix}
        try:
            path = PurePosixPath(pattern.format(**parts))
        except (KeyError, IndexError, ValueError) as error:
            raise ValueError(
                f"`--output-pattern` may hold {{folder}}, {{name}}, {{stem}} and {{suffix}}, but is {pattern!r}."
            ) from error
        if path.is_absolute() or ".." in path.parts:
            raise ValueError(f"{item.key} would be written outside {folder}, to {path}.")
        return folder / path

    target_of(Item("name.png", b"", []))
    remove_leftovers(folder)
    return target_of


class ShardSink:
    """
    Results as WebDataset shards (`.tar`) or Parquet files (columns `key` and `image`) of one folder.

    A shard appears when it is full, or at the end; results that a killed process had not written yet are made again.

    Args:
        folder (`Path`): The folder; made if need be.
        suffix (`str`): `".tar"` or `".parquet"`.
        size (`int`): Photos a shard.
    """

    def __init__(self, folder: Path, suffix: str, size: int):
        self.folder, self.suffix, self.size = folder, suffix, size
        remove_leftovers(folder)
        shards = sorted(folder.glob(f"*{suffix}"))
        self._number = 1 + max((int(shard.stem) for shard in shards if shard.stem.isdigit()), default=-1)
        keys_in = _keys_in_tar if suffix == ".tar" else _keys_in_parquet
        self._keys = {key for shard in shards for key in keys_in(shard)}
        self._rows: list[tuple[str, bytes]] = []
        self._lock = threading.Lock()

    def holds(self, item: Item) -> bool:
        """Whether a photo's result is there already."""
        return item.key in self._keys

    def check(self, photo: Photo) -> list[str]:
        """Checks that a photo's result can be written, and says what its format cannot hold."""
        loss = check_output(self.folder / photo.item.key, photo.image.mode, photo.metadata, overwrite=True)
        with self._lock:
            if photo.item.key in self._keys:
                raise ValueError(f"There are two photos of the name {photo.item.key}.")
            self._keys.add(photo.item.key)
        return [loss] if loss else []

    def write(self, photo: Photo, result: Image.Image) -> list[Path]:
        """Writes a result; returns the paths that are complete by now."""
        contents = encode_image(result, photo.item.key, photo.metadata)
        with self._lock:
            self._rows.append((photo.item.key, contents))
            return self._write_shard() if len(self._rows) >= self.size else []

    def close(self) -> list[Path]:
        """Writes what is left; returns the paths."""
        with self._lock:
            return self._write_shard() if self._rows else []

    def _write_shard(self) -> list[Path]:
        path = self.folder / f"{self._number:05d}{self.suffix}"
        rows, self._rows = sorted(self._rows), []
        self._number += 1
        with replace_file(path) as file:
            if self.suffix == ".tar":
                with tarfile.open(fileobj=file, mode="w") as archive:
                    for key, contents in rows:
                        member = tarfile.TarInfo(key)
                        member.size = len(contents)
                        archive.addfile(member, io.BytesIO(contents))
            else:
                import pyarrow
                from pyarrow.parquet import write_table

                keys, pictures = zip(*rows)
                images = pyarrow.array(pictures, pyarrow.large_binary())
                write_table(pyarrow.table({"key": pyarrow.array(keys), "image": images}), file, compression="none")
        return [path]


def _keys_in_tar(shard: Path) -> list[str]:
    with tarfile.open(shard) as archive:
        return archive.getnames()


def _keys_in_parquet(shard: Path) -> list[str]:
    return open_parquet(shard).read(columns=["key"]).column("key").to_pylist()
