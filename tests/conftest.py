"""Tiny real components that several tests build on."""

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler
from hypothesis import settings

# Several workers share few cores, and the models here are too small to profit from more than one.
torch.set_num_threads(1)

settings.register_profile("tests", deadline=None, max_examples=60)
settings.load_profile("tests")


@pytest.fixture(scope="session")
def parity_dir() -> Path:
    """Folder with the numbers that the original release produced."""
    return Path(__file__).parent / "fixtures" / "parity"


@pytest.fixture
def tiny_unet():
    """A Moebius U-Net with random weights; its native size is 128 px."""
    from diffusers_moebius.models.unet_2d_moebius import MoebiusUNet2DModel

    torch.manual_seed(0)
    return MoebiusUNet2DModel(
        sample_size=16,
        block_out_channels=(16, 32, 32),
        num_attention_heads=4,
        cross_attention_dim=16,
        encoder_hid_dim=24,
        norm_num_groups=8,
    ).eval()


@pytest.fixture
def tiny_vae(parity_dir):
    """An AutoencoderKL with random weights, 8 px a latent, scaling factor 0.13025."""
    return AutoencoderKL.from_pretrained(parity_dir / "vae_tiny").eval()


@pytest.fixture
def tiny_lcg_embedder():
    """The latent category embedder that fits `tiny_unet`."""
    from diffusers_moebius.models.latent_categories import LatentCategoriesEmbedder

    torch.manual_seed(0)
    return LatentCategoriesEmbedder(num_embeddings=20, embedding_dim=24).eval()


@pytest.fixture
def tiny_scheduler():
    """The released DDIM scheduler (scaled-linear betas, no clipping)."""
    return DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False)


@pytest.fixture
def tiny_pipeline(tiny_unet, tiny_vae, tiny_lcg_embedder, tiny_scheduler):
    """A whole pipeline of tiny components, without progress bar."""
    from diffusers_moebius.pipelines.pipeline_moebius_inpaint import MoebiusInpaintPipeline

    pipeline = MoebiusInpaintPipeline(
        vae=tiny_vae, unet=tiny_unet, lcg_embedder=tiny_lcg_embedder, scheduler=tiny_scheduler
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="session")
def selector_folder(tmp_path_factory) -> Path:
    """A saved SAM 2 of random weights."""
    from transformers import (
        Sam2Config,
        Sam2HieraDetConfig,
        Sam2MaskDecoderConfig,
        Sam2Model,
        Sam2PromptEncoderConfig,
        Sam2VisionConfig,
    )

    torch.manual_seed(0)
    backbone = Sam2HieraDetConfig(
        hidden_size=8,
        image_size=[128, 128],
        blocks_per_stage=[1, 1, 2, 1],
        embed_dim_per_stage=[8, 16, 32, 64],
        num_attention_heads_per_stage=[1, 1, 1, 1],
        window_size_per_stage=[8, 4, 4, 4],
        global_attention_blocks=[3],
        window_positional_embedding_background_size=[4, 4],
    )
    vision = Sam2VisionConfig(
        backbone_config=backbone,
        backbone_channel_list=[64, 32, 16, 8],
        backbone_feature_sizes=[[32, 32], [16, 16], [8, 8]],
        fpn_hidden_size=32,
    )
    config = Sam2Config(
        vision_config=vision,
        prompt_encoder_config=Sam2PromptEncoderConfig(hidden_size=32, image_size=128, patch_size=16),
        mask_decoder_config=Sam2MaskDecoderConfig(
            hidden_size=32, mlp_dim=32, num_attention_heads=2, iou_head_hidden_dim=32
        ),
    )
    folder = tmp_path_factory.mktemp("models") / "sam"
    Sam2Model(config).save_pretrained(folder)
    return folder
