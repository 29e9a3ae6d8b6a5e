"""Pipelines to test."""

import pytest
from diffusers import DDIMScheduler
from small_parts import BETAS, make_pipeline, make_small_vae

from diffusers_moebius.models.latent_categories import LatentCategoriesEmbedder
from diffusers_moebius.models.unet_2d_moebius import MoebiusUNet2DModel


@pytest.fixture(scope="module")
def smallest_pipe():
    """A pipeline that outlives the examples of a property test; its native size is 64 px."""
    vae = make_small_vae()
    unet = MoebiusUNet2DModel(
        sample_size=8,
        block_out_channels=(8, 16, 16),
        num_attention_heads=2,
        cross_attention_dim=8,
        encoder_hid_dim=8,
        local_window_size=3,
        norm_num_groups=4,
    ).eval()
    return make_pipeline(vae, unet, LatentCategoriesEmbedder(20, 8), DDIMScheduler(**BETAS))


@pytest.fixture
def pipe(tiny_unet, tiny_lcg_embedder, tiny_scheduler):
    """The tiny pipeline with the cheaper autoencoder, for whatever does not depend on the autoencoder."""
    return make_pipeline(make_small_vae(), tiny_unet, tiny_lcg_embedder, tiny_scheduler)


@pytest.fixture
def unet_calls(tiny_unet):
    """The shapes of the denoiser's inputs, one a call."""
    calls = []
    tiny_unet.register_forward_pre_hook(lambda module, args: calls.append(tuple(args[0].shape)))
    return calls
