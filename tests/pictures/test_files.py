"""Picture files: what survives reading and writing, and what an interruption leaves behind."""

import io
import os
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageCms, ImageOps, JpegImagePlugin

from diffusers_moebius.pictures.files import (
    ImageMetadata,
    check_output,
    encode_image,
    read_image,
    remove_leftovers,
    replace_file,
    write_image,
)

SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def smooth_picture(mode="RGB", size=(48, 32)):
    """A colourful gradient, which JPEG keeps well."""
    y, x = np.mgrid[0 : size[1], 0 : size[0]]
    values = np.stack([4 * x, 6 * y, 255 - 3 * x, 255 - 2 * y], axis=-1) % 256
    return (
        Image.fromarray(values.astype(np.uint8)[..., :3]).convert(mode)
        if mode != "CMYK"
        else Image.frombytes("CMYK", size, values.astype(np.uint8).tobytes())
    )


def camera_exif(orientation=1):
    exif = Image.Exif()
    exif[ExifTags.Base.Make] = "Camera"
    exif[ExifTags.Base.Orientation] = orientation
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.DateTimeOriginal] = "2024:05:06 07:08:09"
    exif.get_ifd(ExifTags.IFD.GPSInfo)[ExifTags.GPS.GPSLatitudeRef] = "N"
    return exif


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied_and_its_tag_gone(tmp_path, orientation):
    source = smooth_picture()
    source.save(tmp_path / "in.png", exif=camera_exif(orientation))
    image, metadata = read_image(tmp_path / "in.png")
    assert image.size == ((32, 48) if orientation >= 5 else (48, 32))
    write_image(image, tmp_path / "out.png", metadata)
    with Image.open(tmp_path / "out.png") as written, Image.open(tmp_path / "in.png") as original:
        assert ExifTags.Base.Orientation not in written.getexif()
        assert np.array_equal(written, ImageOps.exif_transpose(original))


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".tif"])
@pytest.mark.parametrize("source_suffix", [".jpg", ".png", ".webp", ".tif"])
def test_profile_exif_and_resolution_survive(tmp_path, source_suffix, suffix):
    options = {} if source_suffix == ".webp" else {"dpi": (300, 150)}
    smooth_picture().save(tmp_path / f"in{source_suffix}", exif=camera_exif().tobytes(), icc_profile=SRGB, **options)
    image, metadata = read_image(tmp_path / f"in{source_suffix}")
    write_image(image, tmp_path / f"out{suffix}", metadata)
    with Image.open(tmp_path / f"out{suffix}") as written:
        assert written.info["icc_profile"] == SRGB
        exif = written.getexif()
        assert exif[ExifTags.Base.Make] == "Camera"
        assert exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.DateTimeOriginal] == "2024:05:06 07:08:09"
        assert exif.get_ifd(ExifTags.IFD.GPSInfo)[ExifTags.GPS.GPSLatitudeRef] == "N"
        if ".webp" not in (source_suffix, suffix):
            assert written.info["dpi"] == pytest.approx((300, 150), abs=0.1)
        if suffix != ".tif":  # of a TIFF the strips and sizes are tags too; elsewhere they would be false
            assert set(exif) <= {ExifTags.Base.Make, ExifTags.Base.ExifOffset, ExifTags.Base.GPSInfo}


def test_resolution_turns_with_the_picture(tmp_path):
    smooth_picture().save(tmp_path / "in.jpg", exif=camera_exif(6), dpi=(300, 150))
    assert read_image(tmp_path / "in.jpg")[1].tags["dpi"] == (150, 300)


@pytest.mark.parametrize("quality, subsampling", [(35, 2), (80, 1), (92, 0), (98, 2)])
def test_jpeg_keeps_tables_and_subsampling(tmp_path, quality, subsampling):
    smooth_picture().save(tmp_path / "in.jpg", quality=quality, subsampling=subsampling, progressive=quality > 90)
    image, metadata = read_image(tmp_path / "in.jpg")
    write_image(image, tmp_path / "out.jpg", metadata)
    with Image.open(tmp_path / "in.jpg") as before, Image.open(tmp_path / "out.jpg") as after:
        assert after.quantization == before.quantization
        assert JpegImagePlugin.get_sampling(after) == subsampling
        assert after.info.get("progressive") == before.info.get("progressive")
        assert np.abs(np.asarray(after, int) - np.asarray(before, int)).max() <= 3


def test_sideways_422_is_not_reduced_along_the_other_axis(tmp_path):
    smooth_picture().save(tmp_path / "in.jpg", subsampling=1, exif=camera_exif(8))
    image, metadata = read_image(tmp_path / "in.jpg")
    write_image(image, tmp_path / "out.jpg", metadata)
    with Image.open(tmp_path / "out.jpg") as written:
        assert JpegImagePlugin.get_sampling(written) == 0


def test_jpeg_of_another_format_is_of_high_quality(tmp_path):
    smooth_picture().save(tmp_path / "in.png")
    write_image(read_image(tmp_path / "in.png")[0], tmp_path / "out.jpg")
    smooth_picture().save(tmp_path / "95.jpg", quality=95, subsampling=0)
    assert (tmp_path / "out.jpg").read_bytes() == (tmp_path / "95.jpg").read_bytes()


@pytest.mark.parametrize("suffix", [".png", ".webp", ".tif"])
@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_lossless_formats_are_written_without_loss(tmp_path, suffix, mode):
    noise = np.random.default_rng(0).integers(0, 256, (20, 30, len(mode)), dtype=np.uint8)
    write_image(Image.fromarray(noise, mode), tmp_path / f"out{suffix}", ImageMetadata("JPEG", {}, {"qtables": {}}))
    assert np.array_equal(read_image(tmp_path / f"out{suffix}")[0], noise)


@pytest.mark.parametrize("compression", ["tiff_lzw", "raw", "packbits"])
def test_tiff_keeps_its_compression(tmp_path, compression):
    smooth_picture().save(tmp_path / "in.tif", compression=compression)
    image, metadata = read_image(tmp_path / "in.tif")
    write_image(image, tmp_path / "out.tif", metadata)
    with Image.open(tmp_path / "out.tif") as written:
        assert written.info["compression"] == compression


@pytest.mark.parametrize(
    "source, mode",
    [
        (smooth_picture("P"), "RGB"),
        (smooth_picture("1"), "L"),
        (smooth_picture("L"), "L"),
        (smooth_picture("LA"), "LA"),
        (smooth_picture("RGBA"), "RGBA"),
        (Image.fromarray(np.arange(600, dtype=np.uint16).reshape(20, 30) * 109), "I;16"),
    ],
    ids=["P", "1", "L", "LA", "RGBA", "I;16"],
)
def test_modes_of_png(tmp_path, source, mode):
    source.save(tmp_path / "in.png")
    image, metadata = read_image(tmp_path / "in.png")
    assert image.mode == mode
    write_image(image, tmp_path / "out.png", metadata)
    with Image.open(tmp_path / "out.png") as written:
        assert written.mode == mode
        assert np.array_equal(written, source.convert(mode) if source.mode != mode else source)


def test_transparent_colour_becomes_alpha(tmp_path):
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([255, 0, 0, 0, 255, 0])
    palette.putpixel((0, 0), 0)
    palette.save(tmp_path / "p.png", transparency=0)
    Image.new("RGB", (4, 4), (1, 2, 3)).save(tmp_path / "rgb.png", transparency=(1, 2, 3))
    assert read_image(tmp_path / "p.png")[0].getpixel((0, 0)) == (255, 0, 0, 0)
    assert read_image(tmp_path / "p.png")[0].getpixel((1, 0)) == (0, 255, 0, 255)
    assert read_image(tmp_path / "rgb.png")[0].getpixel((0, 0)) == (1, 2, 3, 0)


@pytest.mark.parametrize("suffix", [".tif", ".jpg"])
def test_cmyk_stays_cmyk(tmp_path, suffix):
    smooth_picture("CMYK").save(tmp_path / f"in{suffix}", **({"quality": 95} if suffix == ".jpg" else {}))
    image, metadata = read_image(tmp_path / f"in{suffix}")
    write_image(image, tmp_path / f"out{suffix}", metadata)
    with Image.open(tmp_path / f"out{suffix}") as written:
        assert written.mode == "CMYK"
        difference = np.abs(np.asarray(written, int) - np.asarray(image, int)).max()
        assert difference <= (2 if suffix == ".jpg" else 0)


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".tif"])
def test_profile_of_another_colour_space_is_left_out(tmp_path, suffix):
    profile = SRGB[:16] + b"CMYK" + SRGB[20:]
    write_image(smooth_picture(), tmp_path / f"out{suffix}", ImageMetadata(None, {"icc_profile": profile}))
    with Image.open(tmp_path / f"out{suffix}") as written:
        assert "icc_profile" not in written.info


def test_embedded_thumbnail_is_not_kept(tmp_path):
    """It would show what has been removed."""
    thumbnail = io.BytesIO()
    smooth_picture(size=(16, 16)).save(thumbnail, "JPEG")
    thumbnail = thumbnail.getvalue()
    # TIFF header, IFD0 with one tag, IFD1 that points at the thumbnail behind it.
    ifd0 = struct.pack("<H", 1) + struct.pack("<HHI4s", 271, 2, 4, b"Cam\0") + struct.pack("<I", 8 + 18)
    ifd1_tags = struct.pack("<HHII", 513, 4, 1, 8 + 18 + 30) + struct.pack("<HHII", 514, 4, 1, len(thumbnail))
    ifd1 = struct.pack("<H", 2) + ifd1_tags + struct.pack("<I", 0)
    exif = b"Exif\0\0" + b"II*\0\x08\0\0\0" + ifd0 + ifd1 + thumbnail
    smooth_picture().save(tmp_path / "in.jpg", exif=exif)
    assert (tmp_path / "in.jpg").read_bytes().count(b"\xff\xd8\xff") == 2
    image, metadata = read_image(tmp_path / "in.jpg")
    write_image(image, tmp_path / "out.jpg", metadata)
    assert (tmp_path / "out.jpg").read_bytes().count(b"\xff\xd8\xff") == 1
    with Image.open(tmp_path / "out.jpg") as written:
        assert written.getexif()[271] == "Cam"


def test_photo_of_a_multi_picture_file_is_read(tmp_path):
    smooth_picture().save(tmp_path / "in.jpg", "MPO", save_all=True, append_images=[smooth_picture(size=(8, 8))])
    image, metadata = read_image(tmp_path / "in.jpg")
    assert image.size == (48, 32) and metadata.format == "JPEG"
    write_image(image, tmp_path / "out.jpg", metadata)
    with Image.open(tmp_path / "out.jpg") as written:
        assert written.format == "JPEG"


def make_png(width, height, depth=8, pixels=b""):
    """An RGB PNG that claims a size, whatever pixels it has."""
    header = struct.pack(">IIBBBBB", width, height, depth, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(pixels)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in chunks
    )


def bad_files():
    jpeg, gif = io.BytesIO(), io.BytesIO()
    smooth_picture(size=(200, 200)).save(jpeg, "JPEG")
    smooth_picture().save(gif, "GIF", save_all=True, append_images=[smooth_picture("L")])
    return {
        "text.png": (b"no picture at all", "not a picture"),
        "empty.png": (b"", "not a picture"),
        "truncated.jpg": (jpeg.getvalue()[: len(jpeg.getvalue()) // 2], "cannot be read"),
        "header.png": (make_png(10, 10), "cannot be read"),
        "bomb.png": (make_png(100_000, 100_000), "cannot be read.*pixels"),
        "flat.png": (make_png(0, 10), "flat.png"),
        "animated.gif": (gif.getvalue(), "2 frames"),
    }


@pytest.mark.parametrize("name", bad_files())
def test_unusable_files_are_refused_by_name(tmp_path, name):
    content, message = bad_files()[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        read_image(tmp_path / name)
    assert name in str(caught.value)


def test_size_is_checked_before_the_pixels_are_read(tmp_path):
    (tmp_path / "large.png").write_bytes(make_png(2000, 1000))  # has none
    with pytest.raises(ValueError, match=r"large.png .* it has 2 megapixels, and at most 1.5 are allowed"):
        read_image(tmp_path / "large.png", max_megapixels=1.5)
    with pytest.raises(ValueError, match="truncated"):
        read_image(tmp_path / "large.png", max_megapixels=2)


def test_large_photos_below_the_limit_give_no_warning(tmp_path, monkeypatch, recwarn):
    smooth_picture().save(tmp_path / "in.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 48 * 32 - 1)
    assert read_image(tmp_path / "in.png")[0].size == (48, 32)
    assert not recwarn.list


def test_reduced_depth_is_said(tmp_path):
    (tmp_path / "deep.png").write_bytes(make_png(4, 1, 16, b"\0" + bytes(range(4 * 3 * 2))))
    with pytest.warns(UserWarning, match="16 bits"):
        read_image(tmp_path / "deep.png")


@pytest.mark.parametrize(
    "name, mode, message",
    [
        ("out.png", "HSV", "mode HSV"),
        ("out.xyz", "RGB", "suffix '.xyz'"),
        ("out", "RGB", "suffix ''"),
        ("there.png/out.png", "RGB", "in .*there.png, which is a file"),
        ("there.png", "RGB", "exists already"),
        (".", "RGB", "is a folder"),
    ],
)
def test_outputs_that_cannot_be_written_are_refused(tmp_path, name, mode, message):
    (tmp_path / "there.png").write_bytes(b"kept")
    with pytest.raises(ValueError, match=message):
        check_output(tmp_path / name, mode)
    with pytest.raises(ValueError, match=message):
        write_image(Image.new(mode, (4, 4)), tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["there.png"]
    assert (tmp_path / "there.png").read_bytes() == b"kept"


def test_metadata_that_the_format_cannot_hold_is_refused_beforehand(tmp_path):
    with pytest.raises(ValueError, match="EXIF data is too long"):
        check_output(tmp_path / "out.jpg", "RGB", ImageMetadata(None, {"exif": b"Exif\0\0" + bytes(70_000)}))


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_interrupted_writing_leaves_the_old_file(tmp_path, monkeypatch, error):
    target = tmp_path / "out.png"
    target.write_bytes(b"old")
    save = Image.Image.save

    def interrupted(self, file, **options):
        if self.size == (1, 1):  # the check beforehand
            return save(self, file, **options)
        file.write(b"half")
        raise error

    monkeypatch.setattr(Image.Image, "save", interrupted)
    with pytest.raises(error):
        write_image(smooth_picture(), target, overwrite=True)
    assert target.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [target]


def test_new_files_have_ordinary_permissions_and_links_stay(tmp_path):
    (tmp_path / "ordinary").touch()
    write_image(smooth_picture(), tmp_path / "out.png")
    assert os.stat(tmp_path / "out.png").st_mode == os.stat(tmp_path / "ordinary").st_mode
    (tmp_path / "link.png").symlink_to(tmp_path / "out.png")
    write_image(smooth_picture(size=(8, 8)), tmp_path / "link.png", overwrite=True)
    assert (tmp_path / "link.png").is_symlink()
    assert read_image(tmp_path / "out.png")[0].size == (8, 8)


@pytest.mark.parametrize("name, mode", [("out.jpg", "RGBA"), ("out.jpg", "LA"), ("out.ppm", "LA")])
def test_transparency_is_laid_on_white_where_there_is_none(tmp_path, name, mode):
    image = smooth_picture("L" if mode == "LA" else "RGB").convert(mode)
    image.putalpha(Image.fromarray(np.repeat(np.uint8([[0, 255]]), 24, axis=1).repeat(32, axis=0)))
    loss = check_output(tmp_path / name, mode)
    assert "out" in loss and "transparent" in loss and "white" in loss
    write_image(image, tmp_path / name)
    with Image.open(tmp_path / name) as written:
        assert written.mode == mode[:-1]
        pixels = np.asarray(written.convert("RGB"), int)
        assert pixels[:, :22].min() >= 250
        assert np.abs(pixels - np.asarray(image.convert("RGB"), int))[:, 26:].max() <= 6


@pytest.mark.parametrize("suffix", [".png", ".webp", ".bmp"])
def test_cmyk_becomes_rgb_where_there_is_none(tmp_path, suffix):
    source = smooth_picture("CMYK")
    profile = ImageMetadata("TIFF", {"icc_profile": SRGB[:16] + b"CMYK" + SRGB[20:]})
    assert "CMYK becomes RGB" in check_output(tmp_path / f"out{suffix}", "CMYK", profile)
    write_image(source, tmp_path / f"out{suffix}", profile)
    with Image.open(tmp_path / f"out{suffix}") as written:
        assert np.array_equal(written, source.convert("RGB")) and "icc_profile" not in written.info


@pytest.mark.parametrize("suffix", [".webp", ".bmp", ".jpg"])
def test_sixteen_bits_are_rounded_where_there_are_eight(tmp_path, suffix):
    source = Image.fromarray(np.full((8, 8), 128 * 257, np.uint16))
    assert "16 bits are rounded to 8" in check_output(tmp_path / f"out{suffix}", "I;16")
    write_image(source, tmp_path / f"out{suffix}")
    with Image.open(tmp_path / f"out{suffix}") as written:
        assert written.convert("L").getpixel((3, 3)) == 128


@pytest.mark.parametrize(
    "name, mode", [("out.png", "RGBA"), ("out.webp", "L"), ("out.jpg", "CMYK"), ("out.tif", "LA")]
)
def test_nothing_is_said_where_nothing_is_lost(tmp_path, name, mode):
    assert check_output(tmp_path / name, mode) is None


def test_contents_are_read_as_files_are(tmp_path):
    smooth_picture().save(tmp_path / "in.jpg", exif=camera_exif(6), icc_profile=SRGB)
    from_file, metadata = read_image(tmp_path / "in.jpg")
    from_bytes, same = read_image((tmp_path / "in.jpg").read_bytes())
    assert np.array_equal(from_file, from_bytes) and metadata == same
    write_image(from_file, tmp_path / "out.jpg", metadata)
    assert encode_image(from_file, "any.jpg", metadata) == (tmp_path / "out.jpg").read_bytes()
    with pytest.raises(ValueError, match="sample 7 is not a picture"):
        read_image(b"text", "sample 7")


def test_photos_of_phones(tmp_path):
    heif = pytest.importorskip("pillow_heif")
    heif.register_heif_opener()
    smooth_picture().save(tmp_path / "in.heic", exif=camera_exif(6).tobytes(), quality=90, chroma=444)
    image, metadata = read_image(tmp_path / "in.heic")
    assert image.size == (48, 32) or image.size == (32, 48)
    assert metadata.format == "HEIF"
    write_image(image, tmp_path / "out.heic", metadata)
    again, _ = read_image(tmp_path / "out.heic")
    assert again.size == image.size and again.getexif()[ExifTags.Base.Make] == "Camera"
    assert np.abs(np.asarray(again, int) - np.asarray(image, int)).max() <= 8
    assert "CMYK becomes RGB" in check_output(tmp_path / "other.heic", "CMYK")


def test_phone_photos_name_the_package_that_they_need(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    (tmp_path / "photo.heic").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0")
    for action in (lambda: read_image(tmp_path / "photo.heic"), lambda: check_output(tmp_path / "new.heic", "RGB")):
        with pytest.raises(ValueError, match=r"heic is HEIC, which needs `pip install diffusers-moebius\[heic\]`"):
            action()


def test_leftovers_of_killed_processes_are_removed(tmp_path):
    (tmp_path / "album").mkdir()
    killed = subprocess.Popen([sys.executable, "-c", ""])
    killed.wait()
    leftover = tmp_path / "album" / f".out.png.{killed.pid}.tmp"
    kept = [tmp_path / f".out.png.{os.getppid()}.tmp", tmp_path / ".notes.tmp", tmp_path / "out.png"]
    for path in (leftover, *kept):
        path.touch()
    remove_leftovers(tmp_path)
    assert not leftover.exists() and all(path.exists() for path in kept)


def test_folders_are_made_when_something_is_written(tmp_path):
    target = tmp_path / "new" / "folder" / "out.png"
    check_output(target, "RGB")
    assert not list(tmp_path.iterdir())
    write_image(smooth_picture(), target)
    assert target.is_file()


def test_replaced_files_are_whole(tmp_path):
    target = tmp_path / "report.txt"
    with replace_file(target) as file:
        file.write(b"one")
        assert not target.exists()
    with pytest.raises(RuntimeError), replace_file(target) as file:
        file.write(b"half")
        raise RuntimeError
    assert target.read_bytes() == b"one" and os.listdir(tmp_path) == ["report.txt"]
