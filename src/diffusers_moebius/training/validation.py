"""Validation of a training run on held-out photos with fixed holes."""

import argparse
import json
import logging
from itertools import islice

import torch
from diffusers import DDIMScheduler
from diffusers.image_processor import VaeImageProcessor
from PIL import Image, ImageDraw

from ..pipelines.latents import encode_latents
from .crops import Cropper, PictureDataset
from .denoiser import ConditionedDenoiser
from .objective import noise_batch, sample_generators
from .perceptual import LPIPS, distance_map
from .picture_sources import list_pictures

LABEL_HEIGHT = 14  # pixels above each row of a contact sheet


class Validation:
    """
    Held-out photos with a hole each, the same in every validation of a run.

    Args:
        args: `validation_data`, `resolution`, `mask_presets` and `num_validation_images` are read.
        vae: The autoencoder.
    """

    def __init__(self, args: argparse.Namespace, vae):
        records = list_pictures(args.validation_data)
        dataset = PictureDataset(records, Cropper(args.resolution, args.mask_presets, seed=0))
        crops = (crop for index in range(len(dataset)) if (crop := dataset.crop(index, 1)) is not None)
        crops = list(islice(crops, args.num_validation_images))
        if not crops:
            raise ValueError("`validation_data` holds no readable photo.")
        self.args, self.vae = args, vae
        self.photos = torch.stack([crop.pixels for crop in crops]) / 2 + 0.5  # [N, 3, H, W] in [0, 1]
        self.masks = torch.cat([crop.masks for crop in crops])  # [N, 1, H, W]

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
    def fill(self, pipeline, **options) -> torch.Tensor:
        """
        Fills the holes with the pipeline's own steps and guidance, unless options say otherwise.

        It starts from pure noise: what was in the hole must not help. Returns `[N, 3, H, W]` in [0, 1].
        """
        pipeline.set_progress_bar_config(disable=True)
        options = {
            "num_inference_steps": self.args.validation_inference_steps,
            "guidance_scale": self.args.validation_guidance_scale,
            "strength": 1.0,
        } | options
        remarks = logging.getLogger("diffusers_moebius.pictures.mask")
        level = remarks.level
        remarks.setLevel(logging.ERROR)  # random holes may fill most of a photo
        try:
            return pipeline(
                image=self.photos,
                mask_image=self.masks,
                height=self.args.resolution,
                width=self.args.resolution,
                generator=[torch.Generator().manual_seed(number) for number in range(len(self.photos))],
                output_type="pt",
                **options,
            ).images.cpu()
        finally:
            remarks.setLevel(level)

    def run(self, loop, pipeline, scheduler: DDIMScheduler, others: dict[str, torch.Tensor]) -> dict[str, float]:
        """Fills the holes, writes the result below `others` `[N, 3, H, W]`, and returns the scores."""
        with loop.validation() as bare:
            scores = self.loss(bare, scheduler)
            result = self.fill(pipeline)
        scores["validation_hole_psnr"] = self.hole_psnr(result).mean().item()
        self.write(loop, others | {"result": result}, scores)
        return scores

    def hole_psnr(self, results: torch.Tensor, target: torch.Tensor | None = None) -> torch.Tensor:
        """PSNR in the hole of each result `[N, 3, H, W]` in [0, 1] to the photos or another target; `[N]`."""
        error = ((results - (self.photos if target is None else target)).square() * self.masks).sum((1, 2, 3))
        return -10 * (error / (3 * self.masks.sum((1, 2, 3)).clamp(min=1))).clamp(min=1e-10).log10()

    @torch.no_grad()
    def hole_lpips(self, lpips: LPIPS, results: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """LPIPS in the hole of each result `[N, 3, H, W]` in [0, 1] to a target, from features of the whole; `[N]`."""
        device, size = lpips.shift.device, self.photos.shape[2:]
        maps = distance_map(lpips.distances(*((2 * p - 1).to(device) for p in (results, target))), size).cpu()
        return (maps * self.masks[:, 0]).sum((1, 2)) / self.masks.sum((1, 2, 3)).clamp(min=1)

    def sheet(self, rows: dict[str, torch.Tensor], target: torch.Tensor | None = None) -> Image.Image:
        """
        A contact sheet: photos with holes, results, photos; each row with its name, each result with its PSNR.

        Args:
            rows (`dict[str, torch.Tensor]`): Results `[N, 3, H, W]` in [0, 1] by name.
            target (`torch.Tensor`, *optional*): What the PSNR compares with; the photos by default.
        """
        rows = {"input": self.photos * (1 - self.masks), **rows, "photo": self.photos}
        count, _, height, width = self.photos.shape
        sheet = Image.new("RGB", (count * width, len(rows) * (height + LABEL_HEIGHT)), "white")
        draw = ImageDraw.Draw(sheet)
        for row, (name, pictures) in enumerate(rows.items()):
            top = row * (height + LABEL_HEIGHT)
            scores = self.hole_psnr(pictures, target)
            pictures = VaeImageProcessor().postprocess(pictures, "pil", [False] * count)
            for column, picture in enumerate(pictures):
                sheet.paste(picture, (column * width, top + LABEL_HEIGHT))
                number = "" if name in ("input", "photo") else f"{scores[column]:.1f} dB"
                draw.text((column * width + 2, top + 1), f"{name if not column else ''} {number}".strip(), "black")
        return sheet

    def write(self, loop, rows: dict[str, torch.Tensor], scores: dict[str, float], target=None) -> None:
        """Writes and logs the contact sheet and the numbers of the loop's present step."""
        name = f"validation-{loop.step}"
        sheet = self.sheet(rows, target)
        sheet.save(loop.output_dir / f"{name}.png")
        (loop.output_dir / f"{name}.json").write_text(json.dumps(scores, indent=2) + "\n")
        loop.log_images({", ".join(["input", *rows, "photo"]): sheet}, loop.step)
        loop.accelerator.log(scores, step=loop.step)
