"""Photos of the demo's visitors: opening uploads within limits, the scaled view to paint on, and masks for both."""

import base64
import contextlib
import io
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from diffusers.utils import numpy_to_pil
from PIL import Image, ImageDraw

from ..pictures.files import ImageMetadata, read_image, write_image
from ..pictures.picture import load_pictures

with contextlib.suppress(ImportError):  # not on every machine; its files are then named as what they are
    from pillow_heif import register_heif_opener

    register_heif_opener()

MAX_FILE_MEGABYTES = 50
MAX_MEGAPIXELS = 50
MIN_SIDE = 16
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

    def view(self) -> Image.Image:
        """The photo as RGB or RGBA, its longer side at most `VIEW_SIDE` px."""
        image = self.image
        if image.mode not in ("RGB", "RGBA", "L", "LA"):
            image = numpy_to_pil(load_pictures(image)[0].rgb())[0]
        image = image.convert("RGBA" if image.has_transparency_data else "RGB")
        # `thumbnail` would work in place on what may be the photo itself.
        scale = min(1.0, VIEW_SIDE / max(image.size))
        size = tuple(max(1, round(side * scale)) for side in image.size)
        return image.copy() if size == image.size else image.resize(size, Image.Resampling.LANCZOS, reducing_gap=3)


def open_photo(path: str | Path, name: str | None = None) -> Photo:
    """
    Opens an uploaded file.

    Args:
        path (`str` or `Path`): The file.
        name (`str`, *optional*): The name that the visitor knows it by.

    Raises:
        VisitorError: If it is no picture, or larger than the demo takes.
    """
    path = Path(path)
    try:
        megabytes = path.stat().st_size / 1e6
    except OSError:
        raise VisitorError("The photo is no longer on the server. Please upload it again.") from None
    if megabytes > MAX_FILE_MEGABYTES:
        raise VisitorError(f"The file has {megabytes:.0f} MB; up to {MAX_FILE_MEGABYTES} MB are possible here.")
    try:
        with Image.open(path) as image:
            width, height = image.size
    except Image.DecompressionBombError:
        raise VisitorError(f"The picture is too large; up to {MAX_MEGAPIXELS} megapixels are possible here.") from None
    except Exception:  # Decoders raise anything on broken headers.
        raise VisitorError(
            "This file is not a picture that can be read here. JPEG, PNG, WebP, TIFF and HEIC, of phones, work."
        ) from None
    if width * height > MAX_MEGAPIXELS * 1e6:
        raise VisitorError(
            f"The picture has {width * height / 1e6:.0f} megapixels; up to {MAX_MEGAPIXELS} are possible here."
        )
    if min(width, height) < MIN_SIDE:
        raise VisitorError(f"The picture is {width}×{height} pixels; each side needs at least {MIN_SIDE}.")
    try:
        image, metadata = read_image(path)
    except ValueError as error:
        raise VisitorError(str(error).replace(str(path), "The file")) from None
    stem = Path(name or path.name).stem
    stem = "".join(c if c.isalnum() or c in "-_ " else "_" for c in stem)[:80].strip() or "photo"
    return Photo(image, metadata, stem)


def picture_url(image: Image.Image) -> str:
    """A picture as a data URL for the page, so that no copy of it lies on the server."""
    file = io.BytesIO()
    image.save(file, "WEBP", quality=90, method=2)
    return "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode()


def mask_url(mask: np.ndarray) -> str:
    """A mask as a data URL of a black and white picture."""
    file = io.BytesIO()
    Image.fromarray(mask).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


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
            return np.asarray(image.convert("RGBA"))[..., 3] >= 128
    except (ValueError, OSError) as error:
        raise VisitorError("What was painted did not arrive whole. Please try again.") from error


def scale_mask(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """
    A mask at another size, with smooth instead of stepped edges where it grows.

    Args:
        mask (`np.ndarray` of shape `[h, w]`): Boolean.
        size (`tuple[int, int]`): Width and height to be.
    """
    if (mask.shape[1], mask.shape[0]) == size:
        return mask
    image = Image.fromarray(mask.astype(np.uint8) * 255)
    return np.asarray(image.resize(size, Image.Resampling.BILINEAR)) >= 128


def save_photo(photo: Photo, folder: Path, file_format: str) -> Path:
    """
    Writes the download: PNG has exactly the pixels of the photo, JPEG is smaller.

    Args:
        photo (`Photo`): The photo.
        folder (`Path`): Where to.
        file_format (`str`): `"PNG"` or `"JPEG"`.
    """
    image = photo.image
    path = folder / f"{photo.name}-moebius.{'jpg' if file_format == 'JPEG' else 'png'}"
    if (file_format == "JPEG" and image.mode not in ("RGB", "L", "CMYK")) or image.mode in ("CMYK", "F"):
        image = numpy_to_pil(load_pictures(image)[0].rgb())[0]
    try:
        write_image(image, path, photo.metadata, overwrite=True)
    except ValueError:  # Metadata that does not fit this format: the picture is worth more.
        write_image(image, path, overwrite=True)
    return path


def context_pixels(mask: np.ndarray, percent: float) -> int:
    """How many pixels around the mask the model sees: a share of the mask's longer side, at least 32."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    longer = max(rows[-1] - rows[0], columns[-1] - columns[0]) + 1
    return max(32, math.ceil(longer * percent / 100))


def polygon_mask(size: tuple[int, int], polygons: list[list[tuple[float, float]]]) -> np.ndarray:
    """A mask of filled polygons, in pixels."""
    image = Image.new("L", size)
    for polygon in polygons:
        ImageDraw.Draw(image).polygon(polygon, fill=255)
    return np.asarray(image) > 0
