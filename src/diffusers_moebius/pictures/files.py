"""Photo files in and out: upright pixels, metadata that survives, and outputs that are complete or absent."""

import io
import math
import os
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

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
}
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


def read_image(path: str | os.PathLike) -> tuple[Image.Image, ImageMetadata]:
    """
    Reads a picture file, turned upright by its EXIF orientation, in a mode that can take any new pixels.

    Palette pictures become RGB, bilevel ones grey, and a transparent colour becomes an alpha channel; every other mode
    (16-bit, CMYK, alpha) stays as it is.

    Args:
        path (`str` or `os.PathLike`): A file in any format that Pillow reads. Of a photo with auxiliary pictures
            (MPO, which phones write) the photo itself is read.

    Returns:
        `tuple[PIL.Image.Image, ImageMetadata]`: The picture, and what [`write_image`] needs to keep its metadata.

    Raises:
        ValueError: If the file is no picture, is broken, animated, or has more pixels than Pillow deems safe.
    """
    path = Path(path)
    with path.open("rb") as file, warnings.catch_warnings():
        # Pillow warns from half of the size on that it refuses; photos of 100 megapixels are ordinary ones.
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        try:
            image = Image.open(file)
            frames = getattr(image, "n_frames", 1)
            is_reduced = image.mode == "RGB" and ";16" in str(image.tile)
            image.load()
            upright = _without_palette(ImageOps.exif_transpose(image))
            metadata = _metadata(image)
        except Image.UnidentifiedImageError:
            raise ValueError(f"{path} is not a picture in a format that Pillow reads.") from None
        except Exception as error:  # On broken files decoders raise anything from OSError to struct.error.
            raise ValueError(f"{path} cannot be read as a picture: {error}") from error
    if frames > 1 and image.format != "MPO":
        raise ValueError(f"{path} has {frames} frames or pages; only single pictures are allowed.")
    if 0 in upright.size:
        raise ValueError(f"{path} is {upright.width}×{upright.height} pixels; a picture has at least one.")
    if is_reduced:
        warnings.warn(f"{path} has 16 bits a channel, of which Pillow reads 8 in colour pictures.", stacklevel=2)
    return upright, metadata


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


def check_output(path: str | os.PathLike, mode: str, metadata: ImageMetadata | None = None, overwrite: bool = False):
    """
    Checks, before any work is done, that [`write_image`] can write such a picture to such a path.

    Args:
        path (`str` or `os.PathLike`): The file to be written; its suffix decides the format.
        mode (`str`): The Pillow mode of the picture.
        metadata (`ImageMetadata`, *optional*): The metadata to be written.
        overwrite (`bool`, defaults to `False`): Whether an existing file may be replaced.

    Raises:
        ValueError: If the suffix names no format that Pillow writes, the format cannot hold such pixels or metadata,
            the folder does not exist, or the file exists and `overwrite` is not set.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"The output {path} is a folder.")
    if not path.parent.is_dir():
        raise ValueError(f"The folder {path.parent} of the output {path} does not exist.")
    if path.exists() and not overwrite:
        raise ValueError(f"The output {path} exists already, and overwriting it was not asked for.")
    try:
        # One pixel tells the same as the whole picture, so that no table of formats and modes is needed here.
        _save(Image.new(mode, (1, 1)), io.BytesIO(), _format_of(path), metadata or ImageMetadata())
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"The output {path} cannot hold this picture of mode {mode}: {error}") from error


def write_image(
    image: Image.Image, path: str | os.PathLike, metadata: ImageMetadata | None = None, overwrite: bool = False
):
    """
    Writes a picture file that is complete or absent, whatever interrupts the writing.

    A JPEG that comes from a JPEG keeps its quantisation tables and chroma subsampling; other JPEGs are written at
    quality 95 without subsampling. WebP and TIFF are written without loss.

    Args:
        image (`PIL.Image.Image`): The picture.
        path (`str` or `os.PathLike`): The file to be written; its suffix decides the format.
        metadata (`ImageMetadata`, *optional*): What [`read_image`] returned for the picture that this one is made
            from. An ICC profile of another colour space than the picture's is left out.
        overwrite (`bool`, defaults to `False`): Whether an existing file may be replaced.

    Raises:
        ValueError: As in [`check_output`].
    """
    metadata = metadata or ImageMetadata()
    check_output(path, image.mode, metadata, overwrite)
    target = Path(os.path.realpath(path))  # A link stays a link; the file that it names is replaced.
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("xb") as file:
            _save(image, file, _format_of(target), metadata)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def _format_of(path: Path) -> str:
    image_format = Image.registered_extensions().get(path.suffix.lower())
    if image_format not in Image.SAVE:
        raise ValueError(
            f"its suffix {path.suffix!r} names no format that can be written, such as .png, .jpg, .webp or .tif."
        )
    return image_format


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
