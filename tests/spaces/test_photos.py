"""Opening, viewing, masking and saving of visitors' photos."""

import numpy as np
import pytest
from PIL import Image

from diffusers_moebius.demo import photos
from diffusers_moebius.demo.photos import (
    VIEW_SIDE,
    VisitorError,
    open_photo,
    save_photo,
)


def test_a_phone_photo_is_upright_and_keeps_all_pixels(phone_photo):
    photo = open_photo(phone_photo)
    assert photo.image.size == (3000, 4000)
    assert photo.name == "IMG_0001"
    view = photo.view
    assert view.size == (960, VIEW_SIDE)
    # The left edge of the stored picture is the upper one of the upright picture.
    assert view.getpixel((480, 2))[0] < 10 < 245 < view.getpixel((480, VIEW_SIDE - 3))[0]


@pytest.mark.parametrize("content", [b"", b"not a picture", b"\x89PNG\r\n\x1a\n broken", b"\xff\xd8\xff\xe0 broken"])
def test_what_is_no_picture_is_refused_without_its_path(tmp_path, content):
    path = tmp_path / "bad.png"
    path.write_bytes(content)
    with pytest.raises(VisitorError) as caught:
        open_photo(path)
    assert str(tmp_path) not in str(caught.value)


def test_a_truncated_picture_is_refused_without_its_path(photo, tmp_path):
    path = tmp_path / "cut.png"
    path.write_bytes(photo.read_bytes()[:-2000])
    with pytest.raises(VisitorError) as caught:
        open_photo(path)
    assert str(tmp_path) not in str(caught.value)


def test_limits(photo, monkeypatch):
    monkeypatch.setattr(photos, "MAX_MEGAPIXELS", 0.05)
    with pytest.raises(VisitorError, match=r"it has 0.06 megapixels, and at most 0.05 are allowed"):
        open_photo(photo)


def test_a_name_is_safe_for_a_file(photo):
    assert open_photo(photo, "../../etc/pass<wd>.jpg").name == "pass_wd_"
    assert open_photo(photo, "Grüße vom Meer.jpg").name == "Grüße vom Meer"


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "CMYK", "P", "1", "I;16"])
def test_every_mode_has_a_view_and_a_download(tmp_path, mode):
    path = tmp_path / "photo.tif"
    if mode == "I;16":
        Image.fromarray(np.arange(64 * 48, dtype=np.uint16).reshape(48, 64) * 20).save(path)
    else:
        Image.new("RGB", (64, 48), (200, 100, 50)).convert(mode).save(path)
    photo = open_photo(path)
    assert (photo.view.mode, photo.view.size) == ("RGBA" if mode.endswith("A") else "RGB", (64, 48))
    for file_format in ("PNG", "JPEG"):
        with Image.open(save_photo(photo, tmp_path, file_format)) as saved:
            assert (saved.size, saved.format) == ((64, 48), file_format)


def test_downloads_keep_metadata(phone_photo, tmp_path):
    photo = open_photo(phone_photo)
    with Image.open(save_photo(photo, tmp_path, "PNG")) as png:
        assert (np.asarray(png) == np.asarray(photo.image)).all()
    with Image.open(save_photo(photo, tmp_path, "JPEG")) as jpeg:
        assert jpeg.size == (3000, 4000)
        assert jpeg.getexif()[271] == "Camera maker" and 274 not in jpeg.getexif()
        assert jpeg.info["icc_profile"]


def test_a_photo_of_a_phone_in_heic(photo, tmp_path):
    heif = pytest.importorskip("pillow_heif")
    path = tmp_path / "IMG_0001.HEIC"
    heif.from_pillow(Image.open(photo)).save(path)
    opened = open_photo(path)
    assert (opened.image.size, opened.metadata.format) == ((300, 200), "HEIF")
    assert save_photo(opened, tmp_path, "JPEG").suffix == ".jpg"
