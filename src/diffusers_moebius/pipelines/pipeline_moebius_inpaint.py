"""The inpainting pipeline of Moebius."""

import copy
from collections.abc import Callable

import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import PipelineImageInput
from diffusers.models import AutoencoderKL, AutoencoderTiny
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from diffusers.schedulers import KarrasDiffusionSchedulers, UniPCMultistepScheduler
from diffusers.utils import logging, replace_example_docstring

from ..models.fusion import fuse_autoencoder, remove_fused_adapters
from ..models.latent_categories import LatentCategoriesEmbedder
from ..models.unet_2d_moebius import MoebiusUNet2DModel
from ..models.unet_2d_pixelhacker import PixelHackerUNet2DModel
from ..pictures.detail import add_detail
from ..pictures.paste import paste_fill
from ..pictures.picture import stack_results
from ..pictures.region import Region, find_regions
from .denoising import embed_categories, predict_noise, prepare_model_input, scheduler_step, set_timesteps
from .inputs import check_latents, check_options, model_sizes, prepare_generator
from .latents import decode_pictures, encode_pictures, prepare_latents, select_latents, stack_regions

try:
    from ..loaders.hub import MoebiusLoaderMixin
    from ..loaders.lora import MoebiusLoraLoaderMixin
except ModuleNotFoundError as error:  # this file lies in a saved pipeline, where it loads and saves as diffusers does
    if not __name__.startswith("diffusers_modules."):
        raise error

    class MoebiusLoaderMixin: ...

    class MoebiusLoraLoaderMixin: ...


logger = logging.get_logger(__name__)

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
        default_detail (`str`, *optional*, defaults to `"enlarged"`):
            How a call that does not say so adds texture of the photo; `"patches"` for the bundled model.
        tiny_vae ([`AutoencoderTiny`], *optional*):
            Decodes instead of `vae`, in a small part of the time and less exactly; it must have the same latents, as
            `madebyollin/taesdxl` has those of the published models. `vae` still encodes.
    """

    model_cpu_offload_seq = "lcg_embedder->unet->vae->tiny_vae"
    _optional_components = ["tiny_vae"]
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
        default_detail: str | None = "enlarged",
        tiny_vae: AutoencoderTiny | None = None,
    ):
        super().__init__()
        self.register_modules(vae=vae, unet=unet, lcg_embedder=lcg_embedder, scheduler=scheduler, tiny_vae=tiny_vae)
        self.register_to_config(
            default_guidance_scale=default_guidance_scale,
            default_num_inference_steps=default_num_inference_steps,
            default_strength=default_strength,
            default_paste=default_paste,
            default_guidance_start=default_guidance_start,
            default_detail=default_detail,
        )
        self.sizes = model_sizes(getattr(self, "vae", None), getattr(self, "unet", None))
        self.vae_scale_factor = self.sizes.latent

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
        missing = sorted(modules - (shared | kwargs).keys() - set(cls._optional_components))
        if missing:
            raise ValueError(f"`pipeline` has no {', '.join(missing)}: pass what is missing as an argument.")
        new_pipeline = cls(**{**shared, **settings, **kwargs})
        if pipeline.name_or_path is not None:
            new_pipeline.register_to_config(_name_or_path=pipeline.name_or_path)
        if dtype is not None or torch_dtype is not None:
            new_pipeline.to(dtype=dtype or torch_dtype)
        return new_pipeline

    @property
    def modular_blocks(self) -> type:
        """The class of the blocks that do the same in Modular Diffusers."""
        from .modular_blocks_moebius import MoebiusAutoBlocks

        return MoebiusAutoBlocks

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

        Folds the BatchNorm layers of [`MoebiusUNet2DModel`] and moves its upsampling to the small grid, as well as
        that of an [`AutoencoderKL`]; the results stay the same but for rounding.

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
        remove_fused_adapters(self.unet)
        fuse_autoencoder(self.vae)
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
        check_options(num_inference_steps=num_inference_steps)
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
        attention_kwargs: dict | None,
        eta: float,
        generator: torch.Generator | list[torch.Generator] | None,
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

        Returns:
            `torch.Tensor` of shape `[B, 4, h, w]`, float32.
        """
        category_embeds = embed_categories(self.lcg_embedder, len(latents), latents.device)
        background_embeds = category_embeds.chunk(2)[1]

        for i, t in enumerate(timesteps):
            if self.interrupt:
                break
            model_input = prepare_model_input(scheduler, latents, t, mask, masked_image_latents)
            in_interval = i / len(timesteps) >= guidance_start and (i + 1) / len(timesteps) <= guidance_end
            if guidance_scale > 1 and in_interval:
                foreground, background = predict_noise(self.unet, model_input, t, category_embeds, attention_kwargs)
                noise_pred = foreground + guidance_scale * (background - foreground)
            else:
                (noise_pred,) = predict_noise(self.unet, model_input, t, background_embeds, attention_kwargs)
            latents = scheduler_step(scheduler, noise_pred, t, latents, eta, generator)

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

    def batches(self, regions: list[Region], keep_empty: bool) -> dict[tuple[int, int], list[int]]:
        """The indices of regions by working size; regions with an empty mask are left out with a warning."""
        batches: dict[tuple[int, int], list[int]] = {}
        for index, region in enumerate(regions):
            if keep_empty or region.mask.any():
                batches.setdefault(region.size, []).append(index)
            else:
                logger.warning(f"`mask_image` is empty for picture {index}: the picture is returned unchanged.")
        return batches

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
        detail: str | None = "auto",
        paste: str | None = "auto",
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | list[torch.Tensor] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        attention_kwargs: dict | None = None,
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
                `[C, H, W]` or `[B, C, H, W]`, both `uint8`, `uint16` or floats from 0 to 1, or from -1 to 1 if
                any is below -0.25 (results are from 0 to 1 all the same). Grey, palette, RGB, CMYK, 16-bit grey and
                pictures with an alpha channel are accepted. A list may mix sizes. Both sides have at least 16 px, and
                one is at most 16 times the other. EXIF orientation is not applied: a picture is taken as its pixels
                lie.
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
            detail (`str`, *optional*, defaults to `"auto"`):
                Texture from the photo itself ([`add_detail`]). `"patches"`: patches of the photo fill the hole, and it
                is decided for each hole how much the model's filling leads them. `"enlarged"`: only where the model
                works below the photo's size, and always led by its filling, of which the low frequencies stay.
                `None`: the model's filling alone. `"auto"`: the checkpoint's `default_detail`, which is `"enlarged"`,
                or `"patches"` for the bundled model.
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
                noise offset; then what `detail` draws.
            latents (`torch.Tensor` or `list[torch.Tensor]`, *optional*):
                Starting latents, used as they are, in the shapes of `masked_image_latents`.
            output_type (`str`, defaults to `"pil"`):
                `"pil"`, `"np"` (`[H, W, C]` in [0, 1]), `"pt"` (`[C, H, W]` in [0, 1]) or `"latent"`. Arrays, tensors
                and latents of one size are stacked to a batch, others come as a list. Pillow results have the input's
                mode (bilevel comes as L, palette as RGB or RGBA; float and 16-bit colour arrays are rounded to 8
                bits); arrays and tensors have its channels (CMYK comes as RGB) and, of float inputs, its type.
            return_dict (`bool`, defaults to `True`):
                Whether to return an [`~pipelines.ImagePipelineOutput`] instead of a tuple.
            attention_kwargs (`dict`, *optional*):
                Handed to the U-Net: `{"scale": s}` multiplies the weights of the active LoRA adapters in this call.
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
        detail = self.config.default_detail if detail == "auto" else detail
        if num_inference_steps is None:
            num_inference_steps = self.config.default_num_inference_steps

        # 1. Check everything before anything is computed
        check_options(
            strength=strength,
            masked_content=masked_content,
            guidance_scale=guidance_scale,
            guidance_start=guidance_start,
            guidance_end=guidance_end,
            num_images_per_prompt=num_images_per_prompt,
            eta=eta,
            noise_offset=noise_offset,
            detail=detail,
            paste=paste,
            output_type=output_type,
        )
        unknown = set(callback_on_step_end_tensor_inputs) - set(self._callback_tensor_inputs)
        if unknown:
            raise ValueError(
                f"`callback_on_step_end_tensor_inputs` must be among {self._callback_tensor_inputs}, but holds "
                f"{sorted(unknown)}."
            )
        regions = find_regions(
            image,
            mask_image,
            self.sizes,
            mask_dilation,
            padding_mask_crop,
            height,
            width,
            mask_threshold,
            mask_source,
        )
        generator = prepare_generator(generator, len(regions), num_images_per_prompt)
        channels = self.vae.config.latent_channels
        result_sizes = [region.size for region in regions for _ in range(num_images_per_prompt)]
        check_latents("latents", latents, result_sizes, channels, self.sizes)
        check_latents("masked_image_latents", masked_image_latents, result_sizes, channels, self.sizes)

        self._guidance_scale = guidance_scale
        self._interrupt = False
        device = self._execution_device

        # 2. Timesteps, on a scheduler of this call's own
        scheduler = copy.deepcopy(self.scheduler)
        timesteps = set_timesteps(scheduler, num_inference_steps, strength, device, timesteps, sigmas)
        self._num_timesteps = len(timesteps)

        # 3. Pictures of one working size run as one batch
        batches = self.batches(regions, keep_empty=output_type == "latent")
        results: list = [None] * (len(regions) * num_images_per_prompt)
        with self.progress_bar(total=len(batches) * len(timesteps)) as progress_bar:
            for indices in batches.values():
                if self.interrupt and output_type != "latent":
                    break
                rows = [i * num_images_per_prompt + n for i in indices for n in range(num_images_per_prompt)]
                batch_generator = [generator[row] for row in rows] if isinstance(generator, list) else generator
                batch_scheduler = copy.deepcopy(scheduler)

                # 4. Latents of the pictures, of the masked pictures, and to start from
                init_image, mask = stack_regions([regions[i] for i in indices], device)
                batch_latents = select_latents(latents, rows, device)
                image_latents, batch_masked, mask = encode_pictures(
                    self.vae,
                    init_image,
                    mask,
                    batch_latents,
                    select_latents(masked_image_latents, rows, device),
                    strength,
                    masked_content,
                    batch_generator,
                    num_images_per_prompt,
                )
                batch_latents = prepare_latents(
                    batch_latents,
                    image_latents,
                    batch_masked,
                    mask,
                    batch_scheduler,
                    timesteps[:1],
                    noise_offset,
                    masked_content,
                    batch_generator,
                )

                # 5. Denoising
                batch_latents = self.denoise(
                    batch_scheduler,
                    timesteps,
                    batch_latents,
                    mask,
                    batch_masked,
                    guidance_scale,
                    guidance_start,
                    guidance_end,
                    attention_kwargs,
                    eta,
                    batch_generator,
                    callback_on_step_end,
                    callback_on_step_end_tensor_inputs,
                    progress_bar,
                )

                # 6. Back into the photos
                if output_type == "latent":
                    for row, result in zip(rows, batch_latents):
                        results[row] = result
                    continue
                for n, (row, decoded) in enumerate(
                    zip(rows, decode_pictures(self.tiny_vae or self.vae, batch_latents))
                ):
                    region = regions[row // num_images_per_prompt]
                    row_generator = batch_generator[n] if isinstance(batch_generator, list) else batch_generator
                    fill = add_detail(region.fill(decoded), region, detail, row_generator, device)
                    result = paste_fill(region.picture, fill, region.mask, region.box, paste, color_compensation)
                    results[row] = result.render(output_type, device)

        for row, result in enumerate(results):
            if result is None:
                results[row] = regions[row // num_images_per_prompt].picture.render(output_type, device)
        results = stack_results(results, output_type)

        # Offload all models
        self.maybe_free_model_hooks()

        if not return_dict:
            return (results,)
        return ImagePipelineOutput(images=results)
