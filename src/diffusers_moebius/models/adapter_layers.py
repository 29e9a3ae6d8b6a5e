"""The layers that peft puts in the place of others when a LoRA adapter is loaded."""

import sys

from torch import nn


def adapter_layers(model: nn.Module | None) -> dict[str, nn.Module]:
    """The layers of a model (if there is one) that peft has put in the place of others, by name."""
    tuners = sys.modules.get("peft.tuners.tuners_utils")
    if model is None or tuners is None:  # who has adapters has imported peft
        return {}
    return {name: module for name, module in model.named_modules() if isinstance(module, tuners.BaseTunerLayer)}


def check_adapters_fused(model: nn.Module) -> None:
    """Raises a `ValueError` if LoRA adapters act that have not been fused into their layers."""
    for name, layer in adapter_layers(model).items():
        acts = any(layer.scaling.get(adapter) for adapter in layer.active_adapters)
        if acts and not layer.disable_adapters and not layer.merged:
            raise ValueError(
                f"LoRA adapters are active on `{name}` and not fused: call `fuse_lora()` or `unload_lora_weights()`"
                " first."
            )


def remove_fused_adapters(model: nn.Module) -> None:
    """Puts the layers themselves in the place of LoRA layers that have been fused into them."""
    check_adapters_fused(model)
    for name, layer in adapter_layers(model).items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer.get_base_layer())
    if hasattr(model, "peft_config"):
        model.unload_lora()
