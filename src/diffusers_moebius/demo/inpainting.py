"""One run of the demo: the pipeline in a thread of its own, with previews on the way and a flag that stops it."""

import contextlib
import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny, DDIMScheduler
from PIL import Image

from .. import MoebiusInpaintPipeline
from ..pictures.picture import load_pictures
from ..pictures.region import find_region
from ..pipelines.latents import decode_pictures
from .models import ModelShelf
from .photos import VisitorError, scale_mask

try:  # On ZeroGPU Spaces a GPU is lent to the functions that are marked.
    from spaces import GPU
except ImportError:  # also of the folder of that name in a checkout of this project
    GPU = None

# About so many previews a run; each costs a small part of a step.
PREVIEWS = 6


@dataclass(frozen=True)
class Settings:
    """
    What, with photo and mask, makes the same picture again.

    Args:
        steps (`int`): Denoising steps.
        guidance (`float`, *optional*): Guidance scale; `None` is the model's own.
        seed (`int`): Seed.
        context (`int`): Pixels around the mask that the model sees.
        color_compensation (`bool`): Match the filling's colours to those around it.
        detail (`str`): Texture from the photo: `"auto"`, `"patches"`, `"enlarged"` or `"none"`.
    """

    steps: int
    guidance: float | None
    seed: int
    context: int
    color_compensation: bool
    detail: str = "auto"


@dataclass(frozen=True)
class Step:
    """
    A step that is done.

    Args:
        number (`int`): Its number, from 1.
        total (`int`): Steps of the run.
        preview (`PIL.Image.Image`, *optional*): The photo as it is about to be, in the size of the view.
    """

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


def _gpu_seconds(source, image, mask, view, settings, stop_flag) -> int:
    return 20 + settings.steps


def _on_gpu(function):
    return function if GPU is None else GPU(duration=_gpu_seconds)(function)


@_on_gpu
def generate(
    source: tuple[str, str | None],
    image: Image.Image,
    mask: np.ndarray,
    view: Image.Image,
    settings: Settings,
    stop_flag: str,
) -> Iterator[Step | Image.Image]:
    """
    Fills the mask.

    Args:
        source (`tuple[str, str | None]`): The model on the shelf.
        image (`PIL.Image.Image`): The photo.
        mask (`np.ndarray` of shape `[H, W]`): Boolean, `True` is filled.
        view (`PIL.Image.Image`): The photo in the size in which previews are shown.
        settings (`Settings`): The settings.
        stop_flag (`str`): The run stops at the next step once this file exists. A file, since on ZeroGPU the run is in
            another process than the button.

    Yields:
        [`Step`] after each step, and in the end the filled photo; nothing more when stopped.
    """
    # Shares the components, but has settings of its own.
    pipeline = MoebiusInpaintPipeline.from_pipe(_shelf.get(source))
    pipeline.set_progress_bar_config(disable=True)
    messages: queue.Queue = queue.Queue()
    abandoned = threading.Event()
    preview = Preview(pipeline, image, mask, view, settings)

    def on_step_end(pipeline, index, timestep, tensors):
        if abandoned.is_set() or Path(stop_flag).exists():
            raise _Stopped
        total = pipeline.num_timesteps
        shown = (index + 1) % max(1, total // PREVIEWS) == 0 and index + 1 < total
        picture = preview(timestep, show=shown, **tensors)
        messages.put(Step(index + 1, total, picture))
        return {}

    def work():
        try:
            generator = torch.Generator().manual_seed(settings.seed)
            result = pipeline(
                image=image,
                mask_image=mask,
                num_inference_steps=settings.steps,
                guidance_scale=settings.guidance,
                padding_mask_crop=settings.context,
                color_compensation=settings.color_compensation,
                detail=None if settings.detail == "none" else settings.detail,
                generator=generator,
                callback_on_step_end=on_step_end,
                callback_on_step_end_tensor_inputs=["latents", "masked_image_latents"],
            ).images[0]
            messages.put(result)
        except _Stopped:
            messages.put(None)
        except Exception as error:
            messages.put(error)

    threading.Thread(target=work, daemon=True).start()
    try:
        while True:
            message = messages.get()
            if message is None:
                return
            if isinstance(message, torch.OutOfMemoryError):
                raise VisitorError("The server has no memory left for this picture. Please try a smaller mask.")
            if isinstance(message, ValueError):  # whose messages are written for users and name arguments
                raise VisitorError(str(message)) from message
            if isinstance(message, Exception):
                raise message
            yield message
            if isinstance(message, Image.Image):
                return
    finally:
        abandoned.set()


class Preview:
    """
    The picture that the latents of a step are about to become.

    An [`AutoencoderTiny`] decodes them. For an [`AutoencoderKL`], whose decoder takes longer than a step, a linear map
    from latents to colours is fitted to the photo around the hole, of which both are known.

    Args:
        pipeline (`MoebiusInpaintPipeline`): The pipeline that runs.
        image (`PIL.Image.Image`): The photo.
        mask (`np.ndarray` of shape `[H, W]`): Boolean.
        view (`PIL.Image.Image`): The photo in the size in which it is shown.
        settings (`Settings`): The settings.
    """

    def __init__(
        self,
        pipeline: MoebiusInpaintPipeline,
        image: Image.Image,
        mask: np.ndarray,
        view: Image.Image,
        settings: Settings,
    ):
        self.pipeline, self.view, self.steps = pipeline, view, settings.steps
        picture = load_pictures(image)[0]
        try:
            region = find_region(picture, mask, pipeline.sizes, settings.context)
        except ValueError as error:
            raise VisitorError(str(error)) from error
        scale_x, scale_y = view.width / image.width, view.height / image.height
        left, top, right, bottom = (round(v * s) for v, s in zip(region.box, (scale_x, scale_y) * 2))
        self.content_size = region.content_size
        self.box = (left, top, max(right, left + 1), max(bottom, top + 1))
        self.mask = Image.fromarray(scale_mask(mask, view.size).astype(np.uint8) * 255)
        self.previous: torch.Tensor | None = None
        self.known: tuple[torch.Tensor, torch.Tensor] | None = None
        self.color_map: torch.Tensor | None = None
        if not isinstance(pipeline.vae, AutoencoderTiny):
            pixels, hole = region.tensors()
            factor = pipeline.vae_scale_factor
            self.known = F.avg_pool2d(pixels, factor)[0], F.max_pool2d(hole, factor)[0, 0] == 0

    def __call__(
        self, timestep: torch.Tensor, latents: torch.Tensor, masked_image_latents: torch.Tensor, show: bool
    ) -> Image.Image | None:
        """
        Notes the latents of a step, and shows them if asked to.

        Args:
            timestep (`torch.Tensor`): Timestep of the step that is done.
            latents (`torch.Tensor` of shape `[1, 4, h, w]`): Latents after it.
            masked_image_latents (`torch.Tensor` of shape `[1, 4, h, w]`): Latents of the photo without the hole.
            show (`bool`): Whether a picture is wanted.
        """
        previous, self.previous = self.previous, latents
        if not show:
            return None
        if previous is not None and type(self.pipeline.scheduler) is DDIMScheduler:
            latents = clean_latents(self.pipeline.scheduler, self.steps, int(timestep), previous, latents)
        colors = self._colors(latents, masked_image_latents)
        height, width = self.content_size
        scale = self.pipeline.vae_scale_factor if colors.shape[-1] == latents.shape[-1] else 1
        colors = colors[:, : max(1, height // scale), : max(1, width // scale)]
        array = (colors.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
        left, top, right, bottom = self.box
        fill = Image.fromarray(array).resize((right - left, bottom - top), Image.Resampling.BICUBIC)
        picture = self.view.convert("RGB")
        picture.paste(fill, (left, top), self.mask.crop(self.box))
        if self.view.mode == "RGBA":
            picture.putalpha(self.view.getchannel("A"))
        return picture

    def _colors(self, latents: torch.Tensor, masked_image_latents: torch.Tensor) -> torch.Tensor:
        if self.known is None:
            with contextlib.suppress(ValueError):  # Latents on the way may decode to infinite values.
                return decode_pictures(self.pipeline.vae, latents)[0]
            return torch.full((3, *latents.shape[2:]), 0.5)
        if self.color_map is None:
            pixels, is_known = self.known
            if is_known.sum() < 16:
                is_known = torch.ones_like(is_known)
            inputs = _with_one(masked_image_latents[0].cpu())[:, is_known].T
            self.color_map = torch.linalg.lstsq(inputs, pixels[:, is_known].T).solution  # [5, 3]
        flat = torch.einsum("chw,cd->dhw", _with_one(latents[0].cpu()), self.color_map)
        return flat / 2 + 0.5


def _with_one(latents: torch.Tensor) -> torch.Tensor:
    return torch.cat([latents.float(), torch.ones_like(latents[:1], dtype=torch.float32)])


def clean_latents(
    scheduler: DDIMScheduler, steps: int, timestep: int, before: torch.Tensor, after: torch.Tensor
) -> torch.Tensor:
    """
    The clean latents that a DDIM step without fresh noise aimed at.

    Such a step moves along `sqrt(a) x0 + sqrt(1 - a) eps` with `x0` and `eps` held fixed (arXiv 2010.02502,
    Eq. 12), so its two ends give both.

    Args:
        scheduler ([`DDIMScheduler`]): The scheduler.
        steps (`int`): Steps of the whole schedule.
        timestep (`int`): Timestep of the step.
        before (`torch.Tensor`): Latents before it.
        after (`torch.Tensor`): Latents after it.
    """
    next_timestep = timestep - scheduler.config.num_train_timesteps // steps
    alphas = scheduler.alphas_cumprod
    a = float(alphas[timestep])
    b = float(alphas[next_timestep]) if next_timestep >= 0 else float(scheduler.final_alpha_cumprod)
    noise_a, noise_b = (1 - a) ** 0.5, (1 - b) ** 0.5
    return (noise_b * before - noise_a * after) / (a**0.5 * noise_b - b**0.5 * noise_a)
