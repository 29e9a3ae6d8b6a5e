import accelerate
import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from numbers_of_models import random_inputs, randomize_statistics, relative_error
from peft import LoraConfig
from tiny_unet import TINY
from torch import nn

from diffusers_moebius.models.fusion import (
    FusedSeparableConv2d,
    SlicedMixFeedForward,
    SmallGridUpsample2D,
    fuse_autoencoder,
)
from diffusers_moebius.models.unet_2d_moebius import MoebiusUNet2DModel, MoebiusUpsample2D


@pytest.mark.parametrize("size", [(1, 1), (5, 8), (16, 3)])
def test_upsampling_on_the_small_grid_is_exact(size):
    torch.manual_seed(0)
    layer = MoebiusUpsample2D(6)
    hidden_states = torch.randn(2, 6, *size)
    with torch.no_grad():
        for max_elements in (1, 100, 2**20):  # single rows, bands that end unevenly, all at once
            enlarged = SmallGridUpsample2D(layer, max_elements)(hidden_states)
            assert relative_error(enlarged, layer(hidden_states)) < 1e-5


def make_autoencoder():
    torch.manual_seed(0)
    return AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        norm_num_groups=4,
    ).eval()


@pytest.mark.parametrize("size", [(16, 16), (12, 20)])
def test_fused_autoencoder_has_the_same_function(size):
    vae = make_autoencoder()
    image, latents = torch.randn(2, 3, *size).clamp(-1, 1), torch.randn(2, 4, size[0] // 2, size[1] // 2)
    with torch.no_grad():
        expected = vae.encode(image).latent_dist.parameters, vae.decode(latents).sample
        for _ in range(2):  # a second time changes nothing
            fuse_autoencoder(vae)
            assert relative_error(vae.encode(image).latent_dist.parameters, expected[0]) < 1e-5
            assert relative_error(vae.decode(latents).sample, expected[1]) < 1e-5
        vae.enable_slicing()
        assert relative_error(vae.decode(latents).sample, expected[1]) < 1e-5


def test_gradients_pass_a_fused_autoencoder():
    vae, gradients = make_autoencoder().requires_grad_(False), []
    for _ in range(2):
        latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
        vae.decode(latents).sample.square().mean().backward()
        gradients.append(latents.grad)
        fuse_autoencoder(vae)
    assert relative_error(gradients[1], gradients[0]) < 1e-4


def test_fused_autoencoder_cannot_be_saved(tmp_path):
    vae = make_autoencoder()
    fuse_autoencoder(vae)
    with pytest.raises(ValueError, match="fused"):
        vae.save_pretrained(tmp_path / "vae")
    assert not (tmp_path / "vae").exists()


def test_other_autoencoders_stay_as_they_are(tmp_path):
    vae = AutoencoderTiny(encoder_block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4)
    fuse_autoencoder(vae)
    vae.save_pretrained(tmp_path / "vae")
    assert (tmp_path / "vae").exists()


def test_fused_model_has_the_same_function_and_no_batch_norm(tiny_unet):
    model = randomize_statistics(tiny_unet)
    inputs = [random_inputs(16, 16), random_inputs(12, 20, batch=1)]
    with torch.no_grad():
        expected = [model(*each).sample for each in inputs]
        model.fuse_for_inference()
        assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())
        for each, sample in zip(inputs, expected, strict=True):
            assert relative_error(model(*each).sample, sample) < 1e-5
        model.fuse_for_inference()  # a second time changes nothing
        assert relative_error(model(*inputs[0]).sample, expected[0]) < 1e-5


def test_model_in_train_mode_is_refused(tiny_unet):
    with pytest.raises(ValueError, match="train mode"):
        tiny_unet.train().fuse_for_inference()


def test_fused_model_cannot_be_saved(tiny_unet, tmp_path):
    tiny_unet.fuse_for_inference()
    with pytest.raises(ValueError, match="fused"):
        tiny_unet.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()


def with_adapter(model):
    torch.manual_seed(1)
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k", "point_conv.conv"], init_lora_weights=False))
    return model.eval()


def test_active_adapters_are_refused_and_fused_ones_stay(tiny_unet):
    model = with_adapter(randomize_statistics(tiny_unet))
    inputs = random_inputs()
    with torch.no_grad():
        expected = model(*inputs).sample
        with pytest.raises(ValueError, match="LoRA"):
            model.fuse_for_inference()
        assert torch.equal(model(*inputs).sample, expected)  # nothing has been touched
        model.fuse_lora()
        model.fuse_for_inference()
        assert relative_error(model(*inputs).sample, expected) < 1e-5


def test_slices_of_fused_layers_add_up():
    torch.manual_seed(0)
    model = randomize_statistics(MoebiusUNet2DModel(**TINY | {"layers_per_block": 1}).eval())
    conv, feed_forward = model.up_blocks[0].resnets[0].conv1, model.up_blocks[0].attentions[0].transformer_blocks[0].ff
    wide = torch.randn(2, conv.conv_dw.in_channels, 6, 5).contiguous(memory_format=torch.channels_last)
    narrow = torch.randn(2, 32, 6, 5).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        expected = conv(wide), feed_forward(narrow)
        for max_elements in (1, 1000, 2**20):
            assert relative_error(FusedSeparableConv2d(conv, max_elements)(wide), expected[0]) < 1e-5
            assert relative_error(SlicedMixFeedForward(feed_forward, max_elements)(narrow), expected[1]) < 1e-5


def offload_leaves_to_disk(model, folder):
    # On the disk, so that a weight that nobody has called back is not merely still there.
    model.enable_group_offload(
        onload_device=torch.device("cpu"), offload_type="leaf_level", offload_to_disk_path=str(folder)
    )


OFFLOADING = {
    "sequential": lambda model, folder: accelerate.cpu_offload(model, torch.device("cpu")),
    "leaves": offload_leaves_to_disk,
    "model": lambda model, folder: accelerate.cpu_offload_with_hook(model, torch.device("cpu")),
}


@pytest.mark.parametrize("way", OFFLOADING)
@pytest.mark.parametrize("fused", [False, True])
def test_offloaded_model_computes_the_same(tiny_unet, tmp_path, way, fused):
    model = randomize_statistics(tiny_unet)
    if fused:
        model.fuse_for_inference()
    with torch.no_grad():
        expected = model(*random_inputs()).sample
        OFFLOADING[way](model, tmp_path)
        for _ in range(2):
            assert relative_error(model(*random_inputs()).sample, expected) < 1e-6


@pytest.mark.parametrize("fused", [False, True])
def test_layerwise_casting_stores_less_and_stays_close(tiny_unet, fused):
    model = randomize_statistics(tiny_unet)
    with torch.no_grad():
        expected = model(*random_inputs()).sample
        if fused:
            model.fuse_for_inference()
        size = model.get_memory_footprint()
        model.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
        assert model.get_memory_footprint() < size
        assert relative_error(model(*random_inputs()).sample, expected) < 0.02


def test_gradients_of_the_input_survive_what_is_done_in_place(tiny_unet):
    model = randomize_statistics(tiny_unet).requires_grad_(False)
    gradients = []
    for _ in range(2):
        sample, timestep, context = random_inputs()
        model(sample.requires_grad_(), timestep, context).sample.square().mean().backward()
        gradients.append(sample.grad)
        model.fuse_for_inference()
    assert relative_error(gradients[1], gradients[0]) < 1e-4
