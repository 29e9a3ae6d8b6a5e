"""A pipeline of random weights."""

import torch
from diffusers import DDIMScheduler
from tiny_unet import TINY

from diffusers_moebius import LatentCategoriesEmbedder, MoebiusInpaintPipeline, MoebiusUNet2DModel


def make_pipeline(vae, **unet_settings):
    """A pipeline of random weights, native size 128 px, with BatchNorm statistics that do something."""
    torch.manual_seed(0)
    unet = MoebiusUNet2DModel(**TINY | {"local_window_size": 5} | unet_settings).eval()
    for module in unet.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 1.5)
    pipeline = MoebiusInpaintPipeline(
        vae=vae,
        unet=unet,
        lcg_embedder=LatentCategoriesEmbedder(num_embeddings=20, embedding_dim=24),
        scheduler=DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
