"""The inpainting pipeline of Moebius."""

import copy
import inspect
import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from numbers import Integral

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import PipelineImageInput
from diffusers.models import AutoencoderKL, AutoencoderTiny
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from diffusers.schedulers import KarrasDiffusionSchedulers, UniPCMultistepScheduler
from diffusers.utils import logging, replace_example_docstring
from diffusers.utils.torch_utils import randn_tensor

from ..loaders.lora import MoebiusLoraLoaderMixin
from ..loaders.pipeline_loader import MoebiusLoaderMixin
from ..models.latent_categories import LatentCategoriesEmbedder
from ..models.unet_2d_moebius import MoebiusUNet2DModel
from ..models.unet_2d_pixelhacker import PixelHackerUNet2DModel
from ..pictures.mask import dilate_mask, load_masks
from ..pictures.paste import PASTE_MODES, paste_fill
from ..pictures.picture import OUTPUT_TYPES, Picture, load_pictures
from ..pictures.region import (
    MASKED_CONTENT,
    MAX_ASPECT_RATIO,
    crop_region,
    fill_hole,
    pad_to_multiple,
    resize,
    resize_mask,
    working_size,
)

logger = logging.get_logger(__name__)

# Pipelines made by `from_pipe` share their VAE, so the lock that guards its precision belongs to no pipeline.
_VAE_PRECISION_LOCK = threading.Lock()

# Share of few steps, the first ones, that go without guidance; see `MoebiusInpaintPipeline.use_few_steps`.
UNGUIDED_SHARE = 0.4

EXAMPLE_DOC_STRING = """
    Examples:
        ```py
        >>> import torch
        >>> from diffusers.utils import load_image
        >>> from diffusers_moebius import MoebiusInpaintPipeline

        >>> pipe = MoebiusInpaintPipeline.from_pretrained("hustvl/Moebius", dtype=torch.float16)
        >>> pipe = pipe.to("cuda")
        >>> image, mask = load_image("photo.jpg"), load_image("mask.png")
        >>> result = pipe(image=image, mask_image=mask).images[0]
        ```
"""


class MoebiusInpaintPipeline(MoebiusLoraLoaderMixin, MoebiusLoaderMixin, DiffusionPipeline):
    r"""
    Fills the marked part of photos with Moebius (arXiv 2606.19195), guided by latent categories instead of text.

    This model inherits from [`DiffusionPipeline`]. Check the superclass documentation for the generic methods (saving,
    running on a particular device, offloading, etc.), and [`MoebiusLoraLoaderMixin`] for LoRA adapters.

    A call changes none of its components: it steps a copy of the scheduler, so several threads may call one pipeline
    at the same time. They share what the pipeline itself holds, the progress bar's settings and `interrupt`; a thread
    that is to be stopped alone takes a pipeline of its own by [`~DiffusionPipeline.from_pipe`].

    Args:
        vae ([`AutoencoderKL`] or [`AutoencoderTiny`]):
            Variational autoencoder that takes pictures to latents and back.
        unet ([`MoebiusUNet2DModel`] or [`PixelHackerUNet2DModel`]):
            Denoiser of the latents; its input is noisy latents, mask and masked-image latents.
        lcg_embedder ([`LatentCategoriesEmbedder`]):
            Embeds the background and foreground categories (latent categories guidance).
        scheduler ([`SchedulerMixin`]):
            DDIM, DPM-Solver++, UniPC, Euler, Euler-ancestral, LCM or another scheduler with `add_noise` and
            `scale_model_input`. Prediction type, timestep spacing and zero terminal SNR are its own settings.
        default_guidance_scale (`float`, defaults to 2.5):
            Guidance scale of a call that names none: 2.5 for natural scenes, 2.0 for portraits.
        default_num_inference_steps (`int`, defaults to 20):
            Steps of a call that names none; a checkpoint trained for few steps has fewer.
        default_strength (`float`, defaults to 0.99):
            Strength of a call that names none.
        default_paste (`str`, defaults to `"exact"`):
            How a call that does not say so pastes its results; `"seamless"` for the bundled model.
        default_guidance_start (`float`, defaults to 0.0):
            Fraction of the steps after which guidance begins in a call that names no interval.
    """

    model_cpu_offload_seq = "lcg_embedder->unet->vae"
    _callback_tensor_inputs = ["latents", "category_embeds", "mask", "masked_image_latents"]

    def __init__(
        self,
        vae: AutoencoderKL | AutoencoderTiny,
        unet: MoebiusUNet2DModel | PixelHackerUNet2DModel,
        lcg_embedder: LatentCategoriesEmbedder,
        scheduler: KarrasDiffusionSchedulers,
        default_guidance_scale: float = 2.5,
        default_num_inference_steps: int = 20,
        default_strength: float = 0.99,
        default_paste: str | None = "exact",
        default_guidance_start: float = 0.0,
    ):
        super().__init__()
        self.register_modules(vae=vae, unet=unet, lcg_embedder=lcg_embedder, scheduler=scheduler)
        self.register_to_config(
            default_guidance_scale=default_guidance_scale,
            default_num_inference_steps=default_num_inference_steps,
            default_strength=default_strength,
            default_paste=default_paste,
            default_guidance_start=default_guidance_start,
        )
        self.vae_scale_factor = 2 ** (len(self.vae.config.block_out_channels) - 1) if getattr(self, "vae", None) else 8
        has_unet = getattr(self, "unet", None) is not None
        levels = len(self.unet.config.block_out_channels) if has_unet else 3
        # Side in pixels of the pictures that the model was trained on, and what a working size must be divisible by.
        self.native_size = (self.unet.config.sample_size if has_unet else 64) * self.vae_scale_factor
        self.size_multiple = self.vae_scale_factor * 2 ** (levels - 1)

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs) -> "MoebiusInpaintPipeline":
        """
        A pipeline that shares the components and settings of another.

        Args:
            pipeline ([`DiffusionPipeline`]): The other pipeline.
            kwargs: Components and settings that are to replace those of the other, and `dtype` (or `torch_dtype`). If
                none is given, components keep their types (diffusers' own would cast what the other pipeline uses).
        """
        dtype, torch_dtype = kwargs.pop("dtype", None), kwargs.pop("torch_dtype", None)
        modules, options = cls._get_signature_keys(cls)
        shared = {name: component for name, component in pipeline.components.items() if name in modules}
        settings = {name: value for name, value in pipeline.config.items() if name in options}
        missing = sorted(modules - (shared | kwargs).keys())
        if missing:
            raise ValueError(f"`pipeline` has no {', '.join(missing)}: pass what is missing as an argument.")
        new_pipeline = cls(**{**shared, **settings, **kwargs})
        if pipeline.name_or_path is not None:
            new_pipeline.register_to_config(_name_or_path=pipeline.name_or_path)
        if dtype is not None or torch_dtype is not None:
            new_pipeline.to(dtype=dtype or torch_dtype)
        return new_pipeline

    @property
    def guidance_scale(self) -> float:
        return self._guidance_scale

    @property
    def num_timesteps(self) -> int:
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        return self._interrupt

    def prepare_for_inference(
        self, dtype: torch.dtype | None = None, compile: bool | str = False
    ) -> "MoebiusInpaintPipeline":
        """
        Does what makes the pipeline faster but takes away that it can be trained or saved; to undo it, load it again.

        Folds the BatchNorm layers of [`MoebiusUNet2DModel`] and moves its upsampling to the small grid
        ([`~MoebiusUNet2DModel.fuse_for_inference`]); the results stay the same but for rounding.

        Args:
            dtype (`torch.dtype`, *optional*): Casts the U-Net, for example to bfloat16 on a CPU that computes in it.
            compile (`bool` or `str`, defaults to `False`): Compiles the U-Net with `torch.compile`; a string is the
                mode, for example `"max-autotune"`. The first call of each working size then takes minutes.

        Returns:
            [`MoebiusInpaintPipeline`]: The same object.

        Raises:
            ValueError: If LoRA adapters are active and not fused.
        """
        if hasattr(self.unet, "fuse_for_inference"):
            self.unet.fuse_for_inference()
        self.keep_fused_adapters()
        if dtype is not None:
            self.unet.to(dtype)
        if compile:
            self.unet.compile(fullgraph=True, mode=compile if isinstance(compile, str) else None)
        return self

    def use_few_steps(self, num_inference_steps: int = 5) -> "MoebiusInpaintPipeline":
        """
        Makes calls that name no steps take few of them: UniPC from pure noise in evenly spaced steps.

        Guidance, which doubles the cost of a step, begins after two steps of five: of the intervals compared in
        `docs/performance.md` that loses least, and guidance is known to do more harm than good where there is most
        noise (Kynkäänniemi et al., arXiv 2404.07724). A checkpoint whose default is no more steps than asked for,
        such as the bundled model, keeps its own sampling.

        Args:
            num_inference_steps (`int`, defaults to 5): Steps of a call that names none.

        Returns:
            [`MoebiusInpaintPipeline`]: The same object.
        """
        if not isinstance(num_inference_steps, Integral) or num_inference_steps < 1:
            raise ValueError(
                f"`num_inference_steps` must be a whole number of at least 1, but is {num_inference_steps}."
            )
        if self.config.default_num_inference_steps > num_inference_steps:
            self.scheduler = UniPCMultistepScheduler.from_config(self.scheduler.config, timestep_spacing="trailing")
            self.register_to_config(
                default_num_inference_steps=num_inference_steps,
                default_strength=1.0,
                default_guidance_start=int(UNGUIDED_SHARE * num_inference_steps) / num_inference_steps,
            )
        return self

    def enable_vae_slicing(self) -> None:
        """Encodes and decodes the pictures of a batch one after another, to save memory."""
        self.vae.enable_slicing()

    def disable_vae_slicing(self) -> None:
        """Encodes and decodes the pictures of a batch at once again."""
        self.vae.disable_slicing()

    def enable_vae_tiling(self) -> None:
        """Encodes and decodes pictures in overlapping tiles, to save memory with large working sizes."""
        self.vae.enable_tiling()

    def disable_vae_tiling(self) -> None:
        """Encodes and decodes pictures in one piece again."""
        self.vae.disable_tiling()

    def check_inputs(
        self,
        height,
        width,
        padding_mask_crop,
        strength,
        masked_content,
        num_inference_steps,
        timesteps,
        sigmas,
        guidance_scale,
        guidance_start,
        guidance_end,
        num_images_per_prompt,
        eta,
        noise_offset,
        mask_dilation,
        paste,
        output_type,
        callback_on_step_end_tensor_inputs,
    ):
        for name, value in (("height", height), ("width", width)):
            if value is not None and (not isinstance(value, Integral) or value < 1 or value % self.size_multiple):
                raise ValueError(f"`{name}` must be a positive multiple of {self.size_multiple}, but is {value}.")
        for name, value, least in (
            ("num_inference_steps", num_inference_steps, 1),
            ("num_images_per_prompt", num_images_per_prompt, 1),
            ("mask_dilation", mask_dilation, 0),
            ("padding_mask_crop", 0 if padding_mask_crop is None else padding_mask_crop, 0),
        ):
            if not isinstance(value, Integral) or value < least:
                raise ValueError(f"`{name}` must be a whole number of at least {least}, but is {value}.")
        if not 0 < strength <= 1:
            raise ValueError(f"`strength` must be above 0 and at most 1, but is {strength}.")
        if masked_content not in MASKED_CONTENT:
            raise ValueError(
                f"`masked_content` must be one of {', '.join(map(repr, MASKED_CONTENT))}, but is {masked_content!r}."
            )
        if masked_content != "original" and strength == 1:
            raise ValueError(
                f"`masked_content` {masked_content!r} needs a `strength` below 1, but that is 1, where the start is"
                " pure noise."
            )
        if not math.isfinite(guidance_scale):
            raise ValueError(f"`guidance_scale` must be a finite number, but is {guidance_scale}.")
        if not 0 <= guidance_start <= guidance_end <= 1:
            raise ValueError(
                "`guidance_start` and `guidance_end` must be fractions with 0 <= start <= end <= 1, but are "
                f"{guidance_start} and {guidance_end}."
            )
        for name, value in (("eta", eta), ("noise_offset", noise_offset)):
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"`{name}` must be a finite number of at least 0, but is {value}.")
        for name, value in (("timesteps", timesteps), ("sigmas", sigmas)):
            if value is not None and len(value) == 0:
                raise ValueError(f"`{name}` is empty; at least one step is needed.")
        if paste not in PASTE_MODES:
            raise ValueError(f"`paste` must be one of 'auto', {', '.join(map(repr, PASTE_MODES))}, but is {paste!r}.")
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"`output_type` must be one of {', '.join(OUTPUT_TYPES)}, but is {output_type!r}.")
        unknown = set(callback_on_step_end_tensor_inputs) - set(self._callback_tensor_inputs)
        if unknown:
            raise ValueError(
                f"`callback_on_step_end_tensor_inputs` must be among {self._callback_tensor_inputs}, but holds "
                f"{sorted(unknown)}."
            )

    def prepare_generator(
        self, generator: torch.Generator | list[torch.Generator] | None, num_pictures: int, num_images_per_prompt: int
    ) -> list[torch.Generator] | torch.Generator | None:
        """One generator a result, or the single one (or none) that was given."""
        if generator is None:
            return None
        for each in generator if isinstance(generator, (list, tuple)) else [generator]:
            if not isinstance(each, torch.Generator):
                raise ValueError(f"`generator` must be a torch.Generator or a list of them, but is {generator!r}.")
        if isinstance(generator, torch.Generator):
            return generator
        if len(generator) == num_pictures:
            return [each for each in generator for _ in range(num_images_per_prompt)]
        if len(generator) != num_pictures * num_images_per_prompt:
            raise ValueError(
                f"`generator` holds {len(generator)} generators for {num_pictures} pictures with "
                f"{num_images_per_prompt} results each; allowed are one a picture or one a result."
            )
        return list(generator)

    def prepare_region(
        self,
        picture: Picture,
        mask: np.ndarray,
        padding_mask_crop: int | None,
        height: int | None,
        width: int | None,
    ) -> tuple[tuple[int, int, int, int], tuple[int, int]]:
        """The box `(left, top, right, bottom)` to work on, and the height and width at which it runs, unpadded."""
        min_size = 2 * self.vae_scale_factor
        if min(picture.height, picture.width) < min_size:
            raise ValueError(
                f"`image` is {picture.width}×{picture.height} px; both sides must have at least {min_size} px."
            )
        box = (0, 0, picture.width, picture.height)
        if padding_mask_crop is not None and mask.any():
            box = crop_region(mask, padding_mask_crop, min_size)
        box_height, box_width = box[3] - box[1], box[2] - box[0]
        if max(box_height, box_width) > MAX_ASPECT_RATIO * min(box_height, box_width):
            raise ValueError(
                f"`image` has {box_width}×{box_height} px to work on; one side may be at most "
                f"{MAX_ASPECT_RATIO} times the other. With `padding_mask_crop` only the mask's surroundings count."
            )
        return box, working_size(box_height, box_width, self.native_size, height, width)

    def prepare_image(
        self, picture: Picture, mask: np.ndarray, box: tuple[int, int, int, int], size: tuple[int, int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The box as the model sees it: picture `[1, 3, H, W]` in [-1, 1] and mask `[1, 1, H, W]`."""
        left, top, right, bottom = box
        image = torch.from_numpy(np.ascontiguousarray(picture.rgb(box), np.float32)).permute(2, 0, 1)[None]
        mask = torch.from_numpy(np.ascontiguousarray(mask[top:bottom, left:right], np.float32))[None, None]
        image = 2 * resize(image, *size) - 1
        mask = resize_mask(mask, *size)
        return pad_to_multiple(image, self.size_multiple), pad_to_multiple(mask, self.size_multiple)

    @contextmanager
    def _vae_precision(self, device: torch.device) -> Iterator[torch.dtype]:
        """Runs the VAE outside autocast and, where float16 would overflow (`force_upcast`), in float32."""
        with torch.autocast(device.type, enabled=False):
            if not self.vae.config.get("force_upcast", False):
                yield self.vae.dtype
                return
            with _VAE_PRECISION_LOCK:
                dtype = self.vae.dtype
                if dtype == torch.float16:
                    self.vae.to(torch.float32)
                    try:
                        yield torch.float32
                    finally:
                        self.vae.to(torch.float16)
                    return
            yield dtype

    def _latent_scale(self) -> tuple[float, float]:
        """Factor and shift between the VAE's latents and those of the denoiser."""
        return self.vae.config.scaling_factor, self.vae.config.get("shift_factor") or 0.0

    def encode_image(
        self,
        image: torch.Tensor,
        num_images_per_prompt: int,
        generator: torch.Generator | list[torch.Generator] | None,
        device: torch.device,
    ) -> torch.Tensor:
        """
        Encodes pictures to scaled latents, by a sample of the posterior where the VAE has one.

        Args:
            image (`torch.Tensor` of shape `[B, 3, H, W]`): Pictures in [-1, 1].
            num_images_per_prompt (`int`): Samples a picture.
            generator (`torch.Generator` or a list of `B * num_images_per_prompt`, *optional*): Source of the samples.
            device (`torch.device`): Where to compute.

        Returns:
            `torch.Tensor` of shape `[B * num_images_per_prompt, 4, H / 8, W / 8]`, float32.
        """
        with self._vae_precision(device) as dtype:
            encoded = self.vae.encode(image.to(device=device, dtype=dtype))
        if hasattr(encoded, "latent_dist"):
            parameters = encoded.latent_dist.parameters.float().repeat_interleave(num_images_per_prompt, dim=0)
            latents = DiagonalGaussianDistribution(parameters).sample(generator)
        else:
            latents = encoded.latents.float().repeat_interleave(num_images_per_prompt, dim=0)
        factor, shift = self._latent_scale()
        return (latents - shift) * factor

    def decode_latents(self, latents: torch.Tensor) -> torch.Tensor:
        """
        Decodes latents to pictures.

        Args:
            latents (`torch.Tensor` of shape `[B, 4, h, w]`): Scaled latents.

        Returns:
            `torch.Tensor` of shape `[B, 3, 8 * h, 8 * w]`, float32 in [0, 1].
        """
        factor, shift = self._latent_scale()
        with self._vae_precision(latents.device) as dtype:
            image = self.vae.decode((latents / factor + shift).to(dtype), return_dict=False)[0]
        image = image.float()
        if not image.isfinite().all():
            raise ValueError(
                "The result holds NaN or infinite values. Check `latents` and `masked_image_latents`, or load the "
                "pipeline with `dtype` float32 or bfloat16 instead of float16."
            )
        return (image / 2 + 0.5).clamp(0, 1)

    def prepare_noise(
        self,
        shape: tuple[int, ...],
        noise_offset: float,
        generator: torch.Generator | list[torch.Generator] | None,
        device: torch.device,
    ) -> torch.Tensor:
        """Gaussian noise and, scaled by `noise_offset`, one more draw that is constant over each channel."""
        noise = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        if noise_offset:
            noise = noise + noise_offset * randn_tensor((*shape[:2], 1, 1), generator, device, torch.float32)
        return noise

    def prepare_latents(
        self, image_latents: torch.Tensor | None, noise: torch.Tensor, scheduler, timestep: torch.Tensor
    ) -> torch.Tensor:
        """
        The latents to start from: pure noise, or the noised latents of a picture.

        Args:
            image_latents (`torch.Tensor` of shape `[B, 4, h, w]`, *optional*): Where to start; `None` is pure noise.
            noise (`torch.Tensor` of shape `[B, 4, h, w]`): The noise.
            scheduler ([`SchedulerMixin`]): Scheduler with its timesteps set.
            timestep (`torch.Tensor`): The first timestep.
        """
        if image_latents is None:
            return noise * scheduler.init_noise_sigma
        return scheduler.add_noise(image_latents, noise, timestep.expand(noise.shape[0]))

    def set_timesteps(
        self,
        scheduler,
        num_inference_steps: int,
        device: torch.device,
        timesteps: list[int] | None = None,
        sigmas: list[float] | None = None,
    ) -> int:
        """
        Sets the timesteps of a scheduler: the given ones, or as many as are asked for; returns their number.

        The function of diffusers for this is in a module that imports transformers, which takes seconds.
        """
        given = {name: value for name, value in (("timesteps", timesteps), ("sigmas", sigmas)) if value is not None}
        if len(given) > 1:
            raise ValueError("Only one of `timesteps` and `sigmas` can be given.")
        for name in given:
            if name not in inspect.signature(scheduler.set_timesteps).parameters:
                raise ValueError(f"`{name}` cannot be given to a {type(scheduler).__name__}.")
        scheduler.set_timesteps(**(given or {"num_inference_steps": num_inference_steps}), device=device)
        return len(scheduler.timesteps) if given else num_inference_steps

    def get_timesteps(self, scheduler, num_inference_steps: int, strength: float) -> torch.Tensor:
        """The scheduler's timesteps that `strength` leaves, of which the first is where the scheduler will begin."""
        kept = int(num_inference_steps * strength)
        if kept < 1:
            raise ValueError(
                f"`strength` {strength} of {num_inference_steps} `num_inference_steps` leaves no step to run; raise "
                "either (1.0 runs all)."
            )
        begin = (num_inference_steps - kept) * scheduler.order
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(begin)
        return scheduler.timesteps[begin:]

    def check_latents(
        self, name: str, value: torch.Tensor | list[torch.Tensor] | None, sizes: list[tuple[int, int]]
    ) -> None:
        """Checks that latents were given for each result, of the height and width in pixels at which it works."""
        if value is None:
            return
        if len(value) != len(sizes):
            raise ValueError(f"`{name}` holds {len(value)} latents for {len(sizes)} results; allowed is one each.")
        for row, (latents, size) in enumerate(zip(value, sizes)):
            expected = (self.vae.config.latent_channels, *(length // self.vae_scale_factor for length in size))
            if tuple(latents.shape) != expected:
                raise ValueError(
                    f"`{name}` must have the shape {list(expected)} for result {row}, but has {list(latents.shape)}."
                )

    def denoise(
        self,
        scheduler,
        timesteps: torch.Tensor,
        latents: torch.Tensor,
        mask: torch.Tensor,
        masked_image_latents: torch.Tensor,
        guidance_scale: float,
        guidance_start: float,
        guidance_end: float,
        step_kwargs: dict,
        callback_on_step_end: Callable | None,
        callback_on_step_end_tensor_inputs: list[str],
        progress_bar,
    ) -> torch.Tensor:
        """
        The denoising loop over one batch; the arguments are those of [`~MoebiusInpaintPipeline.__call__`].

        Args:
            scheduler ([`SchedulerMixin`]): Scheduler with its timesteps set, which the loop advances.
            timesteps (`torch.Tensor`): The timesteps to run.
            latents (`torch.Tensor` of shape `[B, 4, h, w]`): Where to start.
            mask (`torch.Tensor` of shape `[B, 1, h, w]`): 1 is filled.
            masked_image_latents (`torch.Tensor` of shape `[B, 4, h, w]`): Scaled latents of the masked pictures.
            step_kwargs (`dict`): What `scheduler.step` takes besides the prediction.

        Returns:
            `torch.Tensor` of shape `[B, 4, h, w]`, float32.
        """
        dtype, device = self.unet.dtype, latents.device
        # Batch order of the guidance: the unconditional branch (foreground), then the conditional one (background).
        categories = [
            self.lcg_embedder.category_ids(category, len(latents), device) for category in ("foreground", "background")
        ]
        category_embeds = self.lcg_embedder(torch.cat(categories)).to(dtype)  # [2 * B, tokens, dim]
        background_embeds = category_embeds.chunk(2)[1]

        # What the layers compute from the tokens alone is kept for the run; a callback may change tokens or adapters.
        guided_kwargs, background_kwargs = {}, {}
        if callback_on_step_end is None and "context_cache" in inspect.signature(self.unet.forward).parameters:
            guided_kwargs, background_kwargs = {"context_cache": {}}, {"context_cache": {}}

        for i, t in enumerate(timesteps):
            if self.interrupt:
                break
            latent_model_input = scheduler.scale_model_input(latents, t)
            latent_model_input = torch.cat([latent_model_input, mask, masked_image_latents], dim=1).to(dtype)

            in_interval = i / len(timesteps) >= guidance_start and (i + 1) / len(timesteps) <= guidance_end
            if guidance_scale > 1 and in_interval:
                noise_pred = self.unet(
                    torch.cat([latent_model_input] * 2),
                    t,
                    encoder_hidden_states=category_embeds,
                    return_dict=False,
                    **guided_kwargs,
                )[0].float()
                noise_pred_foreground, noise_pred_background = noise_pred.chunk(2)
                noise_pred = noise_pred_foreground + guidance_scale * (noise_pred_background - noise_pred_foreground)
            else:
                noise_pred = self.unet(
                    latent_model_input,
                    t,
                    encoder_hidden_states=background_embeds,
                    return_dict=False,
                    **background_kwargs,
                )[0].float()

            latents = scheduler.step(noise_pred, t, latents, **step_kwargs, return_dict=False)[0]

            if callback_on_step_end is not None:
                callback_kwargs = {}
                for k in callback_on_step_end_tensor_inputs:
                    callback_kwargs[k] = locals()[k]
                shared_guidance_scale = self._guidance_scale
                callback_outputs = callback_on_step_end(self, i, t, callback_kwargs) or {}

                latents = callback_outputs.pop("latents", latents)
                mask = callback_outputs.pop("mask", mask)
                masked_image_latents = callback_outputs.pop("masked_image_latents", masked_image_latents)
                given_embeds = callback_outputs.pop("category_embeds", category_embeds)
                if given_embeds is not category_embeds:
                    category_embeds, background_embeds = given_embeds, given_embeds.chunk(2)[1]
                # A callback may set the scale of its own call; another thread's call may not.
                if self._guidance_scale != shared_guidance_scale:
                    guidance_scale = self._guidance_scale

            progress_bar.update()
        return latents

    @torch.no_grad()
    @replace_example_docstring(EXAMPLE_DOC_STRING)
    def __call__(
        self,
        image: PipelineImageInput,
        mask_image: PipelineImageInput,
        masked_image_latents: torch.Tensor | list[torch.Tensor] | None = None,
        height: int | None = None,
        width: int | None = None,
        padding_mask_crop: int | None = None,
        strength: float | None = None,
        masked_content: str = "original",
        num_inference_steps: int | None = None,
        timesteps: list[int] | None = None,
        sigmas: list[float] | None = None,
        guidance_scale: float | None = None,
        guidance_start: float | None = None,
        guidance_end: float = 1.0,
        num_images_per_prompt: int = 1,
        eta: float = 0.0,
        noise_offset: float = 0.0357,
        mask_dilation: int = 0,
        mask_threshold: float = 0.5,
        mask_source: str = "auto",
        color_compensation: bool = False,
        paste: str | None = "auto",
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | list[torch.Tensor] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[["MoebiusInpaintPipeline", int, int, dict], dict]
        | PipelineCallback
        | MultiPipelineCallbacks
        | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],  # noqa: B006, as in every diffusers pipeline
    ) -> ImagePipelineOutput | tuple:
        r"""
        Fills the masked part of one or several photos.

        Args:
            image (`PIL.Image.Image`, `np.ndarray`, `torch.Tensor` or a list of them):
                The photos. NumPy arrays are `[H, W]`, `[H, W, C]` or `[B, H, W, C]`, torch tensors `[H, W]`,
                `[C, H, W]` or `[B, C, H, W]`, both `uint8`, `uint16` or floats from 0 to 1 (a range of [-1, 1] is
                refused). Grey, palette, RGB, CMYK, 16-bit grey and pictures with an alpha channel are accepted. A list
                may mix sizes. Both sides have at least 16 px, and one is at most 16 times the other. EXIF orientation
                is not applied: a picture is taken as its pixels lie.
            mask_image (`PIL.Image.Image`, `np.ndarray`, `torch.Tensor` or a list of them):
                White is filled, from `mask_threshold` on. One mask for all photos or one each, of the photo's size or
                at least its aspect ratio; also boolean, or of whole numbers 0 and 1. A mask with an alpha channel that
                is not opaque everywhere is that alpha channel (see `mask_source`). A three-dimensional torch tensor is
                a batch `[B, H, W]`. A mask that fills most of the photo, or all of its border, gets a warning.
            masked_image_latents (`torch.Tensor` or `list[torch.Tensor]`, *optional*):
                Scaled latents of the masked photos, `[B * num_images_per_prompt, 4, h, w]`, or a list of `[4, h, w]`
                where sizes differ. Computed from `image` by default.
            height (`int`, *optional*):
                Height in pixels at which the model works, a multiple of 32. Alone it keeps the aspect ratio. By
                default a picture with a short side from a half to 5/4 of the native size (512 px) works at its own
                size, a larger one with its short side at the native size, and a smaller one is enlarged until its long
                side has it. Whatever it is, the result has the size of the input.
            width (`int`, *optional*):
                Width in pixels at which the model works, a multiple of 32. Alone it keeps the aspect ratio.
            padding_mask_crop (`int`, *optional*):
                Works on the mask's box grown by so many pixels, at full resolution where that fits, and pastes the
                result back. 0 is no margin, `None` works on the whole picture. A box smaller than 16 px or more
                elongated than 16:1 grows to these limits.
            strength (`float`, *optional*):
                Share of the steps that run, above 0. Below 1 the start is the noised picture, at 1 it is pure noise.
                Defaults to the checkpoint's `default_strength`: 0.99, or 1.0 for the bundled model.
            masked_content (`str`, defaults to `"original"`):
                What the hole holds in the picture that is noised to start from, for a `strength` below 1:
                `"original"` the photo, `"fill"` a smooth continuation of the colours around it ([`fill_hole`]),
                `"noise"` noise in the latents, so that nothing of the old content is left.
            num_inference_steps (`int`, *optional*):
                Number of steps of the whole schedule. Defaults to the checkpoint's `default_num_inference_steps`: 20,
                or what the bundled model was trained for.
            timesteps (`list[int]`, *optional*):
                Custom timesteps, in descending order, for schedulers that take them.
            sigmas (`list[float]`, *optional*):
                Custom sigmas for schedulers that take them.
            guidance_scale (`float`, *optional*):
                Scale `s` in `eps_fg + s * (eps_bg - eps_fg)`; for `s <= 1` only the background branch runs, at half
                the cost. Defaults to the checkpoint's `default_guidance_scale`: 2.5, or 2.0 for portraits.
            guidance_start (`float`, *optional*):
                Fraction of the steps after which guidance begins; outside only the background branch runs. Defaults to
                0, or, where guidance goes on to the end, to the pipeline's `default_guidance_start`, which is up to
                0.4 after [`use_few_steps`].
            guidance_end (`float`, defaults to 1.0):
                Fraction of the steps after which guidance ends. A step counts if it lies within both limits as a
                whole.
            num_images_per_prompt (`int`, defaults to 1):
                Results a photo; they follow each other in the output.
            eta (`float`, defaults to 0.0):
                Share of fresh noise in each step of DDIM; ignored by schedulers without it.
            noise_offset (`float`, defaults to 0.0357):
                Strength of the noise that is constant over each channel and is added to the start.
            mask_dilation (`int`, defaults to 0):
                Pixels by which the mask grows in every direction before anything else. What lies outside the grown
                mask counts as outside.
            mask_threshold (`float`, defaults to 0.5):
                Share of white, or of opaque, from which on a pixel of the mask is filled.
            mask_source (`str`, defaults to `"auto"`):
                What of the mask says which pixels are filled. `"luminance"`: white ones. `"alpha"`: opaque ones,
                whatever their colour. `"transparent"`: transparent ones. `"auto"`: alpha where it is not opaque
                everywhere, else luminance.
            color_compensation (`bool`, defaults to `False`):
                Shifts the colours of the result by 1.1 times the mean difference to the photo around the hole.
            paste (`str`, *optional*, defaults to `"auto"`):
                `"exact"`: every pixel outside the mask is the input's, bit by bit, and the result is blended in on the
                inner side of the mask's edge. `"seamless"`: every pixel outside is the input's too, and the colours
                inside are shifted so that they meet those around the hole ([`match_edges`]). `"blur"`: the release's
                blend, by the mask under a Gaussian of 3 px. `None`: the decoded picture alone (with
                `padding_mask_crop`, within its box). `"auto"`: the checkpoint's `default_paste`, which is `"exact"`,
                or `"seamless"` for the bundled model.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*):
                With a list, one a photo or one a result, each draws from its own, so that a result does not depend on
                what else is in the batch. With a single one (or none) the draws of a batch follow each other. The
                order of draws is the release's: posterior of the picture, posterior of the masked picture, noise,
                noise offset.
            latents (`torch.Tensor` or `list[torch.Tensor]`, *optional*):
                Starting latents, used as they are, in the shapes of `masked_image_latents`.
            output_type (`str`, defaults to `"pil"`):
                `"pil"`, `"np"` (`[H, W, C]` in [0, 1]), `"pt"` (`[C, H, W]` in [0, 1]) or `"latent"`. Arrays, tensors
                and latents of one size are stacked to a batch, others come as a list. Pillow results have the input's
                mode (bilevel comes as L, palette as RGB or RGBA; float and 16-bit colour arrays are rounded to 8
                bits); arrays and tensors have its channels (CMYK comes as RGB) and, of float inputs, its type.
            return_dict (`bool`, defaults to `True`):
                Whether to return an [`~pipelines.ImagePipelineOutput`] instead of a tuple.
            callback_on_step_end (`Callable`, *optional*):
                Called as `callback_on_step_end(pipeline, step, timestep, callback_kwargs)` after each step; the
                tensors in the dict that it returns replace those of the call. Photos of one working size run as one
                batch, and the steps begin anew for the next batch.
            callback_on_step_end_tensor_inputs (`list[str]`, defaults to `["latents"]`):
                What `callback_kwargs` holds, of `latents` `[B, 4, h, w]`, `category_embeds` `[2 * B, 10, dim]`
                (foreground, then background), `mask` `[B, 1, h, w]` and `masked_image_latents` `[B, 4, h, w]`.

        Examples:

        Returns:
            [`~pipelines.ImagePipelineOutput`] or `tuple`: The results, as `images` or as the only element of a tuple.
            A photo with an empty mask comes back unchanged, with a warning, and so does one whose batch had not begun
            when the call was interrupted.
        """
        if isinstance(callback_on_step_end, (PipelineCallback, MultiPipelineCallbacks)):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        guidance_scale = self.config.default_guidance_scale if guidance_scale is None else guidance_scale
        if guidance_start is None:
            guidance_start = self.config.default_guidance_start if guidance_end == 1 else 0.0
        strength = self.config.default_strength if strength is None else strength
        paste = self.config.default_paste if paste == "auto" else paste
        if num_inference_steps is None:
            num_inference_steps = self.config.default_num_inference_steps

        # 1. Check everything before anything is computed
        self.check_inputs(
            height,
            width,
            padding_mask_crop,
            strength,
            masked_content,
            num_inference_steps,
            timesteps,
            sigmas,
            guidance_scale,
            guidance_start,
            guidance_end,
            num_images_per_prompt,
            eta,
            noise_offset,
            mask_dilation,
            paste,
            output_type,
            callback_on_step_end_tensor_inputs,
        )
        pictures = load_pictures(image)
        masks = load_masks(mask_image, pictures, mask_threshold, mask_source)
        masks = [dilate_mask(mask, mask_dilation) for mask in masks]
        generator = self.prepare_generator(generator, len(pictures), num_images_per_prompt)
        regions = [
            self.prepare_region(picture, mask, padding_mask_crop, height, width)
            for picture, mask in zip(pictures, masks)
        ]
        sizes = [
            tuple(math.ceil(length / self.size_multiple) * self.size_multiple for length in size)
            for _, size in regions
        ]
        result_sizes = [size for size in sizes for _ in range(num_images_per_prompt)]
        self.check_latents("latents", latents, result_sizes)
        self.check_latents("masked_image_latents", masked_image_latents, result_sizes)

        self._guidance_scale = guidance_scale
        self._interrupt = False
        device = self._execution_device

        # 2. Timesteps, on a scheduler of this call's own
        scheduler = copy.deepcopy(self.scheduler)
        num_inference_steps = self.set_timesteps(scheduler, num_inference_steps, device, timesteps, sigmas)
        timesteps = self.get_timesteps(scheduler, num_inference_steps, strength)
        self._num_timesteps = len(timesteps)
        step_parameters = inspect.signature(scheduler.step).parameters

        # 3. Pictures of one working size run as one batch
        batches: dict[tuple[int, int], list[int]] = {}
        for index, size in enumerate(sizes):
            if output_type == "latent" or masks[index].any():
                batches.setdefault(size, []).append(index)
            else:
                logger.warning(
                    f"`mask_image` is empty for picture {index} (no value reaches half of white): the picture is "
                    "returned unchanged."
                )
        results: list = [None] * (len(pictures) * num_images_per_prompt)

        with self.progress_bar(total=len(batches) * len(timesteps)) as progress_bar:
            for size, indices in batches.items():
                if self.interrupt and output_type != "latent":
                    break
                rows = [i * num_images_per_prompt + n for i in indices for n in range(num_images_per_prompt)]
                batch_generator = [generator[row] for row in rows] if isinstance(generator, list) else generator
                batch_scheduler = copy.deepcopy(scheduler)
                latent_size = (size[0] // self.vae_scale_factor, size[1] // self.vae_scale_factor)
                latent_shape = (self.vae.config.latent_channels, *latent_size)

                # 4. Latents of the pictures, of the masked pictures, and to start from
                prepared = [self.prepare_image(pictures[i], masks[i], *regions[i]) for i in indices]
                init_image, mask = (torch.cat(tensors) for tensors in zip(*prepared))
                image_latents = None
                if latents is None and strength < 1:
                    start = fill_hole(init_image, mask) if masked_content == "fill" else init_image
                    image_latents = self.encode_image(start, num_images_per_prompt, batch_generator, device)
                if masked_image_latents is None:
                    masked_image = init_image * (1 - mask)
                    batch_masked = self.encode_image(masked_image, num_images_per_prompt, batch_generator, device)
                else:
                    batch_masked = torch.stack([masked_image_latents[row] for row in rows]).to(device, torch.float32)
                mask = F.interpolate(mask, size=latent_size, mode="nearest").to(device)
                mask = mask.repeat_interleave(num_images_per_prompt, dim=0)
                if latents is None:
                    noise = self.prepare_noise((len(rows), *latent_shape), noise_offset, batch_generator, device)
                    if masked_content == "noise":
                        content = self.prepare_noise((len(rows), *latent_shape), 0.0, batch_generator, device)
                        image_latents = torch.where(mask > 0, content, image_latents)
                    batch_latents = self.prepare_latents(image_latents, noise, batch_scheduler, timesteps[:1])
                else:
                    batch_latents = torch.stack([latents[row] for row in rows]).to(device, torch.float32)

                # 5. Denoising
                step_kwargs = {"eta": eta, "generator": batch_generator}
                batch_latents = self.denoise(
                    batch_scheduler,
                    timesteps,
                    batch_latents,
                    mask,
                    batch_masked,
                    guidance_scale,
                    guidance_start,
                    guidance_end,
                    {name: value for name, value in step_kwargs.items() if name in step_parameters},
                    callback_on_step_end,
                    callback_on_step_end_tensor_inputs,
                    progress_bar,
                )

                # 6. Back into the photos
                if output_type == "latent":
                    for row, result in zip(rows, batch_latents):
                        results[row] = result
                else:
                    for row, decoded in zip(rows, self.decode_latents(batch_latents).cpu()):
                        i = row // num_images_per_prompt
                        (left, top, right, bottom), (content_height, content_width) = regions[i]
                        fill = resize(decoded[None, :, :content_height, :content_width], bottom - top, right - left)
                        fill = fill[0].permute(1, 2, 0).numpy()
                        result = paste_fill(pictures[i], fill, masks[i], regions[i][0], paste, color_compensation)
                        results[row] = result.render(output_type, device)

        for row, result in enumerate(results):
            if result is None:
                results[row] = pictures[row // num_images_per_prompt].render(output_type, device)
        if output_type != "pil" and len({(tuple(result.shape), result.dtype) for result in results}) == 1:
            results = np.stack(results) if output_type == "np" else torch.stack(results)

        # Offload all models
        self.maybe_free_model_hooks()

        if not return_dict:
            return (results,)
        return ImagePipelineOutput(images=results)
