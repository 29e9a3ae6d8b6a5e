"""Small made-up photos, as folders and as shards."""

import io
import tarfile

import numpy as np
import pytest
from PIL import Image


@pytest.fixture
def photo_dir(tmp_path):
    """A folder with twelve pictures of 48×40 px, one of them in a sub-folder, and a text file named .jpg."""
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    generator = np.random.default_rng(0)
    for number in range(12):
        pixels = generator.integers(0, 256, (5, 6, 3), dtype=np.uint8)
        picture = Image.fromarray(pixels).resize((48, 40), Image.Resampling.BICUBIC)
        picture.save(folder / ("more" if number == 11 else ".") / f"{number:02d}.png")
    (folder / "03-broken.jpg").write_text("no picture")
    return folder


@pytest.fixture
def shard(photo_dir, tmp_path):
    """The same pictures as a WebDataset tar shard, with JSON files and a mask beside them."""
    path = tmp_path / "photos-000000.tar"
    with tarfile.open(path, "w") as archive:
        for file in sorted(photo_dir.rglob("*.*")):
            archive.add(file, file.name)
        for name in ("00.json", "00.mask.png"):
            archive.addfile(tarfile.TarInfo(name), io.BytesIO())
    return path
