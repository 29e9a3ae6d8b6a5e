"""Removals with a truth: things that are pasted, and the table of what methods make of them."""

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

pytest.importorskip("cv2")
pytest.importorskip("skimage")


@pytest.fixture(scope="module")
def removals(import_script):
    return import_script("removals")


@pytest.mark.parametrize("seed", range(5))
def test_the_drawn_mask_covers_the_thing_but_not_all_of_its_shadow(removals, seed):
    photo, other = np.full((512, 512, 3), 200, np.uint8), np.full((512, 512, 3), [255, 0, 0], np.uint8)
    picture, drawn = removals.paste_thing(photo, other, seed)
    changed = np.abs(picture.astype(int) - photo).max(2) > 4  # shadows end softly
    thing = (picture == other).all(2)
    assert 500 < thing.sum() < 0.15 * thing.size
    assert (thing & ~drawn).sum() < 0.02 * thing.sum()
    assert (changed & ~drawn).any()
    assert not (changed & ~removals.dilate_mask(drawn, removals.AROUND)).any()
    same, other_place = removals.paste_thing(photo, other, seed)[0], removals.paste_thing(photo, other, seed + 1)[0]
    assert (picture == same).all()
    assert (picture != other_place).any()


def test_table(removals, tmp_path, capsys):
    for name, value in (("a", 90), ("b", 160)):
        noise = np.random.default_rng(value).integers(-20, 20, (64, 64, 3))
        Image.fromarray((value + noise).astype(np.uint8)).resize((512, 512)).save(tmp_path / f"{name}.png")
    generator = torch.Generator().manual_seed(0)
    shapes = ((4, 3, 11, 11), (6, 4, 5, 5), (8, 6, 3, 3), (8, 8, 3, 3), (4, 8, 3, 3))  # AlexNet's with few channels
    weights = {f"conv.{i}.weight": 0.1 * torch.randn(shape, generator=generator) for i, shape in enumerate(shapes)}
    weights |= {f"conv.{i}.bias": torch.zeros(shape[0]) for i, shape in enumerate(shapes)}
    weights |= {f"head.{i}": torch.ones(shape[0]) for i, shape in enumerate(shapes)}
    save_file(weights, tmp_path / "lpips.safetensors")
    removals.main(
        ["--data", str(tmp_path), "--lpips_weights", str(tmp_path / "lpips.safetensors"), "--methods", "mean", "telea"]
    )
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()]
    assert rows[0] == ["2 things, mask grown by", "LPIPS-Alex ↓", "PSNR ↑"]
    scores = {name: float(noise) for name, _, noise in rows[2:]}
    assert next(iter(scores)) == "nano, over rims" and "mean, 8 px" in scores
    assert scores["telea, 8 px"] > scores["mean, 8 px"]


def test_sheet(removals, tmp_path, monkeypatch):
    monkeypatch.setattr(removals, "CASES", removals.CASES[2:4])
    removals.main(["--output", str(tmp_path / "sheet.png")])
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.size == (4 * removals.WIDTH, removals.WIDTH)
