"""Validation of a training run on held-out photos with fixed holes."""

import argparse
import json
import logging
from itertools import islice

import torch
from diffusers import DDIMScheduler
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils import make_image_grid
from PIL import Image, ImageDraw, ImageOps

from ..evaluation.lpips import LPIPS, distance_map
from .crops import Cropper
from .denoiser import ConditionedDenoiser
from .latent_cache import with_latents
from .objective import noise_batch, sample_generators
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
        cropper = Cropper(args.resolution, args.mask_presets)
        crops = (cropper(record, (0, index)) for index, record in enumerate(list_pictures(args.validation_data)))
        crops = list(islice(filter(None, crops), args.num_validation_images))
        if not crops:
            raise ValueError("`validation_data` holds no readable photo.")
        self.args, self.vae = args, vae
        self.photos = torch.stack([crop["pixel_values"] for crop in crops]) / 2 + 0.5  # [N, 3, H, W] in [0, 1]
        self.masks = torch.cat([crop["mask"] for crop in crops])  # [N, 1, H, W]

    @torch.no_grad()
    def loss(self, model: ConditionedDenoiser, scheduler: DDIMScheduler) -> dict[str, float]:
        """The objective on the photos, at the same timesteps and noise each time."""
        batch = {"pixel_values": 2 * self.photos - 1, "mask": self.masks}
        batch = {name: tensor.to(self.vae.device) for name, tensor in batch.items()}
        batch = with_latents(batch, self.vae, torch.Generator().manual_seed(0))
        num_embeddings, count = model.lcg_embedder.config.num_embeddings, len(self.photos)
        # Four rounds, since one timestep for each of a few photos says little.
        errors = []
        for number in range(4):
            generators = sample_generators(0, number * count, count)
            noised = noise_batch(self.args, scheduler, batch, generators, num_embeddings)
            prediction = model(noised.model_input, noised.timesteps, noised.category_ids).sample
            errors.append(torch.stack([noised.loss(prediction), noised.hole_error(prediction)]))
        loss, hole_error = torch.stack(errors).mean(0).tolist()
        return {"validation_loss": loss, "validation_hole_error": hole_error}

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
        cells = []
        for name, pictures in rows.items():
            scores = self.hole_psnr(pictures, target)
            for column, picture in enumerate(VaeImageProcessor.numpy_to_pil(VaeImageProcessor.pt_to_numpy(pictures))):
                label = [name] * (column == 0) + [f"{scores[column]:.1f} dB"] * (name not in ("input", "photo"))
                cell = ImageOps.expand(picture, (0, LABEL_HEIGHT, 0, 0), "white")
                ImageDraw.Draw(cell).text((2, 1), " ".join(label), "black")
                cells.append(cell)
        return make_image_grid(cells, len(rows), len(self.photos))

    def write(self, loop, rows: dict[str, torch.Tensor], scores: dict[str, float], target=None) -> None:
        """Writes and logs the contact sheet and the numbers of the loop's present step."""
        name = f"validation-{loop.step}"
        sheet = self.sheet(rows, target)
        sheet.save(loop.output_dir / f"{name}.png")
        (loop.output_dir / f"{name}.json").write_text(json.dumps(scores, indent=2) + "\n")
        loop.log_image(", ".join(["input", *rows, "photo"]), sheet)
        loop.accelerator.log(scores, step=loop.step)
