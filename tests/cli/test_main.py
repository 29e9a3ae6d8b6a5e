"""What all commands share: help, version, errors of one line."""

import gc
import os
import subprocess
import sys

import pytest

from diffusers_moebius import __version__
from diffusers_moebius.cli import main
from diffusers_moebius.pipelines.pipeline_moebius_inpaint import MoebiusInpaintPipeline


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


def test_unexpected_errors_keep_their_traceback(folder, model, monkeypatch):
    def broken(self, **kwargs):
        raise AssertionError("a bug")

    monkeypatch.setattr(MoebiusInpaintPipeline, "__call__", broken)
    with pytest.raises(AssertionError, match="a bug"):
        main(["inpaint", "photo.png", "mask.png", "-o", "out.png", "--model", model])


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


def test_closed_pipe_ends_quietly():
    process = subprocess.Popen(
        [sys.executable, "-m", "diffusers_moebius", "--help"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait() == 130


def test_garbage_is_collected_once_the_model_is_loaded_and_after_errors(moebius, folder, monkeypatch):
    frozen, states = gc.get_freeze_count(), []
    load, fill = MoebiusInpaintPipeline.from_pretrained.__func__, MoebiusInpaintPipeline.__call__

    def record(function):
        return lambda *args, **kwargs: states.append(gc.isenabled()) or function(*args, **kwargs)

    monkeypatch.setattr(MoebiusInpaintPipeline, "from_pretrained", classmethod(record(load)))
    monkeypatch.setattr(MoebiusInpaintPipeline, "__call__", record(fill))
    assert moebius("inpaint", "photo.png", "mask.png", "-o", "out.png")[0] == 0
    assert states == [False, True]
    assert moebius("inpaint", "photo.png", "mask.png", "-o", "out2.png", "--model", "no/such/model")[0] == 2
    assert gc.isenabled() and gc.get_freeze_count() == frozen
