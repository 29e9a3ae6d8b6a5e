"""Tiny real components that several tests build on."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler
from hypothesis import settings
from tiny_unet import TINY

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
    return MoebiusUNet2DModel(**TINY).eval()


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


@pytest.fixture(scope="session")
def chromium() -> str:
    """The program."""
    pytest.importorskip("playwright", reason="playwright is not installed")
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if program is None:
        pytest.skip("no Chromium is installed (Debian: apt install chromium)")
    return program


@pytest.fixture(scope="module")
def browser(chromium):
    """Chromium without a window, whose camera shows a test picture; it asks nothing of its makers."""
    from playwright.sync_api import sync_playwright

    arguments = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--use-fake-device-for-media-stream",
        "--use-fake-ui-for-media-stream",
    ]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=arguments)
        yield browser
        browser.close()


def clip_parts(folder: Path) -> tuple:
    """A tiny CLIP text model of random weights, as a class and its configuration, with a tokenizer of letters."""
    from transformers import CLIPTextConfig, CLIPTokenizer

    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    tokens = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    (folder / "vocab.json").write_text(json.dumps({token: number for number, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=77)
    config = CLIPTextConfig(
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
    return config, tokenizer


def two_level_vae(**options) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        **options,
    )


@pytest.fixture(scope="session")
def sdxl_inpaint_folder(tmp_path_factory) -> Path:
    """A saved SDXL inpainting pipeline of random weights."""
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLInpaintPipeline, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    folder = tmp_path_factory.mktemp("sdxl")
    torch.manual_seed(0)
    text, tokenizer = clip_parts(folder)
    StableDiffusionXLInpaintPipeline(
        vae=two_level_vae(),
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
    ).save_pretrained(folder / "pipeline")
    return folder / "pipeline"


@pytest.fixture(scope="session")
def flux_fill_folder(tmp_path_factory) -> Path:
    """A saved FLUX-Fill pipeline of random weights."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxFillPipeline, FluxTransformer2DModel
    from tokenizers import Tokenizer
    from tokenizers.models import Unigram
    from transformers import CLIPTextModel, T5Config, T5EncoderModel, T5TokenizerFast

    folder = tmp_path_factory.mktemp("flux")
    torch.manual_seed(0)
    text, tokenizer = clip_parts(folder)
    words = Tokenizer(Unigram([("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁sky", -2.0)], unk_id=2))
    # Latents of 4 channels, packed 2x2, beside those of the masked picture and the mask of 2x2 pixels a latent.
    packed = {"in_channels": 16 + 16 + 4 * 4, "out_channels": 16}
    FluxFillPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=two_level_vae(latent_channels=4, shift_factor=0.1, scaling_factor=0.4),
        text_encoder=CLIPTextModel(text),
        tokenizer=tokenizer,
        text_encoder_2=T5EncoderModel(
            T5Config(vocab_size=4, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0)
        ),
        tokenizer_2=T5TokenizerFast(tokenizer_object=words, model_max_length=16, extra_ids=0),
        transformer=FluxTransformer2DModel(
            **packed,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=16,
            pooled_projection_dim=16,
            guidance_embeds=True,
            axes_dims_rope=(4, 4, 8),
        ),
    ).save_pretrained(folder / "pipeline")
    return folder / "pipeline"
