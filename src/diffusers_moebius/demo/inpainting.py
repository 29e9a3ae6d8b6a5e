"""One run of the demo: the pipeline in a thread of its own, with previews on the way and a flag that stops it."""

import queue
import shlex
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler
from PIL import Image

from .. import MoebiusInpaintPipeline
from ..pictures.mask import fit_mask
from ..pictures.picture import load_pictures
from ..pictures.region import find_region
from .models import ModelShelf
from .photos import Photo, VisitorError

try:  # On ZeroGPU Spaces a GPU is lent to the functions that are marked.
    from spaces import GPU
except ImportError:  # also of the folder of that name in a checkout of this project

    def GPU(duration):
        return lambda function: function


# About so many previews a run; each costs a small part of a step.
PREVIEWS = 6


@dataclass(frozen=True)
class Settings:
    """
    What, with photo and mask, makes the same picture again.

    Args:
        model (`tuple[str, str | None]`): The model's place and its checkpoint folder, as on the shelf.
        steps (`int`): Denoising steps.
        guidance (`float`, *optional*): Guidance scale; `None` is the model's own.
        seed (`int`): Seed.
        edge_margin (`int`, *optional*): Pixels by which the mask has grown; `None` is by [`grow_over_rims`].
        context (`int`): Pixels around the mask that the model sees.
        color_compensation (`bool`): Match the filling's colours to those around it.
        detail (`str`): Texture from the photo: `"auto"`, `"patches"`, `"enlarged"` or `"none"`.
    """

    model: tuple[str, str | None]
    steps: int
    guidance: float | None
    seed: int
    edge_margin: int | None
    context: int
    color_compensation: bool
    detail: str = "auto"

    def command(self, name: str) -> str:
        """The command line that does the same to `PHOTO` and the mask of that name; `FOLDER` is of the server."""
        place, checkpoint = self.model
        options = {
            "--model": "FOLDER" if Path(place).is_dir() else place,
            "--checkpoint": checkpoint,
            "--steps": self.steps,
            "--guidance": self.guidance,
            "--seed": self.seed,
            "--crop-margin": self.context,
            "--mask-dilation": self.edge_margin,
            "--detail": self.detail,
        }
        words = ["moebius", "inpaint", "PHOTO", f"{name}-mask.png", "-o", f"{name}-moebius.png"]
        words += [word for option in options.items() if option[1] is not None for word in map(str, option)]
        return shlex.join([*words, *["--color-compensation"] * self.color_compensation])


@dataclass(frozen=True)
class Step:
    """A step that is done, counted from 1, perhaps with the view of the photo as it is about to be."""

    number: int
    total: int
    preview: Image.Image | None


class _Stopped(Exception):
    """Ends the pipeline's loop; it is the thread's own, so that no other visitor's run notices."""


_shelf: ModelShelf | None = None


def set_shelf(shelf: ModelShelf) -> None:
    """Says where [`generate`] takes its models from; on ZeroGPU it runs in a process that inherits them."""
    global _shelf
    _shelf = shelf


@GPU(duration=lambda photo, mask, settings, stop_flag: 20 + settings.steps)
def generate(photo: Photo, mask: np.ndarray, settings: Settings, stop_flag: str) -> Iterator[Step | Image.Image]:
    """
    Fills the mask.

    Args:
        photo (`Photo`): The photo.
        mask (`np.ndarray` of shape `[H, W]`): Boolean, `True` is filled.
        settings (`Settings`): The settings, by whose edge margin the mask has grown already.
        stop_flag (`str`): The run stops at the next step once this file exists. A file, since on ZeroGPU the run is in
            another process than the button.

    Yields:
        [`Step`] after each step, and in the end the filled photo; nothing more when stopped.
    """
    # Shares the components, but has settings of its own.
    pipeline = MoebiusInpaintPipeline.from_pipe(_shelf.get(settings.model))
    pipeline.set_progress_bar_config(disable=True)
    messages: queue.Queue = queue.Queue()
    abandoned = threading.Event()

    def work():
        try:
            preview = Preview(pipeline, photo, mask, settings)

            def on_step_end(pipeline, index, timestep, tensors):
                if abandoned.is_set() or Path(stop_flag).exists():
                    raise _Stopped
                total = pipeline.num_timesteps
                shown = (index + 1) % max(1, total // PREVIEWS) == 0 and index + 1 < total
                messages.put(Step(index + 1, total, preview(timestep, show=shown, **tensors)))
                return {}

            result = pipeline(
                image=photo.image,
                mask_image=mask,
                num_inference_steps=settings.steps,
                guidance_scale=settings.guidance,
                padding_mask_crop=settings.context,
                color_compensation=settings.color_compensation,
                detail=None if settings.detail == "none" else settings.detail,
                generator=torch.Generator().manual_seed(settings.seed),
                callback_on_step_end=on_step_end,
                callback_on_step_end_tensor_inputs=["latents", "masked_image_latents"],
            )
            messages.put(result.images[0])
        except _Stopped:
            pass
        except torch.OutOfMemoryError:
            messages.put(VisitorError("The server has no memory left for this picture. Please try a smaller mask."))
        except ValueError as error:  # whose messages are written for users and name arguments
            messages.put(VisitorError(str(error)))
        except Exception as error:
            messages.put(error)
        finally:
            messages.put(None)

    threading.Thread(target=work, daemon=True).start()
    try:
        for message in iter(messages.get, None):
            if isinstance(message, Exception):
                raise message
            yield message
    finally:
        abandoned.set()


class Preview:
    """
    The picture that the latents of a step are about to become.

    Decoding takes longer than a step: a linear map from latents to colours is fitted to the photo around the hole, of
    which both are known.
    """

    def __init__(self, pipeline: MoebiusInpaintPipeline, photo: Photo, mask: np.ndarray, settings: Settings):
        self.scheduler, self.steps, self.view = pipeline.scheduler, settings.steps, photo.view
        region = find_region(load_pictures(photo.image)[0], mask, pipeline.sizes, settings.context)
        scale = self.view.width / photo.image.width
        left, top, right, bottom = (round(value * scale) for value in region.box)
        self.box = (left, top, max(right, left + 1), max(bottom, top + 1))
        self.mask = Image.fromarray(fit_mask(mask, self.view.height, self.view.width, stretch=True))
        factor = pipeline.vae_scale_factor
        self.size = tuple(max(1, length // factor) for length in region.content_size)
        pixels, hole = region.tensors()
        self.colors, known = F.avg_pool2d(pixels, factor)[0], F.max_pool2d(hole, factor)[0, 0] == 0
        self.known = known if known.sum() >= 16 else torch.ones_like(known)
        self.color_map: torch.Tensor | None = None  # [5, 3]
        self.latents: torch.Tensor | None = None

    def __call__(
        self, timestep: torch.Tensor, latents: torch.Tensor, masked_image_latents: torch.Tensor, show: bool
    ) -> Image.Image | None:
        """Notes the latents `[1, 4, h, w]` that a step has left, and shows them if asked to."""
        before, self.latents = self.latents, latents
        if not show:
            return None
        if before is not None and type(self.scheduler) is DDIMScheduler:
            latents = clean_latents(self.scheduler, self.steps, int(timestep), before, latents)
        if self.color_map is None:
            known_latents = _with_one(masked_image_latents)[:, self.known]
            self.color_map = torch.linalg.lstsq(known_latents.T, self.colors[:, self.known].T).solution
        height, width = self.size
        colors = torch.einsum("chw,cd->hwd", _with_one(latents), self.color_map)[:height, :width]
        colors = ((colors / 2 + 0.5).clamp(0, 1) * 255).round().byte().numpy()
        left, top, right, bottom = self.box
        fill = Image.fromarray(colors).resize((right - left, bottom - top), Image.Resampling.BICUBIC)
        picture = self.view.convert("RGB")
        picture.paste(fill, (left, top), self.mask.crop(self.box))
        if self.view.mode == "RGBA":
            picture.putalpha(self.view.getchannel("A"))
        return picture


def _with_one(latents: torch.Tensor) -> torch.Tensor:
    latents = latents[0].float().cpu()
    return torch.cat([latents, torch.ones_like(latents[:1])])  # [5, h, w]


def clean_latents(
    scheduler: DDIMScheduler, steps: int, timestep: int, before: torch.Tensor, after: torch.Tensor
) -> torch.Tensor:
    """
    The clean latents that a DDIM step without fresh noise aimed at.

    Such a step moves along `sqrt(a) x0 + sqrt(1 - a) eps` with `x0` and `eps` held fixed (arXiv 2010.02502,
    Eq. 12), so its two ends give both.
    """
    next_timestep = timestep - scheduler.config.num_train_timesteps // steps
    alphas = scheduler.alphas_cumprod
    a = float(alphas[timestep])
    b = float(alphas[next_timestep]) if next_timestep >= 0 else float(scheduler.final_alpha_cumprod)
    noise_a, noise_b = (1 - a) ** 0.5, (1 - b) ** 0.5
    return (noise_b * before - noise_a * after) / (a**0.5 * noise_b - b**0.5 * noise_a)
