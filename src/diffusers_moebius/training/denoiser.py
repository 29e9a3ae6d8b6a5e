"""U-Net and LCG embedder as the one module that is trained, whole or by a LoRA adapter."""

import argparse
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers import DDIMScheduler
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn

from ..models.latent_categories import LatentCategoriesEmbedder
from ..pipelines.latents import decode_latents
from ..pipelines.pipeline_moebius_inpaint import MoebiusInpaintPipeline
from .objective import clean_of

# Projections of the attention layers, also the 1x1 convolutions around them, and of the feed-forward layers.
TARGET_MODULES = (
    *("to_q", "to_k", "to_v", "proj_in", "proj_out"),  # of both models
    *("inverted_conv.conv", "point_conv.conv"),  # Mix-FFN
    *("q_proj", "k_proj", "v_proj", "g_proj", "o_proj"),  # gated linear attention
    *("to_out.0", "net.0.proj", "net.2"),  # softmax attention and GEGLU
)
CHECKPOINT_FILE = "adapter.safetensors"


class ConditionedDenoiser(nn.Module):
    """
    U-Net and LCG embedder as one module, so that both are wrapped, averaged and saved together.

    Args:
        unet ([`MoebiusUNet2DModel`] or [`PixelHackerUNet2DModel`]): The denoiser.
        lcg_embedder ([`LatentCategoriesEmbedder`]): Embeds the categories.
        vae (`AutoencoderKL` or `AutoencoderTiny`, *optional*): Decodes what is predicted, so that a loss can compare
            pictures.
        noise_schedule (`DDIMScheduler`, *optional*): The noise schedule; needed to decode.
    """

    def __init__(
        self,
        unet: nn.Module,
        lcg_embedder: LatentCategoriesEmbedder,
        vae: nn.Module | None = None,
        noise_schedule: DDIMScheduler | None = None,
    ):
        super().__init__()
        self.unet, self.lcg_embedder, self.vae, self.noise_schedule = unet, lcg_embedder, vae, noise_schedule

    def forward(self, sample: torch.Tensor, timesteps: torch.Tensor, category_ids: torch.Tensor, **kwargs):
        """
        Returns the U-Net's output for category ids `[B, tokens]`; `kwargs` are its own.

        With `vae` the output has `pictures` `[B, 3, H, W]`, the decoded clean latents that it implies.
        """
        output = self.unet(sample, timesteps, self.lcg_embedder(category_ids).embeds, **kwargs)
        if self.vae is not None:
            noisy = sample[:, : output.sample.shape[1]]
            clean = clean_of(output.sample, noisy, timesteps, self.noise_schedule)
            output["pictures"] = decode_latents(self.vae, clean)
        return output


def prepare_denoiser(
    args: argparse.Namespace, pipeline: MoebiusInpaintPipeline, accelerator: Accelerator, decodes: bool = False
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
    pipeline.vae.eval().requires_grad_(False).to(accelerator.device)
    decoder = (pipeline.vae, DDIMScheduler.from_config(pipeline.scheduler.config)) if decodes else ()
    return ConditionedDenoiser(pipeline.unet, pipeline.lcg_embedder, *decoder)


def find_target_modules(unet: nn.Module, names: list[str] | None) -> list[str]:
    """The names, of those given or else of the default ones, in which names of layers of the model end."""
    layers, targets = dict(unet.named_modules()), []
    for name in names or TARGET_MODULES:
        found = [path for path in layers if f".{path}".endswith(f".{name}")]
        for path in found:
            # Neither grouped convolutions nor position filters can have an adapter that can be fused.
            if not isinstance(layers[path], nn.Linear | nn.Conv2d) or getattr(layers[path], "groups", 1) > 1:
                raise ValueError(
                    f"`--target_modules` must name linear layers and ungrouped 2-D convolutions, but {name} is also"
                    f" {path}, a {type(layers[path]).__name__}."
                )
        if names and not found:
            raise ValueError(f"`--target_modules` must name layers of {type(unet).__name__}, but {name} is none.")
        targets += [name] if found else []
    return targets


def add_adapter(args: argparse.Namespace, unet: nn.Module, accelerator: Accelerator) -> None:
    """
    Freezes a U-Net, puts an adapter beside its layers, and makes checkpoints hold that instead of the whole.

    What they hold are the weights that it learns, which are not those that `--use_ema` averages.
    """
    unet.requires_grad_(False)
    config = LoraConfig(
        r=args.rank,
        lora_alpha=args.rank if args.lora_alpha is None else args.lora_alpha,
        lora_dropout=args.lora_dropout,
        target_modules=find_target_modules(unet, args.target_modules),
        init_lora_weights="gaussian",
    )
    unet.add_adapter(config)

    def is_other(model: nn.Module) -> bool:
        return getattr(accelerator.unwrap_model(model), "unet", None) is not unet

    def save_state(models, weights, folder):
        weights[:] = [state for model, state in zip(models, weights) if is_other(model)]
        if accelerator.is_main_process:
            save_file(adapter_weights(unet), Path(folder) / CHECKPOINT_FILE)

    def load_state(models, folder):
        models[:] = filter(is_other, models)
        set_peft_model_state_dict(unet, load_file(Path(folder) / CHECKPOINT_FILE))

    accelerator.register_save_state_pre_hook(save_state)
    accelerator.register_load_state_pre_hook(load_state)


def has_adapter(unet: nn.Module) -> bool:
    """Whether a U-Net has one."""
    return bool(getattr(unet, "peft_config", None))


def adapter_weights(unet: nn.Module) -> dict[str, torch.Tensor]:
    """The weights of a U-Net's adapter by name, as PEFT has them."""
    return {name: weight.contiguous() for name, weight in get_peft_model_state_dict(unet).items()}
