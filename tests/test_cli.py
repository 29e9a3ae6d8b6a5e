"""The `moebius` command as a person uses it."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model_state_dict
from PIL import ExifTags, Image, ImageCms

from diffusers_moebius import __version__, convert_release_checkpoint, loaders
from diffusers_moebius.cli import main
from diffusers_moebius.loaders import hub
from diffusers_moebius.models.unet_2d_moebius import MoebiusUNet2DModel
from diffusers_moebius.pipelines.pipeline_moebius_inpaint import MoebiusInpaintPipeline

SIZE = (72, 56)
HOLE = (24, 16, 44, 36)


@pytest.fixture(scope="module")
def model(tmp_path_factory, parity_dir) -> str:
    """A pipeline folder with the tiny model."""
    target = tmp_path_factory.mktemp("models") / "tiny"
    source, config = parity_dir / "student_tiny.safetensors", parity_dir / "student_tiny.json"
    return str(convert_release_checkpoint(source, target, config=config, vae=parity_dir / "vae_tiny"))


@pytest.fixture
def moebius(capsys):
    """Runs the command; returns its exit code, its lines of output and those of errors."""

    def run(*arguments):
        with pytest.raises(SystemExit) as caught:
            main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return caught.value.code, captured.out.splitlines(), captured.err.splitlines()

    return run


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """The working folder, with `photo.png` and its `mask.png`."""
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    make_photo().save("photo.png")
    make_mask().save("mask.png")
    return folder


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


@pytest.mark.parametrize("scheduler", ["ddim", "dpm", "unipc", "euler", "euler-ancestral", "lcm"])
def test_schedulers(moebius, folder, model, scheduler, monkeypatch):
    used = []
    call = MoebiusInpaintPipeline.__call__

    def spy(self, **kwargs):
        used.append(type(self.scheduler).__name__.lower())
        return call(self, **kwargs)

    monkeypatch.setattr(MoebiusInpaintPipeline, "__call__", spy)
    arguments = ("--model", model, "--steps", 3, "--scheduler", scheduler)
    code, out, err = moebius("inpaint", "photo.png", "mask.png", "-o", "out.png", *arguments)
    assert (code, out, err) == (0, ["out.png"], [])
    assert used[0].startswith(scheduler.replace("-", ""))


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


@pytest.mark.parametrize(("options", "used"), [([], "UniPCMultistep"), (["--scheduler", "dpm"], "DPMSolverMultistep")])
def test_fast_takes_few_steps_with_prepared_weights(moebius, folder, model, monkeypatch, options, used):
    monkeypatch.setattr(loaders, "TINY_AUTOENCODER", str(folder))  # where none is
    calls = []

    def record(self, **kwargs):
        calls.append((type(self.scheduler).__name__, self.config.default_num_inference_steps, self.unet.is_fused))
        raise KeyboardInterrupt

    monkeypatch.setattr(MoebiusInpaintPipeline, "__call__", record)
    moebius("inpaint", "photo.png", "mask.png", "-o", "out.png", "--model", model, "--fast", *options)
    assert calls == [(f"{used}Scheduler", 5, True)]


@pytest.fixture
def adapter(folder, model) -> str:
    """A folder with a LoRA adapter that has a strong effect on the model."""
    torch.manual_seed(0)
    unet = MoebiusUNet2DModel.from_config(MoebiusUNet2DModel.load_config(f"{model}/unet"))
    unet.add_adapter(LoraConfig(r=2, lora_alpha=20, target_modules=["to_q", "to_v"], init_lora_weights=False))
    metadata = unet.peft_config["default"].to_dict()
    MoebiusInpaintPipeline.save_lora_weights(
        "adapter", get_peft_model_state_dict(unet), unet_lora_adapter_metadata=metadata
    )
    return "adapter"


def test_adapters_act_by_their_scale(moebius, folder, model, adapter):
    pictures = {}
    for name, loras in {
        "none": [],
        "one": [adapter],
        "zero": [f"{adapter}:0"],
        "half": [f"{adapter}/pytorch_lora_weights.safetensors:0.5"],
        "halves": [f"{adapter}:0.25", f"{adapter}:0.25"],
    }.items():
        options = [part for lora in loras for part in ("--lora", lora)]
        arguments = ("-o", f"{name}.png", "--model", model, "--steps", 2, *options)
        assert moebius("inpaint", "photo.png", "mask.png", *arguments) == (0, [f"{name}.png"], [])
        pictures[name] = np.asarray(Image.open(f"{name}.png")).astype(int)
    assert np.array_equal(pictures["zero"], pictures["none"])
    assert np.abs(pictures["half"] - pictures["halves"]).max() <= 1
    for name, other in (("none", "one"), ("none", "half"), ("half", "one")):
        assert np.abs(pictures[name] - pictures[other]).max() > 1


@pytest.mark.parametrize(
    "lora, named", [("adapter:much", "'adapter:much'"), (":2", "':2'"), ("nowhere", "nowhere cann")]
)
def test_adapters_that_are_none(moebius, folder, model, lora, named):
    code, out, err = moebius("inpaint", "photo.png", "mask.png", "-o", "out.png", "--model", model, "--lora", lora)
    assert (code, out, len(err)) == (2, [], 1) and "`--lora`" in err[0] and named in err[0]
    assert not Path("out.png").exists()


def test_default_model_is_named_with_the_way_to_full_quality(moebius, folder, model, monkeypatch):
    monkeypatch.setattr(hub, "bundled_checkpoints", lambda: {"nano": Path(model)})
    code, out, err = moebius("inpaint", "photo.png", "mask.png", "-o", "out.png", "--steps", 2)
    assert (code, out) == (0, ["out.png"])
    assert len(err) == 1 and "'nano'" in err[0] and "--model hustvl/Moebius" in err[0]
    Path("nano").symlink_to(model)
    code, _, err = moebius("inpaint", "photo.png", "mask.png", "-o", "out2.png", "--steps", 2)
    assert (code, err) == (0, [])  # a folder of that name is not the bundled model


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


def changed(before, after):
    """Where two picture files differ."""
    return (np.asarray(Image.open(before)) != np.asarray(Image.open(after))).any(axis=-1)


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


def test_masks_grow_in_proportion_to_the_photo(moebius, folder, model):
    size, hole = (320, 256), (100, 100, 140, 130)
    make_photo(size=size).save("large.png")
    make_mask(size, hole).save("large_mask.png")
    for options, pixels in (([], 2), (["--mask-dilation", 5], 5), (["--mask-dilation", 0], 0)):
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


def test_folders_of_outputs_are_made(moebius, folder, model):
    code, out, _ = moebius("inpaint", "photo.png", "mask.png", "-o", "a/b/out.png", "--model", model, "--steps", 2)
    assert (code, out) == (0, ["a/b/out.png"])


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


def test_a_device_that_is_not_there_is_refused_before_torch_is_imported(folder):
    command = (
        "import sys; from diffusers_moebius.cli import main\ntry: main(sys.argv[1:])\nfinally: print(*sys.modules)"
    )
    for device, word in (("toaster", "toaster"), ("cuda", "build without CUDA"), ("mps", "Macs")):
        if (device == "cuda" and torch.version.cuda) or (device == "mps" and sys.platform == "darwin"):
            continue
        arguments = ["inpaint", "photo.png", "mask.png", "-o", "out.png", "--device", device]
        process = subprocess.run([sys.executable, "-c", command, *arguments], capture_output=True, text=True)
        assert process.returncode == 2 and word in process.stderr and len(process.stderr.splitlines()) == 1
        assert "torch" not in process.stdout.split()


@pytest.mark.parametrize(
    "arguments, words",
    [
        ("inpaint photo.png mask.png", "--output"),
        ("inpaint missing.png mask.png -o out.png", "PHOTO missing.png"),
        ("inpaint photo.png missing.png -o out.png", "MASK missing.png"),
        ("inpaint photo.png -o out.png", "MASK"),
        ("inpaint photo.png mask.png -o photo.png/out.png", "photo.png file"),
        ("inpaint photo.png mask.png -o out.png --output-format parquet", "--output-format"),
        ("inpaint photo.png mask.png -o out/ --output-pattern {date}.png", "--output-pattern {date}"),
        ("inpaint photo.png mask.png -o out.png --mask-threshold 0", "--mask-threshold 0"),
        ("inpaint photo.png mask.png -o out.png --mask-from alpha", "mask.png alpha"),
        ("inpaint photo.png mask.png -o out.unknown", ".unknown"),
        ("inpaint photo.png mask.png -o out.png --setps 3", "--setps"),
        ("inpaint photo.png mask.png -o out.png --steps -3", "--steps"),
        ("inpaint photo.png mask.png -o out.png --steps 0", "--steps"),
        ("inpaint photo.png mask.png -o out.png --steps many", "--steps"),
        ("inpaint photo.png mask.png -o out.png --strength 0", "--strength 0"),
        ("inpaint photo.png mask.png -o out.png --strength 1.5", "--strength 1.5"),
        ("inpaint photo.png mask.png -o out.png --strength nan", "--strength nan"),
        ("inpaint photo.png mask.png -o out.png --crop-margin -1", "--crop-margin"),
        ("inpaint photo.png mask.png -o out.png --mask-threshold 2", "--mask-threshold"),
        ("inpaint photo.png mask.png -o out.png --guidance nan --model MODEL", "guidance_scale nan"),
        ("inpaint photo.png mask.png -o out.png --seed -1", "--seed"),
        ("inpaint photo.png mask.png -o out.png --scheduler magic", "--scheduler magic"),
        ("inpaint photo.png mask.png -o out.png --dtype int8", "--dtype int8"),
        ("inpaint photo.png mask.png -o out.png --device toaster --model MODEL", "--device toaster"),
        ("inpaint photo.png mask.png -o out.png --device cuda:99 --model MODEL", "--device cuda:99"),
        ("inpaint photo.png mask.png -o out.png --paste thick", "--paste thick"),
        ("inpaint photo.png mask.png -o out.png --checkpoint ft_places2", "--checkpoint nano"),
        ("inpaint photo.png mask.png -o out.png --checkpoint none --model MODEL", "checkpoint none"),
        ("inpaint photo.png mask.png -o out.png --model no/such/model", "no/such/model"),
        ("inpaint photo.png mask.png -o out.png --model .", "model_index.json"),
        ("info no/such/model", "no/such/model"),
        ("convert missing.bin target", "SOURCE missing.bin"),
        ("convert photo.png target", "photo.png"),
        ("paint", "paint"),
        ("--what", "--what"),
    ],
)
def test_bad_arguments_are_one_line(moebius, folder, model, arguments, words):
    code, out, err = moebius(*(model if word == "MODEL" else word for word in arguments.split()))
    assert (code, out) == (2, [])
    errors = [line for line in err if not line.startswith("moebius: using the small model")]
    assert len(errors) == 1 and errors[0].startswith("moebius: error: ")
    for word in words.split():
        assert word in errors[0]
    assert sorted(os.listdir()) == ["mask.png", "photo.png"]


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


@pytest.fixture
def photo_folders(folder):
    """`photos/` with three photos, one that is text, one without a mask and one with two, and `masks/`."""
    for name in ("photos", "masks"):
        Path(name).mkdir()
    for seed, name in enumerate(("a.png", "b.jpg", "c.webp", "lonely.png", "double.png")):
        make_photo(seed=seed).save(Path("photos") / name)
    Path("photos/broken.png").write_text("Dear diary")
    Path("photos/notes.txt").write_text("not a photo")
    Path("photos/.hidden.png").write_text("a thumbnail of some other program")
    for name in ("a.png", "b.png", "c.png", "broken.png", "double.gif", "double.tif"):
        make_mask().save(Path("masks") / name)
    # The name itself decides before the stem does.
    make_mask(hole=(0, 0, 8, 8)).save("masks/a.tif")
    return folder


def test_folders(moebius, photo_folders, model):
    arguments = ("inpaint", "photos", "masks", "-o", "results", "--model", model, "--steps", 2)
    code, out, err = moebius(*arguments)
    written = ["a.png", "b.jpg", "c.webp"]
    assert code == 1
    assert [Path(line).name for line in out] == written == sorted(os.listdir("results"))
    assert len(err) == 5 and "3 of" in err[-1] and "no pictures" in err[-2] and "notes.txt" in err[-2]
    for name, line in zip(("broken.png", "double.png", "lonely.png"), err, strict=False):
        assert line.startswith("moebius: error: ") and name in line
    assert np.array_equal(outside(Image.open("photos/a.png")), outside(Image.open("results/a.png")))

    Path("results/b.jpg").unlink()
    old = Path("results/a.png").stat().st_mtime_ns
    code, out, err = moebius(*arguments)
    assert code == 1 and [Path(line).name for line in out] == ["b.jpg"]
    assert any("2 outputs exist already" in line for line in err)
    assert Path("results/a.png").stat().st_mtime_ns == old
    assert len(moebius(*arguments, "--overwrite")[1]) == 3
    assert Path("results/a.png").stat().st_mtime_ns > old


def test_one_mask_for_a_folder_and_no_failure(moebius, photo_folders, model):
    for name in ("broken.png", "b.jpg", "double.png", "lonely.png", "notes.txt"):
        Path("photos", name).unlink()
    code, out, err = moebius("inpaint", "photos", "mask.png", "-o", "results", "--model", model, "--steps", 2)
    assert (code, err) == (0, [])
    assert [Path(line).name for line in out] == ["a.png", "c.webp"]


def test_photos_of_a_folder_do_not_depend_on_each_other(moebius, photo_folders, model):
    moebius("inpaint", "photos", "masks", "-o", "results", "--model", model, "--steps", 2)
    moebius("inpaint", "photos/c.webp", "masks/c.png", "-o", "alone.webp", "--model", model, "--steps", 2)
    assert Path("results/c.webp").read_bytes() == Path("alone.webp").read_bytes()


@pytest.mark.parametrize("output, words", [("photos", "another folder"), ("mask.png", "must be a folder")])
def test_output_of_a_folder_is_another_folder(moebius, photo_folders, model, output, words):
    code, out, err = moebius("inpaint", "photos", "masks", "-o", output, "--model", model, "--overwrite")
    assert (code, out, len(err)) == (2, [], 1) and words in err[0]


@pytest.fixture
def album(folder):
    """`album/` with four photos, one of them in a folder and one of another size, and `masks/`."""
    for seed, name in enumerate(("a.png", "b.png", "c.png", "deep/d.png")):
        for top in ("album", "masks"):
            (folder / top / name).parent.mkdir(parents=True, exist_ok=True)
        size = (96, 80) if name == "c.png" else SIZE
        make_photo(size=size, seed=seed).save(folder / "album" / name)
        make_mask(size).save(folder / "masks" / name)
    return folder


def folder_of(path):
    """The picture files in and below a folder, with their pixels."""
    files = sorted(file for file in Path(path).rglob("*") if file.is_file() and file.suffix != ".tmp")
    return {file.relative_to(path).as_posix(): np.asarray(Image.open(file), int) for file in files}


def test_folders_of_folders_in_batches_with_a_report(moebius, album, model):
    arguments = ("inpaint", "album", "masks", "-o", "results", "--model", model, "--steps", 2)
    arguments = (*arguments, "--report", "report.jsonl")
    code, out, err = moebius(*arguments)
    assert code == 0 and len(out) == 3 and len(err) == 1 and "`--recursive`" in err[0]
    code, out, err = moebius(*arguments, "--recursive")
    assert (code, out) == (0, ["results/deep/d.png"]) and len(err) == 1 and "3 outputs exist" in err[0]
    Path("album/e.png").write_text("Dear diary")
    assert moebius(*arguments, "--recursive", "--batch-size", 2, "-o", "batched")[0] == 1
    single, batched = folder_of("results"), folder_of("batched")
    assert list(single) == list(batched) == ["a.png", "b.png", "c.png", "deep/d.png"]
    assert all(np.abs(single[name] - batched[name]).max() <= 1 for name in single)

    lines = [json.loads(line) for line in Path("report.jsonl").read_text().splitlines()]
    assert [line["status"] for line in lines].count("done") == 8 and len(lines) == 9
    assert all(line["seconds"] > 0 and line["error"] is None for line in lines if line["status"] == "done")
    assert lines[3] | {"seconds": None} == {
        "photo": "album/deep/d.png",
        "output": "results/deep/d.png",
        "status": "done",
        "seconds": None,
        "error": None,
    }
    (failed,) = [line for line in lines if line["status"] == "failed"]
    assert failed["photo"] == "album/e.png" and failed["output"] is None and "one mask" in failed["error"]


@pytest.mark.parametrize("output_format", ["webdataset", "parquet"])
def test_shards_in_and_out(moebius, album, model, output_format):
    if output_format == "parquet":
        pytest.importorskip("pyarrow")
    options = ("--model", model, "--steps", 2)
    shards = (*options, "--output-format", output_format, "--shard-size", 2)
    code, out, err = moebius("inpaint", "album", "masks", "-o", "shards", "--recursive", *shards)
    suffix = {"webdataset": "tar", "parquet": "parquet"}[output_format]
    assert (code, out, err) == (0, [f"shards/00000.{suffix}", f"shards/00001.{suffix}"], [])
    code, out, err = moebius("inpaint", "album", "masks", "-o", "shards", "--recursive", *shards)
    assert (code, out) == (0, []) and "4 outputs exist" in err[0]
    # What comes out of the shards again are the photos as they were done from files; a black mask keeps them so.
    Image.new("L", (18, 14)).save("black.png")
    assert moebius("inpaint", "shards", "black.png", "-o", "out", "--resize-mask", *options)[0] == 0
    assert moebius("inpaint", "album", "masks", "-o", "results", "--recursive", *options)[0] == 0
    ours, theirs = folder_of("results"), folder_of("out")
    assert list(ours) == list(theirs) and all(np.array_equal(ours[name], theirs[name]) for name in ours)


def test_one_bar_for_many_photos(moebius, album, model, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TQDM_MININTERVAL", "0")
    code, _, err = moebius("inpaint", "album", "masks", "-o", "results", "--model", model, "--steps", 2)
    assert code == 0
    bars = [part for line in err for part in line.split("\r") if "photo/s" in part or "s/photo" in part]
    assert any("0/3" in bar for bar in bars) and "3/3" in bars[-1]
    assert not any("/2 [" in part for line in err for part in line.split("\r"))  # none of the steps


def test_an_interruption_finishes_the_photo_at_hand_and_says_how_to_go_on(moebius, album, model, monkeypatch):
    call, calls = MoebiusInpaintPipeline.__call__, []

    def interrupted(self, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            signal.raise_signal(signal.SIGINT)
        return call(self, **kwargs)

    monkeypatch.setattr(MoebiusInpaintPipeline, "__call__", interrupted)
    arguments = ("inpaint", "album", "masks", "-o", "results", "--model", model, "--steps", 2)
    handler = signal.getsignal(signal.SIGINT)  # a background process ignores the signal
    code, out, err = moebius(*arguments)
    assert (code, out) == (130, ["results/a.png", "results/b.png"])
    assert "the photo at hand" in err[-2]
    assert "stopped after 2 of 3 photos; the same command goes on" in err[-1]
    assert sorted(os.listdir("results")) == ["a.png", "b.png"]
    assert signal.getsignal(signal.SIGINT) is handler
    assert moebius(*arguments)[:2] == (0, ["results/c.png"])


def test_a_second_interruption_ends_at_once(moebius, album, model, monkeypatch):
    def interrupted(self, **kwargs):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(MoebiusInpaintPipeline, "__call__", interrupted)
    code, out, err = moebius("inpaint", "album", "masks", "-o", "results", "--model", model)
    assert (code, out) == (130, []) and "stopped after 0 of 3 photos; the same command goes on" in err[-1]
    assert not Path("results").exists()


@pytest.mark.slow
def test_a_killed_run_leaves_whole_pictures_and_the_next_goes_on(moebius, folder, model):
    Path("photos").mkdir()
    for seed in range(24):
        make_photo(size=(256, 192), seed=seed).save(f"photos/{seed:02}.png")
    make_mask((256, 192)).save("mask.png")
    arguments = ["inpaint", "photos", "mask.png", "-o", "results", "--model", model, "--steps", "2"]
    process = subprocess.Popen(
        [sys.executable, "-m", "diffusers_moebius", *arguments], stdout=subprocess.PIPE, text=True
    )
    for _ in range(3):
        process.stdout.readline()
    process.kill()
    process.wait()
    before = folder_of("results")
    assert 3 <= len(before) < 24
    assert moebius(*arguments)[0] == 0
    after = folder_of("results")
    assert not list(Path("results").glob(".*"))
    assert list(after) == [f"{seed:02}.png" for seed in range(24)]
    assert all(np.array_equal(values, after[name]) for name, values in before.items())
    assert moebius(*arguments, "-o", "alone", "--overwrite")[0] == 0
    alone = folder_of("alone")
    assert all(np.array_equal(values, alone[name]) for name, values in after.items())


def test_interruption_leaves_nothing(moebius, folder, model, monkeypatch):
    def interrupted(self, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(MoebiusInpaintPipeline, "__call__", interrupted)
    assert moebius("inpaint", "photo.png", "mask.png", "-o", "out.png", "--model", model) == (
        130,
        [],
        ["moebius: stopped; nothing is written"],
    )
    assert sorted(os.listdir()) == ["mask.png", "photo.png"]


def test_memory_that_does_not_suffice_is_one_line(moebius, folder, model, monkeypatch):
    import torch

    def exhausted(self, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")

    monkeypatch.setattr(MoebiusInpaintPipeline, "__call__", exhausted)
    code, _, err = moebius("inpaint", "photo.png", "mask.png", "-o", "out.png", "--model", model)
    assert code == 2 and len(err) == 1 and "photo.png" in err[0] and "memory" in err[0]


def test_unexpected_errors_keep_their_traceback(folder, model, monkeypatch):
    def broken(self, **kwargs):
        raise AssertionError("a bug")

    monkeypatch.setattr(MoebiusInpaintPipeline, "__call__", broken)
    with pytest.raises(AssertionError, match="a bug"):
        main(["inpaint", "photo.png", "mask.png", "-o", "out.png", "--model", model])


def test_convert_and_info(moebius, folder, parity_dir):
    source, vae = parity_dir / "student_tiny.safetensors", parity_dir / "vae_tiny"
    config = parity_dir / "student_tiny.json"
    arguments = ("convert", source, "converted", "--config", config, "--vae", vae)
    assert moebius(*arguments) == (0, [str(folder / "converted")], [])
    code, out, err = moebius(*arguments)
    assert (code, out, len(err)) == (2, [], 1) and "`target`" in err[0]
    assert moebius(*arguments, "--overwrite")[0] == 0

    code, out, err = moebius("info", "converted", "--json")
    description = json.loads("\n".join(out))
    assert (code, err) == (0, [])
    assert set(description["components"]) == {"unet", "vae", "lcg_embedder"}
    assert description["parameters"] == sum(part["parameters"] for part in description["components"].values())
    weights = sum(path.stat().st_size for path in Path("converted").rglob("*.safetensors"))
    assert description["bytes"] == pytest.approx(weights, rel=0.2)  # the files have headers
    assert description["scheduler"]["class"] == "DDIMScheduler"
    assert description["native_size"] == 128
    assert description["multiply_adds"]["guided_step"] == 2 * description["multiply_adds"]["unet_evaluation"] > 0

    code, out, err = moebius("info", "converted")
    assert (code, err) == (0, [])
    for part in description["components"].values():
        assert any(part["class"] in line and f"{part['parameters']:,}" in line for line in out)


@pytest.mark.parametrize("arguments", [["--help"], ["-h"], []])
def test_help_shows_the_commands(moebius, arguments):
    code, out, err = moebius(*arguments)
    assert (code, err) == (0, [])
    assert all(any(line.strip().startswith(command) for line in out) for command in ("inpaint", "convert", "info"))


@pytest.mark.parametrize("command", ["inpaint", "convert", "info"])
def test_help_shows_an_example(moebius, command):
    code, out, _ = moebius(command, "--help")
    assert code == 0
    assert any(line.strip().startswith(f"moebius {command} ") for line in out)


def test_version(moebius):
    assert moebius("--version") == (0, [f"moebius {__version__}"], [])


def test_conversion_without_the_hub_is_one_line(moebius, folder, parity_dir, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(folder / "cache"))
    source, config = parity_dir / "student_tiny.safetensors", parity_dir / "student_tiny.json"
    code, out, err = moebius("convert", source, "converted", "--config", config)
    assert (code, out, len(err)) == (2, [], 1) and "hustvl/PixelHacker" in err[0]
    assert not Path("converted").exists()


def test_closed_pipe_ends_quietly():
    process = subprocess.Popen(
        [sys.executable, "-m", "diffusers_moebius", "--help"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait() == 130


@pytest.mark.slow
def test_unreachable_hub_is_one_line(folder, tmp_path):
    environment = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path / "cache")}
    process = subprocess.run(
        [
            sys.executable,
            "-m",
            "diffusers_moebius",
            "inpaint",
            "photo.png",
            "mask.png",
            "-o",
            "o.png",
            "--model",
            "a/b",
        ],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert (process.returncode, process.stdout) == (2, "")
    assert len(process.stderr.splitlines()) == 1
    assert process.stderr.startswith("moebius: error: The model a/b cannot be loaded")
    assert sorted(os.listdir()) == ["mask.png", "photo.png"]
