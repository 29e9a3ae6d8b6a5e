"""U-Net and LCG embedder as the one module that is trained."""

import argparse

import torch
from accelerate import Accelerator
from diffusers import DDIMScheduler
from torch import nn

from ..models.latent_categories import LatentCategoriesEmbedder
from ..pipelines.latents import decode_latents
from ..pipelines.pipeline_moebius_inpaint import MoebiusInpaintPipeline
from .adapters import add_adapter
from .objective import clean_of


class ConditionedDenoiser(nn.Module):
    """
    U-Net and LCG embedder as one module, so that both are wrapped, averaged and saved together.

    Args:
        unet ([`MoebiusUNet2DModel`] or [`PixelHackerUNet2DModel`]): The denoiser.
        lcg_embedder ([`LatentCategoriesEmbedder`]): Embeds the categories.
    """

    def __init__(self, unet: nn.Module, lcg_embedder: LatentCategoriesEmbedder):
        super().__init__()
        self.unet, self.lcg_embedder = unet, lcg_embedder

    def forward(self, sample: torch.Tensor, timesteps: torch.Tensor, category_ids: torch.Tensor, **kwargs):
        """Returns the U-Net's output for category ids `[B, tokens]`; `kwargs` are its own."""
        return self.unet(sample, timesteps, self.lcg_embedder(category_ids).embeds, **kwargs)


class DecodingDenoiser(ConditionedDenoiser):
    """
    A [`ConditionedDenoiser`] that decodes what it predicts, so that a loss can compare pictures.

    Args:
        denoiser ([`ConditionedDenoiser`]): U-Net and embedder.
        vae (`AutoencoderKL` or `AutoencoderTiny`): Its decoder.
        noise_schedule (`DDIMScheduler`): The noise schedule.
    """

    def __init__(self, denoiser: ConditionedDenoiser, vae: nn.Module, noise_schedule: DDIMScheduler):
        super().__init__(denoiser.unet, denoiser.lcg_embedder)
        self.vae, self.noise_schedule = vae, noise_schedule

    def forward(self, sample: torch.Tensor, timesteps: torch.Tensor, category_ids: torch.Tensor, **kwargs):
        """Returns the U-Net's output with `pictures` `[B, 3, H, W]`, the decoded clean latents that it implies."""
        output = super().forward(sample, timesteps, category_ids, **kwargs)
        noisy = sample[:, : output.sample.shape[1]]
        output["pictures"] = decode_latents(self.vae, clean_of(output.sample, noisy, timesteps, self.noise_schedule))
        return output


def prepare_denoiser(
    args: argparse.Namespace, pipeline: MoebiusInpaintPipeline, accelerator: Accelerator
) -> ConditionedDenoiser:
    """The pipeline's U-Net and embedder as one module, with adapter, memory savers and layouts as asked for."""
    if getattr(args, "rank", None) is not None:
        add_adapter(args, pipeline.unet, accelerator)
    if args.gradient_checkpointing:
        pipeline.unet.enable_gradient_checkpointing()
    for module in pipeline.unet.modules():  # a quarter faster on a processor, and what tensor cores like
        if isinstance(module, nn.Conv2d):
            module.to(memory_format=torch.channels_last)
    if args.torch_compile:
        pipeline.unet.compile()  # in place: the names of the weights stay
    pipeline.vae.eval().requires_grad_(False)
    return ConditionedDenoiser(pipeline.unet, pipeline.lcg_embedder)
