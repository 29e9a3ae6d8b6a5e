"""Visitors' photos: opening uploads within limits, the view that is painted on, and pictures as data URLs."""

import base64
import functools
import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from diffusers.utils import numpy_to_pil
from PIL import Image

from ..pictures.files import ImageMetadata, read_image, write_image
from ..pictures.picture import load_pictures

MAX_FILE_MEGABYTES = 50  # which gradio sees to
MAX_MEGAPIXELS = 50
# Browsers of phones handle a canvas of this size; the photo itself stays on the server as it came.
VIEW_SIDE = 1280


class VisitorError(Exception):
    """An error whose message is meant for the visitor and names nothing of the server."""


@dataclass
class Photo:
    """
    An upright photo in full resolution.

    Args:
        image (`PIL.Image.Image`): The pixels, in the mode of the file.
        metadata (`ImageMetadata`): EXIF, ICC profile and the like.
        name (`str`): File name without suffix, for the download.
    """

    image: Image.Image
    metadata: ImageMetadata
    name: str

    @functools.cached_property
    def view(self) -> Image.Image:
        """The photo as RGB or RGBA, its longer side at most `VIEW_SIDE` px."""
        image = self.image
        if image.mode not in ("RGB", "RGBA", "L", "LA"):
            image = numpy_to_pil(load_pictures(image)[0].rgb())[0]
        image = image.convert("RGBA" if image.has_transparency_data else "RGB")
        scale = min(1.0, VIEW_SIDE / max(image.size))
        return image.resize(
            tuple(max(1, round(side * scale)) for side in image.size), Image.Resampling.LANCZOS, reducing_gap=3
        )


def open_photo(path: str | Path, name: str | None = None) -> Photo:
    """
    Opens an uploaded file.

    Args:
        path (`str` or `Path`): The file.
        name (`str`, *optional*): The name that the visitor knows it by.

    Raises:
        VisitorError: If it is no picture, or larger than the demo takes.
    """
    try:
        image, metadata = read_image(path, "This file", MAX_MEGAPIXELS)
    except ValueError as error:
        kinds = f"JPEG, PNG, WebP, TIFF and HEIC, of phones, work, up to {MAX_MEGAPIXELS} megapixels."
        raise VisitorError(f"{str(error).rstrip('.')}. {kinds}") from None
    stem = "".join(c if c.isalnum() or c in "-_ " else "_" for c in Path(name or path).stem)
    return Photo(image, metadata, stem[:80].strip() or "photo")


def picture_url(image: Image.Image, lossless: bool = False) -> str:
    """A picture as a data URL for the page, so that no copy of it lies on the server."""
    file = io.BytesIO()
    image.save(file, "WEBP", quality=90, method=2, lossless=lossless)
    return "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode()


def painted_mask(url: str | None, size: tuple[int, int]) -> np.ndarray:
    """
    The mask that the editor sends: what is opaque in a PNG.

    Args:
        url (`str`, *optional*): A data URL.
        size (`tuple[int, int]`): Width and height of the view.

    Returns:
        `np.ndarray` of shape `[height, width]`, boolean; empty for none.
    """
    if not url:
        return np.zeros((size[1], size[0]), bool)
    try:
        with Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])), formats=["PNG"]) as image:
            if image.size != size:
                raise ValueError(f"the mask has {image.size} pixels, and the view {size}")
            return np.asarray(image.convert("RGBA").getchannel("A")) >= 128
    except (ValueError, OSError) as error:
        raise VisitorError("What was painted did not arrive whole. Please try again.") from error


def save_photo(photo: Photo, folder: Path, file_format: str) -> Path:
    """
    Writes the download: PNG has exactly the pixels of the photo, JPEG is smaller.

    Args:
        photo (`Photo`): The photo.
        folder (`Path`): Where to.
        file_format (`str`): `"PNG"` or `"JPEG"`.
    """
    path = folder / f"{photo.name}-moebius.{'jpg' if file_format == 'JPEG' else 'png'}"
    try:
        write_image(photo.image, path, photo.metadata, overwrite=True)
    except ValueError:  # Metadata that does not fit this format: the picture is worth more.
        write_image(photo.image, path, overwrite=True)
    return path
