"""Validation of a training run on held-out photos with fixed holes."""

import argparse

import torch
from diffusers import DDIMScheduler
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils import make_image_grid
from PIL import Image

from .components import ConditionedDenoiser
from .latents import encode_latents
from .objective import noise_batch, sample_generators
from .picture_datasets import PictureDataset
from .picture_sources import PictureReader


class Validation:
    """
    Held-out photos with a hole each, the same in every validation of a run.

    Args:
        args: `validation_data`, `resolution`, `mask_presets` and `num_validation_images` are read.
        vae: The autoencoder.
    """

    def __init__(self, args: argparse.Namespace, vae):
        dataset = PictureDataset(PictureReader(args.validation_data), args.resolution, args.mask_presets, seed=0)
        pairs = []
        for index in range(len(dataset)):
            if len(pairs) < args.num_validation_images and (pair := dataset.crop(index, 1)) is not None:
                pairs.append(pair)
        if not pairs:
            raise ValueError("`validation_data` holds no readable photo.")
        self.args, self.vae = args, vae
        self.photos = torch.stack([pixels for pixels, _ in pairs]) / 2 + 0.5  # [N, 3, H, W] in [0, 1]
        self.masks = torch.cat([mask for _, mask in pairs])  # [N, 1, H, W]

    @torch.no_grad()
    def loss(self, model: ConditionedDenoiser, scheduler: DDIMScheduler) -> dict[str, float]:
        """The objective on the photos, at the same timesteps and noise each time."""
        pixels, masks = (2 * self.photos - 1).to(self.vae.device), self.masks.to(self.vae.device)
        generator = torch.Generator().manual_seed(0)
        batch = {
            "latents": encode_latents(self.vae, pixels, generator),
            "masked_latents": encode_latents(self.vae, pixels * (1 - masks), generator),
            "mask": masks,
        }
        num_embeddings = model.lcg_embedder.config.num_embeddings
        # Four rounds, since one timestep for each of a few photos says little.
        losses, hole_errors = [], []
        for number in range(4):
            generators = sample_generators(0, number * len(pixels), len(pixels))
            noised = noise_batch(self.args, scheduler, batch, generators, num_embeddings)
            prediction = model(noised.model_input, noised.timesteps, noised.category_ids).sample
            losses.append(noised.loss(prediction))
            hole_errors.append(noised.hole_error(prediction))
        return {
            "validation_loss": torch.stack(losses).mean().item(),
            "validation_hole_error": torch.stack(hole_errors).mean().item(),
        }

    @torch.no_grad()
    def fill(self, pipeline) -> tuple[torch.Tensor, float]:
        """Fills the holes; returns the pictures `[N, 3, H, W]` in [0, 1] and the mean PSNR inside the holes."""
        pipeline.set_progress_bar_config(disable=True)
        results = pipeline(
            image=self.photos,
            mask_image=self.masks,
            height=self.args.resolution,
            width=self.args.resolution,
            strength=1.0,
            num_inference_steps=self.args.validation_inference_steps,
            guidance_scale=self.args.validation_guidance_scale,
            generator=[torch.Generator().manual_seed(number) for number in range(len(self.photos))],
            output_type="pt",
        ).images.cpu()
        squared_error = ((results - self.photos).square() * self.masks).sum((1, 2, 3))
        squared_error = squared_error / (3 * self.masks.sum((1, 2, 3)).clamp(min=1))
        return results, (-10 * squared_error.clamp(min=1e-10).log10()).mean().item()

    def grid(self, *results: torch.Tensor) -> Image.Image:
        """Rows of photos with holes, masks, the results of one or more pipelines, and photos."""
        rows = [self.photos * (1 - self.masks), self.masks.expand_as(self.photos), *results, self.photos]
        pictures = torch.cat(rows)
        pictures = VaeImageProcessor().postprocess(pictures, "pil", [False] * len(pictures))
        return make_image_grid(pictures, len(rows), len(self.photos))
