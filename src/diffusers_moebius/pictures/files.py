"""Photo files in and out: upright pixels, metadata that survives, and outputs that are complete or absent."""

import io
import math
import os
import re
import shutil
import tempfile
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import ExifTags, Image, ImageOps, JpegImagePlugin

# What a TIFF's first directory says about the picture; its other tags describe how that one file stores the pixels.
_TIFF_DESCRIPTIVE_TAGS = {
    ExifTags.Base.DocumentName,
    ExifTags.Base.ImageDescription,
    ExifTags.Base.Make,
    ExifTags.Base.Model,
    ExifTags.Base.Software,
    ExifTags.Base.DateTime,
    ExifTags.Base.Artist,
    ExifTags.Base.HostComputer,
    ExifTags.Base.Copyright,
    ExifTags.Base.ExifOffset,
    ExifTags.Base.GPSInfo,
    700,  # XMP
    33723,  # IPTC
}
_LOSSLESS_TIFF_COMPRESSIONS = ("raw", "packbits", "tiff_lzw", "tiff_deflate", "tiff_adobe_deflate")
# Where a format can be lossless it is, since the pixels outside the mask are not to change.
_SAVE_DEFAULTS = {
    "JPEG": {"quality": 95, "subsampling": 0},
    "WEBP": {"lossless": True, "exact": True},
    "TIFF": {"compression": "tiff_adobe_deflate"},
    "AVIF": {"quality": 95, "subsampling": "4:4:4"},
    "HEIF": {"quality": 95, "chroma": 444},
}
# Where a format cannot hold a mode: what it is made into, and what is lost.
_REDUCTIONS = {
    "RGBA": ("RGB", "what is transparent is laid on white"),
    "LA": ("L", "what is transparent is laid on white"),
    "CMYK": ("RGB", "CMYK becomes RGB"),
    "I;16": ("L", "16 bits are rounded to 8"),
    "I": ("L", "16 bits are rounded to 8"),
    "F": ("L", "floats are rounded to 8 bits"),
}
# Modes that a format takes and stores as something else.
_MISTAKEN = dict.fromkeys(("WEBP", "AVIF", "HEIF", "GIF"), ("CMYK", "I;16", "I", "F"))
# Python's warning filters belong to the process; photos are read by several threads.
_FILTER_LOCK = threading.Lock()
_HEIF_SUFFIXES = (".heic", ".heif", ".hif")
_MODES_OF_ICC_SPACE = {b"GRAY": ("1", "L", "LA", "I", "I;16", "F"), b"CMYK": ("CMYK",)}


@dataclass(frozen=True)
class ImageMetadata:
    """
    What a picture file holds beside its pixels, as arguments for `PIL.Image.Image.save`.

    Args:
        format (`str`, *optional*): Pillow's name of the file's format, such as `"JPEG"`.
        tags (`dict`): ICC profile, EXIF (orientation removed, since the pixels are upright; no embedded thumbnail,
            since it would show the picture from before), XMP and resolution.
        encoding (`dict`): What only a file of the same format can use: quantisation tables, compression.
    """

    format: str | None = None
    tags: dict[str, Any] = field(default_factory=dict)
    encoding: dict[str, Any] = field(default_factory=dict)


def picture_suffixes() -> set[str]:
    """The suffixes, in lower case, of files that are pictures."""
    return {*Image.registered_extensions(), *_HEIF_SUFFIXES}


def read_image(
    file: str | os.PathLike | bytes, name: str | None = None, max_megapixels: float | None = None
) -> tuple[Image.Image, ImageMetadata]:
    """
    Reads a picture file, turned upright by its EXIF orientation, in a mode that can take any new pixels.

    Palette pictures become RGB, bilevel ones grey, and a transparent colour becomes an alpha channel; every other mode
    (16-bit grey, CMYK, alpha) stays as it is. Of colour with 16 bits a channel Pillow reads 8.

    Args:
        file (`str`, `os.PathLike` or `bytes`): A file in any format that Pillow reads, or what is in it; HEIC needs
            the package pillow-heif. Of a photo with auxiliary pictures (MPO and HEIC, which phones write) the photo
            itself is read.
        name (`str`, *optional*): What errors call the file; its path by default.
        max_megapixels (`float`, *optional*): A larger picture is refused before its pixels are read.

    Returns:
        `tuple[PIL.Image.Image, ImageMetadata]`: The picture, and what [`write_image`] needs to keep its metadata.

    Raises:
        ValueError: If the file is no picture, is broken, animated, or has more pixels than Pillow deems safe or
            `max_megapixels` allow.
    """
    name = name or ("the picture" if isinstance(file, bytes) else str(file))
    with io.BytesIO(file) if isinstance(file, bytes) else open(file, "rb") as source:
        header = source.read(12)
        if header[4:8] == b"ftyp" and not header.startswith(b"avi", 8):
            _register_heif(name)
        try:
            with _FILTER_LOCK, warnings.catch_warnings():
                # Pillow warns from half of the size on that it refuses; photos of 100 megapixels are ordinary ones.
                warnings.simplefilter("ignore", Image.DecompressionBombWarning)
                image = Image.open(source)
            megapixels = image.width * image.height / 1e6
            if max_megapixels is not None and megapixels > max_megapixels:
                raise ValueError(f"it has {megapixels:.3g} megapixels, and at most {max_megapixels} are allowed")
            frames = getattr(image, "n_frames", 1)
            is_reduced = image.mode == "RGB" and ";16" in str(image.tile)
            image.load()
            upright = _without_palette(ImageOps.exif_transpose(image))
            metadata = _metadata(image)
        except Image.UnidentifiedImageError:
            raise ValueError(f"{name} is not a picture in a format that Pillow reads.") from None
        except Exception as error:  # On broken files decoders raise anything from OSError to struct.error.
            raise ValueError(f"{name} cannot be read as a picture: {error}") from error
    if frames > 1 and image.format not in ("MPO", "HEIF"):
        raise ValueError(f"{name} has {frames} frames or pages; only single pictures are allowed.")
    if 0 in upright.size:
        raise ValueError(f"{name} is {upright.width}×{upright.height} pixels; a picture has at least one.")
    if is_reduced:
        warnings.warn(f"{name} has 16 bits a channel, of which Pillow reads 8 in colour pictures.", stacklevel=2)
    return upright, metadata


def _register_heif(name: str | os.PathLike):
    try:
        from pillow_heif import register_heif_opener
    except ImportError:
        raise ValueError(f"{name} is HEIC, which needs `pip install diffusers-moebius[heic]`.") from None
    register_heif_opener()


def _without_palette(image: Image.Image) -> Image.Image:
    if image.has_transparency_data:
        return image.convert("LA" if image.mode in ("1", "L", "LA") else "RGBA")
    return image.convert({"1": "L", "P": "RGB", "RGBX": "RGB"}.get(image.mode, image.mode))


def _metadata(image: Image.Image) -> ImageMetadata:
    exif = image.getexif()
    sideways = exif.get(ExifTags.Base.Orientation, 1) >= 5
    exif.pop(ExifTags.Base.Orientation, None)
    if image.format == "TIFF":
        for tag in set(exif) - _TIFF_DESCRIPTIVE_TAGS:
            del exif[tag]

    tags = {key: image.info[key] for key in ("icc_profile", "xmp") if image.info.get(key)}
    if len(exif):
        tags["exif"] = exif.tobytes()
    dpi = image.info.get("dpi")
    if dpi and all(math.isfinite(value) and value > 0 for value in dpi):
        tags["dpi"] = tuple(float(value) for value in (reversed(dpi) if sideways else dpi))

    encoding = {}
    if image.format in ("JPEG", "MPO"):
        subsampling = JpegImagePlugin.get_sampling(image)
        if subsampling == 1 and sideways:
            subsampling = 0  # Pillow cannot write 4:4:0, which 4:2:2 has become.
        encoding["qtables"] = image.quantization
        encoding["progressive"] = "progressive" in image.info
        if subsampling >= 0:
            encoding["subsampling"] = subsampling
    elif image.format == "TIFF" and image.info.get("compression") in _LOSSLESS_TIFF_COMPRESSIONS:
        encoding["compression"] = image.info["compression"]
    return ImageMetadata("JPEG" if image.format == "MPO" else image.format, tags, encoding)


def check_output(
    path: str | os.PathLike, mode: str, metadata: ImageMetadata | None = None, overwrite: bool = False
) -> str | None:
    """
    Checks, before any work is done, that [`write_image`] can write such a picture to such a path.

    Args:
        path (`str` or `os.PathLike`): The file to be written; its suffix decides the format.
        mode (`str`): The Pillow mode of the picture.
        metadata (`ImageMetadata`, *optional*): The metadata to be written.
        overwrite (`bool`, defaults to `False`): Whether an existing file may be replaced.

    Returns:
        `str`, *optional*: What the format cannot hold of such a picture, in words.

    Raises:
        ValueError: If the suffix names no format that Pillow writes, the format cannot hold such pixels or metadata
            in any way, its folder is a file, or the file exists and `overwrite` is not set.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"The output {path} is a folder.")
    folder = next(folder for folder in path.parents if folder.exists())
    if not folder.is_dir():
        raise ValueError(f"The output {path} would be in {folder}, which is a file.")
    if path.exists() and not overwrite:
        raise ValueError(
            f"The output {path} exists already; it is replaced on request only (`overwrite`, `--overwrite`)."
        )
    return _check_format(path, mode, metadata or ImageMetadata())


def write_image(
    image: Image.Image, path: str | os.PathLike, metadata: ImageMetadata | None = None, overwrite: bool = False
):
    """
    Writes a picture file that is complete or absent, whatever interrupts the writing; makes its folder if need be.

    A JPEG that comes from a JPEG keeps its quantisation tables and chroma subsampling; other JPEGs are written at
    quality 95 without subsampling. WebP and TIFF are written without loss. A format that cannot hold the picture's
    mode gets what comes nearest: transparency laid on white, RGB of CMYK, 8 of 16 bits.

    Args:
        image (`PIL.Image.Image`): The picture.
        path (`str` or `os.PathLike`): The file to be written; its suffix decides the format.
        metadata (`ImageMetadata`, *optional*): What [`read_image`] returned for the picture that this one is made
            from. An ICC profile of another colour space than the picture's is left out.
        overwrite (`bool`, defaults to `False`): Whether an existing file may be replaced.

    Raises:
        ValueError: As in [`check_output`].
    """
    check_output(path, image.mode, metadata, overwrite)
    with replace_file(path) as file:
        file.write(encode_image(image, path, metadata))


def encode_image(image: Image.Image, name: str | os.PathLike, metadata: ImageMetadata | None = None) -> bytes:
    """
    What [`write_image`] would write.

    Args:
        image (`PIL.Image.Image`): The picture.
        name (`str` or `os.PathLike`): A file name; its suffix decides the format.
        metadata (`ImageMetadata`, *optional*): As in [`write_image`].

    Returns:
        `bytes`: The contents of a picture file.
    """
    name, metadata, file = Path(name), metadata or ImageMetadata(), io.BytesIO()
    if _check_format(name, image.mode, metadata):
        image = _reduce(image)
    _save(image, file, _format_of(name), metadata)
    return file.getvalue()


@contextmanager
def replace_file(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """
    Opens a file that takes the place of another when the block ends, and vanishes when an error ends it.

    Args:
        path (`str` or `os.PathLike`): The file to be replaced, or made, with its folder. A link stays; what it names
            is replaced.
    """
    target = Path(os.path.realpath(path))
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("xb") as file:
            yield file
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def replace_folder(path: str | os.PathLike) -> Iterator[Path]:
    """
    Gives a folder to write into, of the same name, that takes the place of another when the block ends.

    An error leaves what was there before.

    Args:
        path (`str` or `os.PathLike`): The folder to be replaced, or made, with its parents.
    """
    target = Path(path).absolute()
    target.parent.mkdir(parents=True, exist_ok=True)
    # On the same file system, so that the finished folder gets its place by renaming.
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    new, old = scratch / target.name, scratch / f"{target.name}.old"
    try:
        yield new
        if target.exists():
            target.rename(old)
        new.rename(target)
    finally:
        if old.exists() and not target.exists():
            old.rename(target)
        shutil.rmtree(scratch, ignore_errors=True)


def remove_leftovers(folder: str | os.PathLike):
    """
    Removes what [`replace_file`] could not, in and below a folder, because its process was killed.

    Args:
        folder (`str` or `os.PathLike`): The folder.
    """
    for path in Path(folder).rglob(".*.tmp"):
        process = re.fullmatch(r"\..+\.(\d+)\.tmp", path.name)
        if process and not _is_running(int(process[1])):
            path.unlink(missing_ok=True)


def _is_running(process: int) -> bool:
    if os.name != "posix":
        return True  # Windows has no signal that does nothing.
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


def _format_of(path: Path) -> str:
    if path.suffix.lower() in _HEIF_SUFFIXES:
        _register_heif(path)
    image_format = Image.registered_extensions().get(path.suffix.lower())
    if image_format not in Image.SAVE:
        raise ValueError(
            f"its suffix {path.suffix!r} names no format that can be written, such as .png, .jpg, .webp or .tif."
        )
    return image_format


def _check_format(path: Path, mode: str, metadata: ImageMetadata) -> str | None:
    """Raises a ValueError if no picture can be written, else says what is lost."""
    reduced, loss = _REDUCTIONS.get(mode, (mode, None))
    try:
        image_format = _format_of(path)
        # One pixel tells the same as the whole picture, so that no table of formats and modes is needed here.
        try:
            if mode in _MISTAKEN.get(image_format, ()):
                raise OSError
            _save(Image.new(mode, (1, 1)), io.BytesIO(), image_format, metadata)
        except OSError:
            if reduced == mode:
                raise
            _save(Image.new(reduced, (1, 1)), io.BytesIO(), image_format, metadata)
            return f"{image_format} cannot hold all of {path.name}: {loss}"
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"The output {path} cannot hold this picture of mode {mode}: {error}") from error
    return None


def _reduce(image: Image.Image) -> Image.Image:
    mode, _ = _REDUCTIONS[image.mode]
    if image.mode in ("LA", "RGBA"):
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image.convert("RGBA")).convert(mode)
    if image.mode == "CMYK":
        return image.convert(mode)
    peak = 1 if image.mode == "F" else 65535
    return Image.fromarray(np.rint(np.asarray(image, np.float64) * (255 / peak)).astype(np.uint8))


def _save(image: Image.Image, file: io.IOBase, image_format: str, metadata: ImageMetadata):
    options = dict(metadata.tags)
    space = options.get("icc_profile", b"")[16:20]
    if space and image.mode not in _MODES_OF_ICC_SPACE.get(space, ("P", "PA", "RGB", "RGBA", "RGBX", "LAB")):
        options["icc_profile"] = None
    if image_format == metadata.format and metadata.encoding:
        options |= metadata.encoding
    else:
        options |= _SAVE_DEFAULTS.get(image_format, {})
    if image_format == "TIFF" and "exif" in options:
        exif = Image.Exif()
        exif.load(options["exif"])
        if ExifTags.IFD.Exif in exif or ExifTags.IFD.GPSInfo in exif:
            options["compression"] = "raw"  # Pillow writes directories within the first one only without libtiff.
    image.save(file, format=image_format, **options)
