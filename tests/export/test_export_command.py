import json

import numpy as np
import pytest
from PIL import Image

from diffusers_moebius.cli import main


def run(capsys, *arguments, command="export"):
    with pytest.raises(SystemExit) as end:
        main([command, *map(str, arguments)])
    captured = capsys.readouterr()
    return end.value.code, captured.out, captured.err


def test_writes_graphs_with_another_autoencoder(kl_pipeline, tiny_autoencoder, tmp_path, capsys):
    kl_pipeline.save_pretrained(tmp_path / "model")
    tiny_autoencoder.save_pretrained(tmp_path / "vae")
    code, out, _ = run(
        capsys,
        *(tmp_path / "model", tmp_path / "graphs", "--vae", tmp_path / "vae"),
        *("--size", "32", "--size", "32x64", "--dtype", "float16"),
    )
    assert (code, out) == (0, f"{tmp_path / 'graphs'}\n")
    config = json.loads((tmp_path / "graphs" / "vae_decoder" / "config.json").read_text())
    assert config["_class_name"] == "AutoencoderTiny"
    card = (tmp_path / "graphs" / "README.md").read_text()
    assert "32×64" in card and "float16" in card


@pytest.mark.parametrize("size", ["512x512x3", "large", "-32", ""])
def test_bad_size(size, tmp_path, capsys):
    code, _, error = run(capsys, "nano", tmp_path / "graphs", f"--size={size}")
    assert code == 2
    assert "`--size` must be a number of pixels or HEIGHTxWIDTH" in error
    assert not (tmp_path / "graphs").exists()


def test_inpaint_takes_an_exported_folder(exported, tmp_path, capsys):
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8))
    mask = np.zeros((48, 64), np.uint8)
    mask[20:30, 20:40] = 255
    photo.save(tmp_path / "photo.png")
    Image.fromarray(mask).save(tmp_path / "mask.png")
    files = [tmp_path / "photo.png", tmp_path / "mask.png", "-o", tmp_path / "result.png"]
    code, _, error = run(capsys, *files, "--model", exported, "--steps", 2, command="inpaint")
    assert code == 0, error
    result = np.asarray(Image.open(tmp_path / "result.png"))
    assert (result[mask == 0] == np.asarray(photo)[mask == 0]).all()
    assert (result[mask > 0] != np.asarray(photo)[mask > 0]).any()
