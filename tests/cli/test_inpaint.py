"""`moebius inpaint` as a person uses it, on one photo."""

import os
from pathlib import Path

import numpy as np
import pytest
from cli_pictures import HOLE, SIZE, changed, make_mask, make_photo, outside
from PIL import ExifTags, Image, ImageCms

from diffusers_moebius.pipelines.pipeline_moebius_inpaint import MoebiusInpaintPipeline


def test_fills_the_hole_and_nothing_else(moebius, folder, model):
    code, out, err = moebius("inpaint", "photo.png", "mask.png", "-o", "out.png", "--model", model, "--steps", 3)
    assert (code, out, err) == (0, ["out.png"], [])
    photo, result = Image.open("photo.png"), Image.open("out.png")
    assert result.size == photo.size and result.mode == "RGB"
    assert np.array_equal(outside(photo), outside(result))
    assert np.mean(np.asarray(photo.crop(HOLE)) != np.asarray(result.crop(HOLE))) > 0.9
    assert sorted(os.listdir()) == ["mask.png", "out.png", "photo.png"]


@pytest.mark.parametrize(
    "mode, suffix",
    [("L", ".png"), ("LA", ".png"), ("RGBA", ".webp"), ("I;16", ".png"), ("P", ".png"), ("CMYK", ".tif")],
)
def test_modes_and_transparency_are_kept(moebius, folder, model, mode, suffix):
    make_photo(mode).save(f"photo{suffix}", **({"lossless": True, "exact": True} if suffix == ".webp" else {}))
    code, _, err = moebius(
        "inpaint", f"photo{suffix}", "mask.png", "-o", f"out{suffix}", "--model", model, "--steps", 2
    )
    assert (code, err) == (0, [])
    photo, result = Image.open(f"photo{suffix}"), Image.open(f"out{suffix}")
    photo = photo.convert("RGB") if mode == "P" else photo
    assert result.mode == photo.mode
    assert np.array_equal(outside(photo), outside(result))
    if mode in ("LA", "RGBA"):
        assert np.array_equal(photo.getchannel("A"), result.getchannel("A"))


def test_camera_photo_comes_back_upright_with_its_metadata(moebius, folder, model):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    exif[ExifTags.Base.Model] = "Pinhole"
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    sideways = Image.new("RGB", SIZE[::-1], (90, 120, 60))
    sideways.save("photo.jpg", exif=exif, icc_profile=profile, dpi=(240, 240), quality=61)
    code, _, err = moebius("inpaint", "photo.jpg", "mask.png", "-o", "out.jpg", "--model", model, "--steps", 2)
    assert (code, err) == (0, [])
    before, result = Image.open("photo.jpg"), Image.open("out.jpg")
    assert result.format == "JPEG" and result.size == SIZE
    assert ExifTags.Base.Orientation not in result.getexif()
    assert result.getexif()[ExifTags.Base.Model] == "Pinhole"
    assert result.info["icc_profile"] == profile and result.info["dpi"] == (240, 240)
    assert result.quantization == before.quantization


def test_seed_decides_the_filling(moebius, folder, model):
    for name, seed in (("a.png", 1), ("b.png", 1), ("c.png", 2)):
        moebius("inpaint", "photo.png", "mask.png", "-o", name, "--model", model, "--steps", 2, "--seed", seed)
    assert Path("a.png").read_bytes() == Path("b.png").read_bytes()
    assert Path("a.png").read_bytes() != Path("c.png").read_bytes()


def test_options_reach_the_pipeline(moebius, folder, model, monkeypatch):
    calls = []

    def record(self, **kwargs):
        calls.append(kwargs)
        raise KeyboardInterrupt

    monkeypatch.setattr(MoebiusInpaintPipeline, "__call__", record)
    moebius("inpaint", "photo.png", "mask.png", "-o", "out.png", "--model", model)
    defaults = {key: calls[0][key] for key in calls[0].keys() - {"image", "mask_image", "generator"}}
    assert defaults == {
        "num_inference_steps": None,
        "guidance_scale": None,
        "strength": None,
        "masked_content": "original",
        "padding_mask_crop": 64,
        "detail": "auto",
        "paste": "auto",
        "color_compensation": False,
    }
    options = "--steps 7 --guidance 1.5 --strength 0.5 --no-crop --paste none --color-compensation"
    options += " --masked-content fill --detail none"
    moebius("inpaint", "photo.png", "mask.png", "-o", "out.png", "--model", model, "--seed", 5, *options.split())
    assert {key: calls[1][key] for key in defaults} == {
        "num_inference_steps": 7,
        "guidance_scale": 1.5,
        "strength": 0.5,
        "masked_content": "fill",
        "padding_mask_crop": None,
        "detail": None,
        "paste": None,
        "color_compensation": True,
    }
    assert [each.initial_seed() for each in calls[1]["generator"]] == [5]


def test_preview_shows_photo_mask_and_result(moebius, folder, model):
    arguments = ("inpaint", "photo.png", "mask.png", "-o", "out.png", "--model", model, "--steps", 2, "--preview")
    assert moebius(*arguments)[:2] == (0, ["out.png", "out.png.preview.png"])
    preview = Image.open("out.png.preview.png")
    assert preview.size == (3 * SIZE[0], SIZE[1])
    parts = [Image.open("photo.png"), make_mask().convert("RGB"), Image.open("out.png")]
    for column, part in enumerate(parts):
        box = (column * SIZE[0], 0, (column + 1) * SIZE[0], SIZE[1])
        assert np.array_equal(preview.crop(box), part)
    Path("out.png").unlink()
    code, _, err = moebius(*arguments)
    assert code == 2 and "preview.png exists already" in err[0]


def test_existing_output_is_only_replaced_on_request(moebius, folder, model):
    Path("out.png").write_bytes(b"precious")
    arguments = ("inpaint", "photo.png", "mask.png", "-o", "out.png", "--model", model, "--steps", 2)
    code, _, err = moebius(*arguments)
    assert code == 2 and len(err) == 1 and "out.png exists already" in err[0]
    assert Path("out.png").read_bytes() == b"precious"
    assert moebius(*arguments, "--overwrite")[0] == 0
    assert Image.open("out.png").size == SIZE


def test_black_mask_leaves_the_photo_with_a_warning(moebius, folder, model):
    Image.new("L", SIZE).save("black.png")
    code, out, err = moebius("inpaint", "photo.png", "black.png", "-o", "out.png", "--model", model, "--steps", 2)
    assert (code, out, len(err)) == (0, ["out.png"], 1)
    assert err[0].startswith("moebius: warning: ") and "black.png" in err[0]
    assert np.array_equal(Image.open("photo.png"), Image.open("out.png"))


def test_output_in_a_folder_has_the_name_of_the_photo(moebius, folder, model):
    Path("results").mkdir()
    out = moebius("inpaint", "photo.png", "mask.png", "-o", "results", "--model", model, "--steps", 2)[1]
    assert out == [os.path.join("results", "photo.png")]


@pytest.mark.parametrize("options, kept", [([], 128), (["--mask-threshold", 0.1], 10)])
def test_grey_masks_are_taken_from_a_threshold_on(moebius, folder, model, options, kept):
    noise = np.random.default_rng(0).integers(0, 256, SIZE[::-1], dtype=np.uint8)
    Image.fromarray(noise).save("grey.png")
    arguments = ("-o", "out.png", "--model", model, "--steps", 2, "--mask-dilation", 0, *options)
    code, out, err = moebius("inpaint", "photo.png", "grey.png", *arguments)
    assert (code, out) == (0, ["out.png"])
    assert err[0].startswith("moebius: warning: grey.png: ") and "neither dark nor bright" in err[0]
    filled = changed("photo.png", "out.png")
    assert not filled[noise < kept].any() and filled[noise > kept + 30].mean() > 0.9


def test_soft_edges_need_no_word(moebius, folder, model):
    make_mask().save("mask.jpg", quality=60)
    arguments = ("-o", "out.png", "--model", model, "--steps", 2, "--mask-dilation", 0)
    assert moebius("inpaint", "photo.png", "mask.jpg", *arguments) == (0, ["out.png"], [])
    assert np.array_equal(outside(Image.open("out.png")), outside(Image.open("photo.png")))


def make_glass():
    """A photo with a transparent hole, which some interfaces take as a mask."""
    glass = make_photo("RGB").convert("RGBA")
    glass.putalpha(Image.eval(make_mask(), lambda value: 255 - value))
    return glass


@pytest.mark.parametrize(
    "mask, options",
    [
        (lambda: Image.eval(make_mask(), lambda value: 255 - value), ["--invert-mask"]),
        (make_glass, ["--mask-from", "transparent"]),
        (make_glass, ["--mask-from", "alpha", "--invert-mask"]),
        (lambda: make_mask().resize((SIZE[0] // 2, SIZE[1] // 2), Image.NEAREST), []),
        (lambda: make_mask().resize((36, 14), Image.NEAREST), ["--resize-mask"]),
        (lambda: make_mask().point(lambda value: value // 255), []),
    ],
    ids=["inverted", "transparent hole", "transparent hole inverted", "half the size", "stretched", "zeros and ones"],
)
def test_masks_as_people_have_them(moebius, folder, model, mask, options):
    mask().save("other.png")
    arguments = ("--model", model, "--steps", 2, "--mask-dilation", 0)
    assert moebius("inpaint", "photo.png", "mask.png", "-o", "plain.png", *arguments)[0] == 0
    assert moebius("inpaint", "photo.png", "other.png", "-o", "out.png", *arguments, *options) == (0, ["out.png"], [])
    assert np.array_equal(Image.open("out.png"), Image.open("plain.png"))


@pytest.mark.parametrize("mask", [lambda: Image.eval(make_mask(), lambda value: 255 - value), make_glass])
def test_a_mask_that_fills_nearly_everything_is_remarked_upon(moebius, folder, model, mask):
    mask().save("other.png")
    code, _, err = moebius("inpaint", "photo.png", "other.png", "-o", "out.png", "--model", model, "--steps", 2)
    assert (code, len(err)) == (0, 1)
    assert err[0].startswith("moebius: warning: other.png: 90% of the photo is filled") and "invert" in err[0]


def test_masks_grow_over_what_is_left_of_an_object(moebius, folder, model):
    size, hole = (320, 256), (100, 100, 140, 130)
    photo = Image.eval(make_photo(size=size), lambda value: value // 4)
    photo.paste("white", (97, 97, 143, 133))
    photo.save("large.png")
    make_mask(size, hole).save("large_mask.png")
    for options, pixels in (([], 3), (["--mask-dilation", 5], 5), (["--mask-dilation", 0], 0)):
        arguments = ("-o", "out.png", "--model", model, "--steps", 1, "--strength", 1, "--overwrite", *options)
        assert moebius("inpaint", "large.png", "large_mask.png", *arguments)[0] == 0
        rows, columns = np.nonzero(changed("large.png", "out.png"))
        box = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
        assert box == (100 - pixels, 100 - pixels, 140 + pixels, 130 + pixels)


@pytest.mark.parametrize("output", ["new/results/", "there", "there/"])
def test_one_photo_into_a_folder(moebius, folder, model, output):
    Path("there").mkdir()
    arguments = ("-o", output, "--model", model, "--steps", 2)
    assert moebius("inpaint", "photo.png", "mask.png", *arguments)[:2] == (0, [str(Path(output) / "photo.png")])
    pattern = ("--output-pattern", "{stem}-clean.jpg")
    assert moebius("inpaint", "photo.png", "mask.png", *arguments, *pattern)[1] == [
        str(Path(output) / "photo-clean.jpg")
    ]


def test_what_a_format_cannot_hold_is_said(moebius, folder, model):
    make_photo("RGBA").save("glass.png")
    code, out, err = moebius("inpaint", "glass.png", "mask.png", "-o", "out.jpg", "--model", model, "--steps", 2)
    assert (code, out, len(err)) == (0, ["out.jpg"], 1) and "out.jpg" in err[0] and "laid on white" in err[0]
    assert Image.open("out.jpg").mode == "RGB"


def test_photos_of_phones(moebius, folder, model):
    heif = pytest.importorskip("pillow_heif")
    heif.register_heif_opener()
    make_photo().save("photo.heic", quality=90)
    code, out, err = moebius("inpaint", "photo.heic", "mask.png", "-o", "out.heic", "--model", model, "--steps", 2)
    assert (code, out, err) == (0, ["out.heic"], [])
    assert Image.open("out.heic").size == SIZE


def make_bad_files():
    """Photos and masks that cannot be used; each entry is a photo, a mask and what the error names."""
    make_photo().save("whole.jpg")
    Path("truncated.jpg").write_bytes(Path("whole.jpg").read_bytes()[:-900])
    Path("text.png").write_text("Dear diary")
    Path("empty.png").touch()
    make_photo(size=(1, 1)).save("dot.png")
    make_mask((1, 1), (0, 0, 1, 1)).save("dot_mask.png")
    make_photo(size=(20_000, 10)).save("line.png")
    make_mask((20_000, 10)).save("line_mask.png")
    make_photo("RGBA").save("glass.png")
    make_mask((SIZE[1], SIZE[0])).save("turned_mask.png")
    make_mask((200, 200)).save("bomb.png")
    Path("folder").mkdir()


@pytest.mark.parametrize(
    "photo, mask, output, words",
    [
        ("text.png", "mask.png", "out.png", "text.png"),
        ("photo.png", "text.png", "out.png", "text.png"),
        ("empty.png", "mask.png", "out.png", "empty.png"),
        ("truncated.jpg", "mask.png", "out.png", "truncated.jpg"),
        ("photo.png", "truncated.jpg", "out.png", "truncated.jpg"),
        ("dot.png", "dot_mask.png", "out.png", "1×1 16"),
        ("line.png", "line_mask.png", "out.png", "20000×10 16"),
        ("photo.png", "turned_mask.png", "out.png", "turned_mask.png 56×72 72×56"),
        ("photo.png", "folder", "out.png", "MASK folder"),
        ("folder", "mask.png", "out", "PHOTO folder"),
        ("bomb.png", "mask.png", "out.png", "bomb.png pixels"),
    ],
)
def test_bad_files_are_one_line(moebius, folder, model, monkeypatch, photo, mask, output, words):
    make_bad_files()
    if "bomb.png" in (photo, mask):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)
    before = sorted(os.listdir())
    code, out, err = moebius("inpaint", photo, mask, "-o", output, "--model", model, "--steps", 2)
    assert (code, out, len(err)) == (2, [], 1)
    for word in words.split():
        assert word in err[0]
    assert sorted(os.listdir()) == before


def test_a_mask_on_its_side_is_explained(moebius, folder, model):
    make_mask((SIZE[1], SIZE[0])).save("turned.png")
    err = moebius("inpaint", "photo.png", "turned.png", "-o", "out.png", "--model", model)[2]
    assert len(err) == 1 and "EXIF orientation" in err[0]
