"""Photos of the demo's visitors: opening uploads within limits, the scaled view to paint on, and masks for both."""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from diffusers.utils import numpy_to_pil
from PIL import Image, ImageDraw

from ..pictures.files import ImageMetadata, read_image, write_image
from ..pictures.mask import dilate_mask
from ..pictures.picture import load_pictures

MAX_FILE_MEGABYTES = 50
MAX_MEGAPIXELS = 50
MIN_SIDE = 16
# Browsers of phones handle a canvas of this size; the photo itself stays on the server as it came.
VIEW_SIDE = 1280
# Strokes are drawn half transparent; what is fainter than this is the smoothed rim that an eraser leaves behind.
MIN_STROKE_ALPHA = 32
MARK_COLOR = (255, 64, 64)


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
        """The photo as RGB, its longer side at most `VIEW_SIDE` px."""
        image = self.image
        if image.mode not in ("RGB", "RGBA", "L", "LA"):
            image = numpy_to_pil(load_pictures(image)[0].rgb())[0]
        image = image.convert("RGB")
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
            "This file is not a picture that can be read here. JPEG, PNG, WebP and TIFF work; a HEIC photo of a phone "
            "must be shared as JPEG."
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


def painted_mask(layers: list[np.ndarray], size: tuple[int, int]) -> np.ndarray:
    """
    The mask that the editor's layers hold: what is painted, whatever its colour.

    Args:
        layers (`list[np.ndarray]`): RGBA layers, `[h, w, 4]`.
        size (`tuple[int, int]`): Width and height of the view.

    Returns:
        `np.ndarray` of shape `[height, width]`, boolean.
    """
    mask = np.zeros((size[1], size[0]), bool)
    for layer in layers:
        alpha = Image.fromarray(np.ascontiguousarray(layer[..., 3]))
        if alpha.size != size:
            alpha = alpha.resize(size, Image.Resampling.BILINEAR)
        mask |= np.asarray(alpha) >= MIN_STROKE_ALPHA
    return mask


def mask_layer(mask: np.ndarray) -> Image.Image:
    """A mask as a layer of the editor."""
    layer = np.zeros((*mask.shape, 4), np.uint8)
    layer[mask] = (*MARK_COLOR, 180)
    return Image.fromarray(layer)


def show_mask(view: Image.Image, mask: np.ndarray) -> Image.Image:
    """The view with the mask tinted."""
    picture = np.asarray(view).copy()
    picture[mask] = (0.4 * picture[mask] + 0.6 * np.asarray(MARK_COLOR)).astype(np.uint8)
    return Image.fromarray(picture)


def draw_outline(view: Image.Image, mask: np.ndarray) -> Image.Image:
    """The view with the rim of the mask in white and black, which shows on any photo."""
    picture = np.asarray(view).copy()
    width = max(1, round(max(mask.shape) / 600))
    inner = dilate_mask(mask, width)
    picture[dilate_mask(inner, width) & ~inner] = 0
    picture[inner & ~mask] = 255
    return Image.fromarray(picture)


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
