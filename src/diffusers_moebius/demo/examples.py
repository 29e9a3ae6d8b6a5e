"""Photos with masks to try the demo with, from scikit-image (public domain and CC0)."""

import functools
import math
from dataclasses import dataclass

import numpy as np
from PIL import Image

from ..pictures.files import ImageMetadata
from .photos import Photo, polygon_mask


@dataclass(frozen=True)
class Example:
    """
    A photo with a mask.

    Args:
        title (`str`): What is to be removed.
        picture (`str`): Name of the photo in `skimage.data`.
        polygons (`tuple`): Polygons of the mask, in pixels.
    """

    title: str
    picture: str
    polygons: tuple

    @functools.cache  # noqa: B019, there are a few, and they live as long as the app
    def load(self) -> tuple[Photo, np.ndarray]:
        """The photo and its mask, a boolean array."""
        from skimage import data

        image = Image.fromarray(getattr(data, self.picture)())
        return Photo(image, ImageMetadata(), self.picture), polygon_mask(image.size, self.polygons)

    def thumbnail(self) -> Image.Image:
        """A small picture of it, what is to be removed tinted red."""
        photo, mask = self.load()
        pixels = np.asarray(photo.image.convert("RGB")).copy()
        pixels[mask] = 0.5 * pixels[mask] + 0.5 * np.array([255, 64, 64])
        picture = Image.fromarray(pixels)
        picture.thumbnail((320, 320))
        return picture


def _disc(x: float, y: float, radius_x: float, radius_y: float) -> tuple:
    angles = [math.tau * k / 48 for k in range(48)]
    return tuple((x + radius_x * math.cos(a), y + radius_y * math.sin(a)) for a in angles)


EXAMPLES = (
    Example(
        "The rocket",
        "rocket",
        (
            (
                (295, 135),
                (320, 118),
                (346, 135),
                (346, 300),
                (362, 345),
                (362, 405),
                (280, 405),
                (280, 345),
                (300, 340),
            ),
        ),
    ),
    Example(
        "The spoon",
        "coffee",
        (
            _disc(365, 285, 48, 48),
            ((396, 64), (428, 64), (422, 112), (396, 225), (350, 262), (312, 255), (350, 225), (382, 190), (400, 130)),
        ),
    ),
    Example("The mission patch", "astronaut", (_disc(172, 386, 44, 44),)),
    Example(
        "The model shuttle",
        "astronaut",
        (((400, 0), (436, 0), (462, 45), (462, 175), (478, 215), (478, 290), (350, 290), (348, 190), (370, 40)),),
    ),
)


def available_examples() -> tuple[Example, ...]:
    """The examples, or none where scikit-image is not installed."""
    try:
        import skimage.data  # noqa: F401
    except ImportError:
        return ()
    return EXAMPLES
