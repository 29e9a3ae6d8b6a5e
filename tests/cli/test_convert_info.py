"""`moebius convert` and `moebius info`."""

import json
from pathlib import Path

import huggingface_hub
import pytest


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


def test_conversion_without_the_hub_is_one_line(moebius, folder, parity_dir, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(folder / "cache"))
    source, config = parity_dir / "student_tiny.safetensors", parity_dir / "student_tiny.json"
    code, out, err = moebius("convert", source, "converted", "--config", config)
    assert (code, out, len(err)) == (2, [], 1) and "hustvl/PixelHacker" in err[0]
    assert not Path("converted").exists()
