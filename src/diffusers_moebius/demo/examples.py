"""Photos with masks to try the demo with, from scikit-image (public domain and CC0)."""

import functools
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from ..pictures.files import ImageMetadata
from .photos import Photo


@dataclass(frozen=True)
class Example:
    """A photo with a mask of what is to be removed."""

    title: str
    picture: str  # in `skimage.data`
    shapes: tuple[tuple[int, ...], ...]  # x, y, x, y…: the box of an ellipse, or more corners, of a polygon

    @functools.cache  # noqa: B019, there are a few, and they live as long as the app
    def load(self) -> tuple[Photo, np.ndarray]:
        """The photo and its mask, a boolean array."""
        from skimage import data

        image = Image.fromarray(getattr(data, self.picture)())
        mask = Image.new("1", image.size)
        draw = ImageDraw.Draw(mask)
        for shape in self.shapes:
            (draw.ellipse if len(shape) == 4 else draw.polygon)(shape, fill=1)
        return Photo(image, ImageMetadata(), self.picture), np.asarray(mask)

    def thumbnail(self) -> Image.Image:
        """A small picture of it, what is to be removed tinted red."""
        photo, mask = self.load()
        picture = photo.image.convert("RGB")
        picture.paste(
            Image.blend(picture, Image.new("RGB", picture.size, (255, 64, 64)), 0.5), mask=Image.fromarray(mask)
        )
        picture.thumbnail((320, 320))
        return picture


EXAMPLES = (
    Example(
        "The rocket",
        "rocket",
        ((295, 135, 320, 118, 346, 135, 346, 300, 362, 345, 362, 405, 280, 405, 280, 345, 300, 340),),
    ),
    Example(
        "The spoon",
        "coffee",
        (
            (317, 237, 413, 333),
            (396, 64, 428, 64, 422, 112, 396, 225, 350, 262, 312, 255, 350, 225, 382, 190, 400, 130),
        ),
    ),
    Example("The mission patch", "astronaut", ((128, 342, 216, 430),)),
    Example(
        "The model shuttle",
        "astronaut",
        ((400, 0, 436, 0, 462, 45, 462, 175, 478, 215, 478, 290, 350, 290, 348, 190, 370, 40),),
    ),
)
