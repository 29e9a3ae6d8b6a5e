import json

import pytest
import torch

from diffusers_moebius.evaluation.methods import make_method
from diffusers_moebius.models.unet_2d_moebius import MoebiusUNet2DModel


@pytest.fixture(scope="module")
def efficiency(import_script):
    return import_script("efficiency")


def test_multiply_adds_of_the_full_model(efficiency):
    with torch.device("meta"):
        unet = MoebiusUNet2DModel()
    # 158 G were measured on the original release, in which each lambda is built before a query meets it.
    assert round(efficiency.count_literal_multiply_adds(unet, (10, 3072)) / 1e9) == 158


def test_a_moebius_pipeline(efficiency, tiny_pipeline, tmp_path, capsys):
    tiny_pipeline.save_pretrained(tmp_path / "model")
    options = ["--method", f"tiny={tmp_path}/model", "--resolution", "128", "--steps", "4", "--repeats", "2"]
    efficiency.main([*options, "--guidance_scale", "2", "--json", str(tmp_path / "figures.json")])
    assert "| tiny |" in capsys.readouterr().out
    row = json.loads((tmp_path / "figures.json").read_text())["tiny"]
    unet, embedder = tiny_pipeline.unet, tiny_pipeline.lcg_embedder
    assert row["parameters"] == sum(p.numel() for model in (unet, embedder) for p in model.parameters())
    assert row["steps"] == 3  # of four, at the strength of the release
    assert row["total_seconds"] == pytest.approx(3 * row["step_seconds"])
    assert 0 < row["total_seconds"] < 2 * row["picture_seconds"]  # medians of few, so with room
    assert row["multiply_adds_literal"] != row["multiply_adds"] > 0
    # Both branches of the guidance are one call, and an evaluation is one of them.
    efficiency.main([*options, "--guidance_scale", "1", "--json", str(tmp_path / "figures.json")])
    assert json.loads((tmp_path / "figures.json").read_text())["tiny"]["multiply_adds"] == row["multiply_adds"]


@pytest.mark.parametrize("kind", ["sdxl_inpaint_folder", "flux_fill_folder"])
def test_any_pipeline_of_diffusers(efficiency, kind, request, tmp_path, capsys):
    settings = tmp_path / "methods.toml"
    folder = request.getfixturevalue(kind)
    call = "num_inference_steps = 3, strength = 1.0, guidance_scale = 7.0"
    settings.write_text(f'[other]\nrepository = "{folder}"\ncall = {{ {call} }}\n')
    options = ["--method", "other", "--settings", str(settings), "--resolution", "64", "--repeats", "1"]
    efficiency.main([*options, "--json", str(tmp_path / "figures.json")])
    row = json.loads((tmp_path / "figures.json").read_text())["other"]
    assert row["steps"] == 3 and row["multiply_adds"] > 0 and row["multiply_adds_literal"] is None
    assert row["weight_bytes"] > 4 * row["parameters"]  # the denoiser's are not all


def test_what_has_no_steps_is_refused(efficiency):
    with pytest.raises(ValueError, match="`method`"):
        efficiency.measure_efficiency(make_method("mean"))
