"""Ways to fill a hole, by name."""

import numpy as np
import pytest
import torch
from PIL import Image

from diffusers_moebius.evaluation.methods import Settings, blank_hole, make_method, read_settings, split_names


@pytest.fixture
def photo():
    coarse = np.random.default_rng(0).integers(0, 256, (8, 12, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((96, 64), Image.Resampling.BICUBIC))


@pytest.fixture
def mask():
    values = np.zeros((64, 96), bool)
    values[20:40, 30:60] = True
    return values


@pytest.mark.parametrize("name", ["mean", "telea", "navier-stokes", "patchmatch"])
def test_classical_methods_fill_from_the_surroundings(name, photo, mask):
    pytest.importorskip({"patchmatch": "patchmatch"}.get(name, "cv2"))
    blanked = blank_hole(photo, mask)
    result = make_method(name)(blanked, mask, "photo", 0)
    assert result.shape == photo.shape and result.dtype == np.uint8
    if name != "mean":
        error = [np.abs(picture[mask].astype(float) - photo[mask]).mean() for picture in (result, blanked)]
        assert error[0] < error[1]


def test_results_made_elsewhere(photo, mask, tmp_path):
    Image.fromarray(photo).save(tmp_path / "a.png")
    method = make_method(f"results:{tmp_path}")
    assert (method(photo, mask, "a", 0) == photo).all()
    with pytest.raises(ValueError, match="no picture of b"):
        method(photo, mask, "b", 0)
    Image.fromarray(photo[:10]).save(tmp_path / "b.png")
    with pytest.raises(ValueError, match="96×10"):
        method(photo, mask, "b", 0)
    with pytest.raises(ValueError, match="folder"):
        make_method("results:nowhere")


def test_a_moebius_pipeline(tiny_pipeline, photo, mask, tmp_path):
    tiny_pipeline.save_pretrained(tmp_path / "tiny")
    method = make_method(str(tmp_path / "tiny"), num_inference_steps=2)
    once, again, other = (method(blank_hole(photo, mask), mask, "a", seed) for seed in (1, 1, 2))
    assert (once == again).all() and (once != other).any() and once.shape == photo.shape


@pytest.mark.parametrize("kind", ["sdxl", "flux"])
def test_any_pipeline_of_diffusers(kind, request, photo, mask, tmp_path):
    settings = tmp_path / "methods.toml"
    folder = request.getfixturevalue({"sdxl": "sdxl_inpaint_folder", "flux": "flux_fill_folder"}[kind])
    settings.write_text(
        f'[other]\nrepository = "{folder}"\n[other.call]\nprompt = "sky"\nnum_inference_steps = 2\nstrength = 1.0\n'
    )
    method = make_method("other", read_settings(settings), num_inference_steps=50)
    once, again, other = (method(blank_hole(photo[:60], mask[:60]), mask[:60], "a", seed) for seed in (1, 1, 2))
    assert once.shape == (60, 96, 3) and once.dtype == np.uint8  # the pipelines themselves need multiples
    assert (once == again).all() and (once != other).any()
    assert method.pipeline.num_timesteps == 2  # what is said of Moebius pipelines does not reach others


def test_a_pipeline_that_does_not_inpaint_gives_its_parts_to_one_that_does(sdxl_inpaint_folder, photo, mask, tmp_path):
    from diffusers import StableDiffusionXLInpaintPipeline, StableDiffusionXLPipeline

    parts = StableDiffusionXLInpaintPipeline.from_pretrained(sdxl_inpaint_folder).components
    StableDiffusionXLPipeline(**parts).save_pretrained(tmp_path / "generates")
    method = make_method(
        "a", {"a": Settings(str(tmp_path / "generates"), {"num_inference_steps": 2, "strength": 1.0})}
    )
    assert isinstance(method.pipeline, StableDiffusionXLInpaintPipeline)
    assert method(photo, mask, "a", 0).shape == photo.shape


def test_arguments_of_a_moebius_pipeline(tiny_pipeline, tmp_path):
    tiny_pipeline.save_pretrained(tmp_path / "tiny")
    call = make_method(str(tmp_path / "tiny"), detail=None, padding_mask_crop=64).call
    assert call == {"paste": None, "detail": None, "padding_mask_crop": 64}


def test_sections_of_moebius_pipelines(tiny_pipeline, photo, mask, tmp_path):
    tiny_pipeline.save_pretrained(tmp_path / "tiny")
    section = Settings(str(tmp_path / "tiny"), {"num_inference_steps": 2, "detail": "none"}, pipeline="moebius")
    method = make_method("plain", {"plain": section})
    assert method.call["detail"] is None
    assert method(photo, mask, "a", 0).shape == photo.shape


def test_the_colour_of_the_blank_does_not_bleed_into_the_rim(tiny_pipeline, photo, mask, tmp_path):
    tiny_pipeline.save_pretrained(tmp_path / "tiny")
    mask = np.ones_like(mask)
    mask[:8], mask[:, :8] = False, False  # thick enough for a feathered paste
    result = make_method(str(tmp_path / "tiny"), num_inference_steps=2)(blank_hole(photo, mask), mask, "a", 0)
    options = {"num_inference_steps": 2, "generator": torch.Generator().manual_seed(0)}
    images = {"image": Image.fromarray(blank_hole(photo, mask)), "mask_image": Image.fromarray(mask)}
    raw = np.asarray(tiny_pipeline(**images, paste=None, **options).images[0])
    np.testing.assert_array_equal(result[mask], raw[mask])


def test_names():
    assert split_names(["nano", "mine=runs/a", "theirs=results:b=c"]) == {
        "nano": "nano",
        "mine": "runs/a",
        "theirs": "results:b=c",
    }
    with pytest.raises(ValueError, match="different names"):
        split_names(["a=nano", "a=telea"])


def test_a_method_whose_package_is_not_there(monkeypatch):
    monkeypatch.setattr("diffusers_moebius.evaluation.methods.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pypatchmatch"):
        make_method("patchmatch")


def test_settings_that_are_wrong_are_named(tmp_path):
    path = tmp_path / "methods.toml"
    path.write_text("[a]\nsteps = 3\n")
    with pytest.raises(ValueError, match=r"\[a\].*repository"):
        read_settings(path)
    path.write_text('[a]\nrepository = "x"\npipeline = "other"\n')
    with pytest.raises(ValueError, match="diffusers or moebius"):
        read_settings(path)
