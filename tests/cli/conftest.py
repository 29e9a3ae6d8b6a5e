"""A tiny model, a folder with a photo, and the command itself."""

from pathlib import Path

import pytest
from cli_pictures import make_mask, make_photo

from diffusers_moebius import convert_release_checkpoint
from diffusers_moebius.cli import main


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
