import json
import sys

import numpy as np
import pytest
import torch
from numbers_of_models import load_release, relative_error
from PIL import Image

from diffusers_moebius.models.linear_attention import (
    ChunkedGatedLinearAttentionProcessor,
    FlashGatedLinearAttentionProcessor,
    GatedLinearAttention,
    GatedLinearAttentionProcessor,
)
from diffusers_moebius.models.unet_2d_pixelhacker import PixelHackerUNet2DModel

TINY = {
    "sample_size": 16,
    "block_out_channels": (16, 32, 32, 32),
    "num_attention_heads": 4,
    "cross_attention_dim": 16,
    "encoder_hid_dim": 24,
    "norm_num_groups": 8,
}


def set_attention(model, processor):
    for module in model.modules():
        if isinstance(module, GatedLinearAttention):
            module.set_processor(processor)


@pytest.fixture
def release(parity_dir):
    """The release's tiny teacher, and inputs and outputs of its U-Net."""
    return load_release(PixelHackerUNet2DModel(**TINY).eval(), parity_dir, "teacher")


def run(model, numbers, context, dtype=torch.float32):
    with torch.no_grad():
        output = model.to(dtype)(
            numbers["input.latent_model_input"].to(dtype),
            numbers["input.timestep"],
            context.to(dtype),
            output_hidden_states=True,
        )
    return [*output.hidden_states, output.sample]


@pytest.mark.parametrize("processor", [GatedLinearAttentionProcessor(), ChunkedGatedLinearAttentionProcessor()])
def test_outputs_match_the_release_as_well_as_float32_allows(release, processor):
    # The causal recurrences amplify rounding: the recorded float32 numbers are themselves up to 2.4e-5 away from the
    # same network in float64. So ours may be about as far from the recorded ones as those are from the exact ones.
    model, numbers, context = release
    recorded = [numbers[f"teacher.block_outputs.{i}"] for i in range(9)] + [numbers["teacher.sample"]]
    set_attention(model, GatedLinearAttentionProcessor())
    exact = run(model, numbers, context, torch.float64)
    set_attention(model, processor)
    ours = run(model, numbers, context)
    assert len(ours) == 10
    for actual, expected, truth in zip(ours, recorded, exact, strict=True):
        assert relative_error(expected, truth) < 3e-5
        assert relative_error(actual, expected) < max(1e-5, 4 * relative_error(expected, truth))
    for actual, expected in zip(ours[:6], recorded[:6], strict=True):
        assert relative_error(actual, expected) < 1e-5


def test_names_shapes_and_size_of_the_full_model_are_the_published_ones(parity_dir):
    published = json.loads((parity_dir / "teacher_full_keys.json").read_text())
    with torch.device("meta"):
        model = PixelHackerUNet2DModel()
    ours = {f"diff_model.{name}": list(value.shape) for name, value in model.state_dict().items()}
    ours["embedding_layer.weight"] = [20, 3072]
    assert ours == published
    assert model.num_parameters() + 20 * 3072 == 862_251_708


@pytest.mark.parametrize("length", [1, 15, 16, 17, 100])
@pytest.mark.parametrize("strength", [1.0, 100.0])
def test_chunked_attention_is_the_recurrence(length, strength):
    torch.manual_seed(length)
    layer = GatedLinearAttention(48, 3)
    hidden_states = strength * torch.randn(2, length, 48)
    with torch.no_grad():
        chunked = layer(hidden_states)
        layer.set_processor(GatedLinearAttentionProcessor())
        assert relative_error(chunked, layer(hidden_states)) < 1e-5


def test_chunked_attention_survives_gates_that_forget_at_once():
    torch.manual_seed(0)
    layer = GatedLinearAttention(16, 2)
    layer.gk_proj[1].bias.data.fill_(-1e4)
    output = layer(torch.randn(1, 50, 16))
    assert output.isfinite().all()


def test_gradients_of_chunked_attention_are_those_of_the_recurrence():
    torch.manual_seed(0)
    layer = GatedLinearAttention(16, 2)
    hidden_states = torch.randn(2, 40, 16)
    gradients = []
    for processor in (ChunkedGatedLinearAttentionProcessor(), GatedLinearAttentionProcessor()):
        layer.set_processor(processor)
        layer.zero_grad()
        layer(hidden_states).square().mean().backward()
        gradients.append([p.grad.clone() for p in layer.parameters()])
    for chunked, literal in zip(*gradients, strict=True):
        assert relative_error(chunked, literal) < 1e-4


def test_attention_is_causal_in_raster_order():
    torch.manual_seed(0)
    layer = GatedLinearAttention(16, 2)
    hidden_states = torch.randn(1, 40, 16)
    changed = hidden_states.clone()
    changed[:, 25:] += 1
    with torch.no_grad():
        before, after = layer(hidden_states), layer(changed)
    assert torch.allclose(before[:, :25], after[:, :25], atol=1e-6)
    assert not torch.allclose(before[:, 25:], after[:, 25:], atol=1e-3)


def test_chunk_that_would_overflow_is_refused():
    with pytest.raises(ValueError, match="`chunk_size`"):
        ChunkedGatedLinearAttentionProcessor(chunk_size=64)


def test_flash_kernel_says_what_it_needs(monkeypatch):
    monkeypatch.setitem(sys.modules, "fla", None)
    with pytest.raises(ImportError, match="flash-linear-attention"):
        FlashGatedLinearAttentionProcessor()


def test_saves_loads_and_checkpoints(tmp_path):
    torch.manual_seed(0)
    model = PixelHackerUNet2DModel(**TINY)
    model.save_pretrained(tmp_path)
    loaded = PixelHackerUNet2DModel.from_pretrained(tmp_path)
    inputs = torch.randn(1, 9, 8, 16), 5, torch.randn(1, 10, 24)
    plain = loaded(*inputs).sample
    loaded.enable_gradient_checkpointing()
    loaded.train()
    output = loaded(*inputs).sample
    output.square().mean().backward()
    assert torch.allclose(plain, output, atol=1e-5)
    assert all(p.grad is not None for p in loaded.parameters())


@pytest.mark.parametrize("shape", [(1, 8, 16, 16), (1, 9, 12, 16), (9, 16, 16)])
def test_wrong_shapes_are_named(shape):
    with pytest.raises(ValueError, match="`sample`"):
        PixelHackerUNet2DModel(**TINY)(torch.zeros(shape), 1, torch.zeros(1, 10, 24))


def test_runs_in_the_pipeline(tiny_pipeline):
    pipeline = tiny_pipeline.from_pipe(tiny_pipeline, unet=PixelHackerUNet2DModel(**TINY).eval())
    pipeline.set_progress_bar_config(disable=True)
    mask = np.zeros((64, 96), np.uint8)
    mask[20:40, 30:60] = 255
    image = Image.new("RGB", (96, 64), "teal")
    result = pipeline(image=image, mask_image=Image.fromarray(mask), num_inference_steps=2).images[0]
    assert result.size == image.size
    assert (np.asarray(result)[mask == 0] == np.asarray(image)[mask == 0]).all()
