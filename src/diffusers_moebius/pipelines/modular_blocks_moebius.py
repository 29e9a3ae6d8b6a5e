"""The steps of [`MoebiusInpaintPipeline`] as Modular Diffusers blocks, to be taken apart and put together anew."""

import copy
import inspect
import sys
from typing import Any

import numpy as np
import PIL.Image
import torch
from diffusers.configuration_utils import FrozenDict
from diffusers.guiders import ClassifierFreeGuidance
from diffusers.guiders.guider_utils import BaseGuidance
from diffusers.models import AutoencoderKL
from diffusers.modular_pipelines import (
    BlockState,
    ComponentSpec,
    ConfigSpec,
    InputParam,
    LoopSequentialPipelineBlocks,
    ModularPipeline,
    ModularPipelineBlocks,
    OutputParam,
    PipelineState,
    SequentialPipelineBlocks,
)
from diffusers.schedulers import DDIMScheduler
from diffusers.utils import logging

from ..models.latent_categories import LatentCategoriesEmbedder
from ..models.unet_2d_moebius import MoebiusUNet2DModel
from ..models.unet_2d_pixelhacker import PixelHackerUNet2DModel  # noqa: F401, named in index files
from ..pictures.detail import add_detail
from ..pictures.paste import paste_fill
from ..pictures.picture import stack_results
from ..pictures.region import find_regions
from .denoising import embed_categories, predict_noise, prepare_model_input, scheduler_step, set_timesteps
from .inputs import check_latents, check_options, model_sizes, prepare_generator
from .latents import decode_pictures, encode_pictures, prepare_latents, select_latents, stack_regions

logger = logging.get_logger(__name__)

# modular_model_index.json names a class by a module that is imported already. This module may come with a repository,
# and then has another name in each process: so that index files can name it, it is known by this name too.
MODULE_FOR_INDEX = "moebius_modular_blocks"
sys.modules[MODULE_FOR_INDEX] = sys.modules[__name__]

_PICTURES = PIL.Image.Image | np.ndarray | torch.Tensor | list

# Every value that passes between blocks: its type and what it is. Those of a call are explained at
# `MoebiusInpaintPipeline.__call__`.
_VALUES = {
    "image": (_PICTURES, "The photos."),
    "mask_image": (_PICTURES, "The masks, of the photos' sizes; white is filled."),
    "mask_dilation": (int, "Pixels by which the masks grow first."),
    "mask_threshold": (float, "Fill where a mask is at least so bright, as a share of white."),
    "mask_source": (str, "What of a mask says where to fill: 'auto', 'alpha', 'transparent' or 'luminance'."),
    "padding_mask_crop": (int, "Margin in pixels around the mask's box to work on; by default the whole photo."),
    "height": (int, "Height in pixels at which the model works, a multiple of 32."),
    "width": (int, "Width in pixels at which the model works, a multiple of 32."),
    "num_images_per_prompt": (int, "Results a photo."),
    "generator": (torch.Generator, "One generator, or a list of one a photo or one a result."),
    "strength": (float, "Share of the steps that run; by default the checkpoint's."),
    "masked_content": (str, "What the hole holds at the start: 'original', 'fill' or 'noise'."),
    "num_inference_steps": (int, "Number of steps of the whole schedule; by default the checkpoint's."),
    "timesteps": (torch.Tensor, "The timesteps to run; as an input, custom ones for schedulers that take them."),
    "sigmas": (list[float], "Custom sigmas for schedulers that take them."),
    "eta": (float, "Share of fresh noise in each step of DDIM."),
    "noise_offset": (float, "Strength of the noise that is constant over each channel."),
    "attention_kwargs": (dict, "Handed to the denoiser: {'scale': s} weighs active LoRA adapters."),
    "detail": (str, "Texture of the photo: 'patches', 'enlarged', 'none', or 'auto' for the checkpoint's own."),
    "paste": (str, "'exact', 'seamless', 'blur', 'none', or 'auto' for the checkpoint's own."),
    "color_compensation": (bool, "Shift the colours of the result towards those around the hole."),
    "output_type": (str, "'pil', 'np', 'pt' or 'latent'."),
    "regions": (list, "Where in each photo the model works; they bring results back into their photos."),
    "processed_image": (torch.Tensor, "What the model sees of the photos, [B, 3, H, W] in [-1, 1]."),
    "processed_mask_image": (torch.Tensor, "What it sees of the masks, [B, 1, H, W]; 1 is filled."),
    "image_latents": (torch.Tensor, "Scaled latents of the photos to start from; none where the start is noise."),
    "masked_image_latents": (torch.Tensor, "Scaled latents of the masked photos, [results, 4, h, w]."),
    "mask": (torch.Tensor, "The masks in latent size, [results, 1, h, w]."),
    "background_embeds": (torch.Tensor, "Tokens of the background, [1, tokens, dim]: the conditional branch."),
    "foreground_embeds": (torch.Tensor, "Tokens of the foreground, [1, tokens, dim]: the unconditional branch."),
    "scheduler": (Any, "A copy of the scheduler with its timesteps set; the component itself is not changed."),
    "latents": (torch.Tensor, "Latents [results, 4, h, w]: the start, as given or drawn, and then the result."),
    "fills": (list, "What the model made of each region, NumPy arrays [h, w, 3] in [0, 1], as large as its box."),
    "images": (list, "The results."),
}


def _inputs(*required: str, **defaults) -> list[InputParam]:
    return [InputParam(name, _VALUES[name][0], required=True, description=_VALUES[name][1]) for name in required] + [
        InputParam(name, _VALUES[name][0], default, description=_VALUES[name][1]) for name, default in defaults.items()
    ]


def _outputs(*names: str) -> list[OutputParam]:
    return [OutputParam(name, *_VALUES[name]) for name in names]


class MoebiusBlock(ModularPipelineBlocks):
    """A block of Moebius; what it does is its docstring."""

    model_name = "moebius"

    @property
    def description(self) -> str:
        return inspect.cleandoc(self.__doc__)


class MoebiusInputStep(MoebiusBlock):
    """
    Reads photos and masks and finds where in each photo the model works, and at which size. All photos of a call
    work at one size.
    """

    @property
    def expected_components(self) -> list[ComponentSpec]:
        return [ComponentSpec("vae", AutoencoderKL), ComponentSpec("unet", MoebiusUNet2DModel)]

    @property
    def inputs(self) -> list[InputParam]:
        return _inputs(
            "image",
            "mask_image",
            mask_dilation=0,
            mask_threshold=0.5,
            mask_source="auto",
            padding_mask_crop=None,
            height=None,
            width=None,
            num_images_per_prompt=1,
            generator=None,
        )

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        return _outputs("regions", "processed_image", "processed_mask_image")

    @torch.no_grad()
    def __call__(self, components: ModularPipeline, state: PipelineState) -> tuple[ModularPipeline, PipelineState]:
        block_state = self.get_block_state(state)
        check_options(num_images_per_prompt=block_state.num_images_per_prompt)
        regions = find_regions(
            block_state.image,
            block_state.mask_image,
            model_sizes(components.vae, components.unet),
            block_state.mask_dilation,
            block_state.padding_mask_crop,
            block_state.height,
            block_state.width,
            block_state.mask_threshold,
            block_state.mask_source,
        )
        sizes = sorted({region.size for region in regions})
        if len(sizes) > 1:
            raise ValueError(
                f"`image` holds pictures that work at different sizes (height, width): {sizes}. Pass those of one "
                "size in a call, or set `height` and `width`."
            )
        if not all(region.mask.any() for region in regions):
            logger.warning("`mask_image` is empty for at least one picture, which comes back unchanged.")
        block_state.generator = prepare_generator(
            block_state.generator, len(regions), block_state.num_images_per_prompt
        )
        block_state.regions = regions
        block_state.processed_image, block_state.processed_mask_image = stack_regions(
            regions, components._execution_device
        )
        self.set_block_state(state, block_state)
        return components, state


class MoebiusVaeEncoderStep(MoebiusBlock):
    """
    Encodes the masked photos and, where the start is not pure noise, the photos. Latents that are given are not
    computed.
    """

    @property
    def expected_components(self) -> list[ComponentSpec]:
        return [ComponentSpec("vae", AutoencoderKL)]

    @property
    def expected_configs(self) -> list[ConfigSpec]:
        return [ConfigSpec("default_strength", 0.99)]

    @property
    def inputs(self) -> list[InputParam]:
        return _inputs(
            "processed_image",
            "processed_mask_image",
            strength=None,
            masked_content="original",
            latents=None,
            masked_image_latents=None,
            num_images_per_prompt=1,
            generator=None,
        )

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        return _outputs("image_latents", "masked_image_latents", "mask")

    @torch.no_grad()
    def __call__(self, components: ModularPipeline, state: PipelineState) -> tuple[ModularPipeline, PipelineState]:
        block_state = self.get_block_state(state)
        if block_state.strength is None:
            block_state.strength = components.config.default_strength
        check_options(strength=block_state.strength, masked_content=block_state.masked_content)
        vae, image = components.vae, block_state.processed_image
        results = range(len(image) * block_state.num_images_per_prompt)
        given = []
        for name in ("latents", "masked_image_latents"):
            sizes, channels = [tuple(image.shape[2:]) for _ in results], vae.config.latent_channels
            check_latents(name, block_state[name], sizes, channels, model_sizes(vae, None))
            given.append(select_latents(block_state[name], results, image.device))
        block_state.image_latents, block_state.masked_image_latents, block_state.mask = encode_pictures(
            vae,
            image,
            block_state.processed_mask_image,
            *given,
            block_state.strength,
            block_state.masked_content,
            block_state.generator,
            block_state.num_images_per_prompt,
        )
        self.set_block_state(state, block_state)
        return components, state


class MoebiusCategoryEncoderStep(MoebiusBlock):
    """Embeds the latent categories: background, which the result is to be, and foreground."""

    @property
    def expected_components(self) -> list[ComponentSpec]:
        return [ComponentSpec("lcg_embedder", LatentCategoriesEmbedder)]

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        return _outputs("background_embeds", "foreground_embeds")

    @torch.no_grad()
    def __call__(self, components: ModularPipeline, state: PipelineState) -> tuple[ModularPipeline, PipelineState]:
        block_state = self.get_block_state(state)
        category_embeds = embed_categories(components.lcg_embedder, 1, components._execution_device)
        block_state.foreground_embeds, block_state.background_embeds = category_embeds.chunk(2)
        self.set_block_state(state, block_state)
        return components, state


class MoebiusSetTimestepsStep(MoebiusBlock):
    """Sets the timesteps on a copy of the scheduler, and leaves out those that `strength` skips."""

    @property
    def expected_components(self) -> list[ComponentSpec]:
        return [ComponentSpec("scheduler", DDIMScheduler)]

    @property
    def expected_configs(self) -> list[ConfigSpec]:
        return [ConfigSpec("default_num_inference_steps", 20), ConfigSpec("default_strength", 0.99)]

    @property
    def inputs(self) -> list[InputParam]:
        return _inputs(num_inference_steps=None, strength=None, timesteps=None, sigmas=None)

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        return _outputs("scheduler", "timesteps")

    @torch.no_grad()
    def __call__(self, components: ModularPipeline, state: PipelineState) -> tuple[ModularPipeline, PipelineState]:
        block_state = self.get_block_state(state)
        for name in ("num_inference_steps", "strength"):
            if block_state[name] is None:
                block_state[name] = components.config[f"default_{name}"]
        block_state.scheduler = copy.deepcopy(components.scheduler)
        block_state.timesteps = set_timesteps(
            block_state.scheduler,
            block_state.num_inference_steps,
            block_state.strength,
            components._execution_device,
            block_state.timesteps,
            block_state.sigmas,
        )
        self.set_block_state(state, block_state)
        return components, state


class MoebiusPrepareLatentsStep(MoebiusBlock):
    """Prepares the latents to start from: those given, the noised latents of the photos, or pure noise."""

    @property
    def inputs(self) -> list[InputParam]:
        return _inputs(
            "scheduler",
            "timesteps",
            "masked_image_latents",
            "mask",
            image_latents=None,
            latents=None,
            noise_offset=0.0357,
            masked_content="original",
            generator=None,
        )

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        return _outputs("latents")

    @torch.no_grad()
    def __call__(self, components: ModularPipeline, state: PipelineState) -> tuple[ModularPipeline, PipelineState]:
        block_state = self.get_block_state(state)
        check_options(noise_offset=block_state.noise_offset)
        block_state.latents = prepare_latents(
            select_latents(block_state.latents, range(len(block_state.mask)), block_state.mask.device),
            block_state.image_latents,
            block_state.masked_image_latents,
            block_state.mask,
            block_state.scheduler,
            block_state.timesteps[:1],
            block_state.noise_offset,
            block_state.masked_content,
            block_state.generator,
        )
        self.set_block_state(state, block_state)
        return components, state


class MoebiusLoopBeforeDenoiser(MoebiusBlock):
    """Within the denoising loop: joins noisy latents, mask and masked-image latents. Sets `model_input`."""

    @property
    def inputs(self) -> list[InputParam]:
        return _inputs("scheduler", "latents", "mask", "masked_image_latents")

    @torch.no_grad()
    def __call__(
        self, components: ModularPipeline, block_state: BlockState, i: int, t: torch.Tensor
    ) -> tuple[ModularPipeline, BlockState]:
        block_state.model_input = prepare_model_input(
            block_state.scheduler, block_state.latents, t, block_state.mask, block_state.masked_image_latents
        )
        return components, block_state


class MoebiusLoopDenoiser(MoebiusBlock):
    """
    Within the denoising loop: predicts the noise for the background and, where the guider asks for it, for the
    foreground, and combines the two by the `guider`. Sets `noise_pred`.
    """

    @property
    def expected_components(self) -> list[ComponentSpec]:
        return [
            ComponentSpec(
                "guider",
                ClassifierFreeGuidance,
                config=FrozenDict({"guidance_scale": 2.5}),
                default_creation_method="from_config",
            ),
            ComponentSpec("unet", MoebiusUNet2DModel),
        ]

    @property
    def inputs(self) -> list[InputParam]:
        return _inputs("latents", "timesteps", "background_embeds", "foreground_embeds", attention_kwargs=None)

    @torch.no_grad()
    def __call__(
        self, components: ModularPipeline, block_state: BlockState, i: int, t: torch.Tensor
    ) -> tuple[ModularPipeline, BlockState]:
        guider = block_state.guider
        guider.set_state(step=i, num_inference_steps=len(block_state.timesteps), timestep=t)
        batch = (len(block_state.latents), -1, -1)
        embeds = block_state.background_embeds.expand(batch), block_state.foreground_embeds.expand(batch)
        branches = guider.prepare_inputs({"encoder_hidden_states": embeds})
        # The foreground goes first into the denoiser, as in `MoebiusInpaintPipeline`.
        category_embeds = torch.cat([branch.encoder_hidden_states for branch in reversed(branches)])
        predictions = predict_noise(
            components.unet, block_state.model_input, t, category_embeds, block_state.attention_kwargs
        )
        for branch, prediction in zip(reversed(branches), predictions):
            branch.noise_pred = prediction
        block_state.noise_pred = guider(branches).pred
        return components, block_state


class MoebiusLoopAfterDenoiser(MoebiusBlock):
    """Within the denoising loop: the step of the scheduler."""

    @property
    def inputs(self) -> list[InputParam]:
        return _inputs("scheduler", "latents", eta=0.0, generator=None)

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        return _outputs("latents")

    @torch.no_grad()
    def __call__(
        self, components: ModularPipeline, block_state: BlockState, i: int, t: torch.Tensor
    ) -> tuple[ModularPipeline, BlockState]:
        block_state.latents = scheduler_step(
            block_state.scheduler,
            block_state.noise_pred,
            t,
            block_state.latents,
            block_state.eta,
            block_state.generator,
        )
        return components, block_state


class MoebiusDenoiseStep(LoopSequentialPipelineBlocks):
    """The denoising loop."""

    model_name = "moebius"
    block_classes = [MoebiusLoopBeforeDenoiser, MoebiusLoopDenoiser, MoebiusLoopAfterDenoiser]
    block_names = ["before_denoiser", "denoiser", "after_denoiser"]

    @property
    def description(self) -> str:
        return "Denoises the latents over the timesteps; its three sub-blocks are what happens at each."

    @property
    def loop_inputs(self) -> list[InputParam]:
        return _inputs("timesteps", eta=0.0)

    @torch.no_grad()
    def __call__(self, components: ModularPipeline, state: PipelineState) -> tuple[ModularPipeline, PipelineState]:
        block_state = self.get_block_state(state)
        check_options(eta=block_state.eta)
        # A guider counts steps and may keep momentum: a run has its own, as it has its own scheduler.
        block_state.guider = copy.deepcopy(getattr(components, "guider", None))
        check_guider(block_state.guider)
        with self.progress_bar(total=len(block_state.timesteps)) as progress_bar:
            for i, t in enumerate(block_state.timesteps):
                components, block_state = self.loop_step(components, block_state, i=i, t=t)
                progress_bar.update()
        self.set_block_state(state, block_state)
        return components, state


def check_guider(guider: BaseGuidance | None) -> None:
    """Checks that a guider needs no more than the two predictions, which come from one call of the denoiser."""
    if guider is None:
        return
    is_plain = type(guider).prepare_models is BaseGuidance.prepare_models
    if not is_plain or set(guider._input_predictions) - {"pred_cond", "pred_uncond"}:
        raise ValueError(
            f"`guider` must need only the predictions for background and foreground, but {type(guider).__name__} "
            "changes the denoiser in between or needs more."
        )


class MoebiusDecodeStep(MoebiusBlock):
    """Decodes the latents and brings each result to the size of its region's box."""

    @property
    def expected_components(self) -> list[ComponentSpec]:
        return [ComponentSpec("vae", AutoencoderKL)]

    @property
    def inputs(self) -> list[InputParam]:
        return _inputs("latents", "regions", num_images_per_prompt=1, output_type="pil")

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        return _outputs("fills")

    @torch.no_grad()
    def __call__(self, components: ModularPipeline, state: PipelineState) -> tuple[ModularPipeline, PipelineState]:
        block_state = self.get_block_state(state)
        block_state.fills = []
        if block_state.output_type != "latent":
            decoded = decode_pictures(components.vae, block_state.latents)
            regions = [region for region in block_state.regions for _ in range(block_state.num_images_per_prompt)]
            block_state.fills = [region.fill(picture) for region, picture in zip(regions, decoded)]
        self.set_block_state(state, block_state)
        return components, state


class MoebiusDetailStep(MoebiusBlock):
    """Gives the results the texture of their photos; without this block they stay as the model made them."""

    @property
    def expected_configs(self) -> list[ConfigSpec]:
        return [ConfigSpec("default_detail", "enlarged")]

    @property
    def inputs(self) -> list[InputParam]:
        return _inputs("regions", "fills", num_images_per_prompt=1, detail="auto", generator=None)

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        return _outputs("fills")

    @torch.no_grad()
    def __call__(self, components: ModularPipeline, state: PipelineState) -> tuple[ModularPipeline, PipelineState]:
        block_state = self.get_block_state(state)
        detail = _mode(block_state.detail, components.config.default_detail)
        check_options(detail=detail)
        regions = [region for region in block_state.regions for _ in range(block_state.num_images_per_prompt)]
        generators = block_state.generator
        if not isinstance(generators, list):
            generators = [generators] * len(regions)
        block_state.fills = [
            add_detail(fill, region, detail, generator, components._execution_device)
            for fill, region, generator in zip(block_state.fills, regions, generators)
        ]
        self.set_block_state(state, block_state)
        return components, state


def _mode(value: str, default: str | None) -> str | None:
    return default if value == "auto" else None if value == "none" else value


def _check_form(components: ModularPipeline, paste: str, output_type: str) -> str | None:
    """Checks in which form results are to come, and returns how they are pasted."""
    paste = _mode(paste, components.config.default_paste)
    check_options(paste=paste, output_type=output_type)
    return paste


class MoebiusPasteStep(MoebiusBlock):
    """Pastes the results into their photos, and gives them the form that was asked for."""

    @property
    def expected_configs(self) -> list[ConfigSpec]:
        return [ConfigSpec("default_paste", "exact")]

    @property
    def inputs(self) -> list[InputParam]:
        return _inputs(
            "latents",
            "regions",
            "fills",
            num_images_per_prompt=1,
            paste="auto",
            color_compensation=False,
            output_type="pil",
        )

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        return _outputs("images")

    @torch.no_grad()
    def __call__(self, components: ModularPipeline, state: PipelineState) -> tuple[ModularPipeline, PipelineState]:
        block_state = self.get_block_state(state)
        paste = _check_form(components, block_state.paste, block_state.output_type)
        results = list(block_state.latents)
        if block_state.output_type != "latent":
            regions = [region for region in block_state.regions for _ in range(block_state.num_images_per_prompt)]
            pasted = [
                paste_fill(region.picture, fill, region.mask, region.box, paste, block_state.color_compensation)
                for region, fill in zip(regions, block_state.fills)
            ]
            results = [picture.render(block_state.output_type, block_state.latents.device) for picture in pasted]
        block_state.images = stack_results(results, block_state.output_type)
        self.set_block_state(state, block_state)
        return components, state


class MoebiusAutoBlocks(SequentialPipelineBlocks):
    """All that [`MoebiusInpaintPipeline`] does, for photos that work at one size."""

    model_name = "moebius"
    block_classes = [
        MoebiusInputStep,
        MoebiusVaeEncoderStep,
        MoebiusCategoryEncoderStep,
        MoebiusSetTimestepsStep,
        MoebiusPrepareLatentsStep,
        MoebiusDenoiseStep,
        MoebiusDecodeStep,
        MoebiusDetailStep,
        MoebiusPasteStep,
    ]
    block_names = [
        "input",
        "vae_encoder",
        "category_encoder",
        "set_timesteps",
        "prepare_latents",
        "denoise",
        "decode",
        "detail",
        "paste",
    ]
    _workflow_map = {"inpainting": {"image": True, "mask_image": True}}

    @property
    def description(self) -> str:
        return "Fills the marked part of photos with Moebius: encode, denoise, decode, add detail, paste back."

    @property
    def outputs(self) -> list[OutputParam]:
        return _outputs("images")

    @torch.no_grad()
    def __call__(self, components: ModularPipeline, state: PipelineState) -> tuple[ModularPipeline, PipelineState]:
        if "paste" in self.sub_blocks:  # What only the last block takes is checked before the first computes.
            _check_form(components, state.get("paste"), state.get("output_type"))
        if "detail" in self.sub_blocks:
            check_options(detail=_mode(state.get("detail"), components.config.default_detail))
        return super().__call__(components, state)
