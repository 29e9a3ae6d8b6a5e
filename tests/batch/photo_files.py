"""Small photos and masks, as files and as their contents."""

import io
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

SIZE = (48, 40)
HOLE = (16, 12, 32, 28)


def photo_image(seed: int = 0, size: tuple[int, int] = SIZE) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8))


def mask_image(size: tuple[int, int] = SIZE) -> Image.Image:
    mask = Image.new("L", size)
    mask.paste(255, HOLE)
    return mask


def contents(image: Image.Image, image_format: str = "PNG") -> bytes:
    file = io.BytesIO()
    image.save(file, image_format)
    return file.getvalue()


def write_tar(path: Path, files: dict[str, bytes]):
    with tarfile.open(path, "w") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
