"""LoRA adapters in training: which layers get one, and checkpoints that hold nothing else."""

import argparse
from pathlib import Path

from accelerate import Accelerator
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn

# Projections of the attention layers, also the 1x1 convolutions around them, and of the feed-forward layers.
TARGET_MODULES = (
    *("to_q", "to_k", "to_v", "proj_in", "proj_out"),  # of both models
    *("inverted_conv.conv", "point_conv.conv"),  # Mix-FFN
    *("q_proj", "k_proj", "v_proj", "g_proj", "o_proj"),  # gated linear attention
    *("to_out.0", "net.0.proj", "net.2"),  # softmax attention and GEGLU
)
CHECKPOINT_FILE = "adapter.safetensors"


def add_lora_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("LoRA").add_argument
    add("--rank", type=int, help="of the two matrices beside each layer; default: no LoRA, the whole U-Net is trained")
    add("--lora_alpha", type=float, help="their product is scaled by alpha / rank; default: the rank")
    add("--lora_dropout", type=float, default=0.0, help="share of a layer's input that its adapter does not see")
    add(
        "--target_modules",
        nargs="+",
        metavar="NAME",
        help="layers whose names end so; default: all projections of attention and feed-forward layers",
    )


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
            save_file(_adapter_weights(unet), Path(folder) / CHECKPOINT_FILE)

    def load_state(models, folder):
        models[:] = filter(is_other, models)
        set_peft_model_state_dict(unet, load_file(Path(folder) / CHECKPOINT_FILE))

    accelerator.register_save_state_pre_hook(save_state)
    accelerator.register_load_state_pre_hook(load_state)


def has_adapter(unet: nn.Module) -> bool:
    """Whether a U-Net has one."""
    return bool(getattr(unet, "peft_config", None))


def _adapter_weights(unet: nn.Module) -> dict:
    return {name: weight.contiguous() for name, weight in get_peft_model_state_dict(unet).items()}


def save_adapter(pipeline, folder: Path) -> None:
    """Writes the adapter of a pipeline's U-Net as diffusers' pipelines load it."""
    metadata = pipeline.unet.peft_config["default"].to_dict()
    pipeline.save_lora_weights(folder, _adapter_weights(pipeline.unet), unet_lora_adapter_metadata=metadata)
