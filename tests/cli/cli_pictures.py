"""Photos, masks, and what became of them."""

from pathlib import Path

import numpy as np
from PIL import Image

SIZE = (72, 56)
HOLE = (24, 16, 44, 36)


def make_photo(mode="RGB", size=SIZE, seed=0):
    channels = {"L": 1, "LA": 2, "RGB": 3, "RGBA": 4, "CMYK": 4}
    generator = np.random.default_rng(seed)
    if mode == "I;16":
        return Image.fromarray(generator.integers(0, 65536, size[::-1], dtype=np.uint16))
    if mode == "P":
        return make_photo("RGB", size, seed).quantize(16)
    values = generator.integers(0, 256, (*size[::-1], channels[mode]), dtype=np.uint8)
    return Image.frombytes(mode, size, values.tobytes())


def make_mask(size=SIZE, hole=HOLE):
    mask = Image.new("L", size)
    mask.paste(255, hole)
    return mask


def outside(image):
    """The pixels outside the hole, as one array."""
    values = np.asarray(image)
    keep = np.ones(values.shape[:2], bool)
    keep[HOLE[1] : HOLE[3], HOLE[0] : HOLE[2]] = False
    return values[keep]


def changed(before, after):
    """Where two picture files differ."""
    return (np.asarray(Image.open(before)) != np.asarray(Image.open(after))).any(axis=-1)


def folder_of(path):
    """The picture files in and below a folder, with their pixels."""
    files = sorted(file for file in Path(path).rglob("*") if file.is_file() and file.suffix != ".tmp")
    return {file.relative_to(path).as_posix(): np.asarray(Image.open(file), int) for file in files}
