"""Ways to fill a hole, by name."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from diffusers_moebius.evaluation.methods import blank_hole, make_method, read_settings


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


@pytest.fixture
def sdxl_folder(tmp_path):
    """A tiny random SDXL inpainting pipeline."""
    from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLInpaintPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    torch.manual_seed(0)
    vocabulary = tmp_path / "vocab.json"
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    tokens = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    vocabulary.write_text(json.dumps({token: number for number, token in enumerate(tokens)}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(str(vocabulary), str(tmp_path / "merges.txt"), model_max_length=77)
    text = CLIPTextConfig(
        vocab_size=len(tokens),
        hidden_size=16,
        intermediate_size=16,
        num_attention_heads=2,
        num_hidden_layers=2,
        projection_dim=16,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    StableDiffusionXLInpaintPipeline(
        vae=AutoencoderKL(
            block_out_channels=(8, 16),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            norm_num_groups=4,
        ),
        text_encoder=CLIPTextModel(text),
        text_encoder_2=CLIPTextModelWithProjection(text),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=UNet2DConditionModel(
            in_channels=9,
            block_out_channels=(8, 16),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=(2, 4),
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            transformer_layers_per_block=(1, 1),
            projection_class_embeddings_input_dim=64,
            cross_attention_dim=32,
            norm_num_groups=4,
        ),
        scheduler=EulerDiscreteScheduler(),
    ).save_pretrained(tmp_path / "sdxl")
    return tmp_path / "sdxl"


def test_any_pipeline_of_diffusers(sdxl_folder, photo, mask, tmp_path):
    settings = tmp_path / "methods.toml"
    settings.write_text(
        f'[sdxl]\nrepository = "{sdxl_folder}"\n[sdxl.call]\nprompt = "sky"\nnum_inference_steps = 2\nstrength = 1.0\n'
    )
    method = make_method("sdxl", read_settings(settings))
    once, again = (method(blank_hole(photo, mask), mask, "a", 1) for _ in range(2))
    assert once.shape == photo.shape and once.dtype == np.uint8 and (once == again).all()


def test_settings_that_are_wrong_are_named(tmp_path):
    path = tmp_path / "methods.toml"
    path.write_text("[a]\nsteps = 3\n")
    with pytest.raises(ValueError, match=r"\[a\].*repository"):
        read_settings(path)
