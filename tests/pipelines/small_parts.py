"""Small pipelines and pictures for the tests of the pipeline."""

import numpy as np
import torch
from diffusers import AutoencoderTiny
from PIL import Image

from diffusers_moebius.models.unet_2d_moebius import MoebiusUNet2DModel, MoebiusUNet2DOutput
from diffusers_moebius.pipelines.pipeline_moebius_inpaint import MoebiusInpaintPipeline

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def photo(height=64, width=64, mode="RGB", seed=0):
    random = np.random.default_rng(seed)
    if mode == "I;16":
        return Image.fromarray(random.integers(0, 65536, (height, width)).astype(np.uint16))
    image = Image.fromarray(random.integers(0, 256, (height, width, 3)).astype(np.uint8))
    if mode in ("LA", "RGBA"):
        image = image.convert(mode)
        image.putalpha(Image.fromarray(random.integers(0, 256, (height, width)).astype(np.uint8)))
        return image
    return image.convert(mode)


def hole(height=64, width=64, box=None):
    mask = np.zeros((height, width), bool)
    left, top, right, bottom = box or (width // 4, height // 4, 3 * width // 4, 3 * height // 4)
    mask[top:bottom, left:right] = True
    return mask


def seeded(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def make_pipeline(*components, **options):
    pipeline = MoebiusInpaintPipeline(*components, **options)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def make_small_vae():
    """An AutoencoderTiny with random weights, 8 px a latent, scaling factor 1, no random draws."""
    torch.manual_seed(0)
    widths, blocks = (8, 8, 8, 8), (1, 1, 1, 1)
    return AutoencoderTiny(
        encoder_block_out_channels=widths,
        decoder_block_out_channels=widths,
        num_encoder_blocks=blocks,
        num_decoder_blocks=blocks,
    ).eval()


class OracleUNet(MoebiusUNet2DModel):
    """Knows the clean latents and predicts exactly what the scheduler asks for; keeps what it sees."""

    clean = None
    scheduler = None

    def forward(self, sample, timestep, encoder_hidden_states, attention_kwargs=None, return_dict=True):
        noisy = sample[:, :4]
        alphas = self.scheduler.alphas_cumprod.double()
        alpha = float(np.interp(float(timestep), np.arange(len(alphas)), alphas))
        noise = (noisy - alpha**0.5 * self.clean) / (1 - alpha) ** 0.5
        self.found.append((noisy, noise))
        if self.scheduler.config.prediction_type == "v_prediction":
            noise = alpha**0.5 * noise - (1 - alpha) ** 0.5 * self.clean
        return (noise,) if not return_dict else MoebiusUNet2DOutput(sample=noise)
