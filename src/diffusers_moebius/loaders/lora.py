"""LoRA adapters of the denoiser: loading, weighing, fusing and saving them, as the pipelines of diffusers do it."""

import json
import os
from collections.abc import Iterator, Mapping
from itertools import count
from typing import Any

import torch
from diffusers.loaders.lora_base import (
    LORA_ADAPTER_METADATA_KEY,
    LORA_WEIGHT_NAME,
    LORA_WEIGHT_NAME_SAFE,
    LoraBaseMixin,
)
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import USE_PEFT_BACKEND, get_peft_kwargs, logging
from safetensors import safe_open

from ..models.fusion import adapter_layers, check_adapters_fused
from .hub import HUB_ARGUMENTS, ModelSource
from .release_checkpoint import read_state_dict

logger = logging.get_logger(__name__)

LORA_SOURCE = "pretrained_model_name_or_path_or_dict"
# Called without an input, as its filters are read: a LoRA layer cannot stand in its place.
LAYER_WITHOUT_INPUT = "pos_conv"


def find_lora_file(location: str, weight_name: str | None, subfolder: str | None, **hub_kwargs) -> str:
    """The local path of the adapter in a folder or a repository, downloaded if need be."""
    folder = f"{str(subfolder).strip('/')}/" if subfolder else ""
    names = [
        f"{folder}{name}" for name in ([weight_name] if weight_name else [LORA_WEIGHT_NAME_SAFE, LORA_WEIGHT_NAME])
    ]
    source = ModelSource(LORA_SOURCE, location, names, **hub_kwargs)
    there = sorted(name for name in source.files if name.endswith(".safetensors"))
    found = [name for name in names if name in source.files][:1]
    if not found and weight_name is None:
        found = [name for name in there if name.rpartition("/")[0] == folder.rstrip("/")]
    if len(found) == 1:
        return source.path(found[0])
    if source.is_cache:
        raise source.not_cached_error()
    if not found and weight_name is None:
        raise ValueError(f"`{LORA_SOURCE}` must hold {LORA_WEIGHT_NAME_SAFE}, but {location}/{folder} has no adapter.")
    raise ValueError(
        f"`weight_name` must be one of the files of {location}, but is {weight_name!r}; there are"
        f" {', '.join(there) or 'no safetensors'}."
    )


def read_lora_file(path: str) -> tuple[dict[str, torch.Tensor], dict | None]:
    """The weights of an adapter and, of a safetensors file, the metadata that were saved with them."""
    try:
        state_dict, metadata = read_state_dict(path), None
        if path.endswith(".safetensors"):
            with safe_open(path, framework="pt") as file:
                metadata = (file.metadata() or {}).get(LORA_ADAPTER_METADATA_KEY)
        return state_dict, json.loads(metadata) if metadata else None
    except ValueError as error:
        raise ValueError(
            f"`{LORA_SOURCE}` must be weights of an adapter, but {path} cannot be read: {error}"
        ) from error


def lora_metadata_for(
    unet: ModelMixin, state_dict: dict[str, torch.Tensor], metadata: dict | None, adapter_name: str
) -> dict:
    """
    The settings of an adapter that fits the model; loaded into a copy of it without weights, to see that it does.

    Args:
        unet (`ModelMixin`): The model.
        state_dict (`dict`): The adapter, its names without the prefix of the model.
        metadata (`dict`, *optional*): Arguments of `LoraConfig`; inferred if not given, alpha being the rank.
        adapter_name (`str`): Name of the adapter.

    Returns:
        `dict`: Arguments of `LoraConfig`.

    Raises:
        ValueError: If names, shapes or settings do not fit.
    """
    from peft import LoraConfig, inject_adapter_in_model
    from peft.utils import get_peft_model_state_dict

    does_not_fit = f"`{LORA_SOURCE}` must hold LoRA weights for {type(unet).__name__}, but"

    def refuse(names: set[str], reason: str) -> None:
        if names:
            others = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise ValueError(f"{does_not_fit} `{min(names)}`{others} {reason}.")

    with torch.device("meta"):
        copy = type(unet).from_config(unet.config)
    layers = {name: name.rpartition(".lora_")[0] for name in state_dict}
    modules = dict(copy.named_modules())
    refuse({name for name, layer in layers.items() if not layer or layer not in modules}, "belongs to no layer of it")
    refuse(
        {name for name, layer in layers.items() if layer.endswith(LAYER_WITHOUT_INPUT)},
        "is for position filters, which take no LoRA",
    )
    try:
        if metadata is None:
            # The pattern is anchored, so that it holds for no other layer whose name ends likewise.
            ranks = {f"^{name}": weight.shape[1] for name, weight in state_dict.items() if "lora_B.weight" in name}
            metadata = get_peft_kwargs(ranks, network_alpha_dict=None, peft_state_dict=state_dict)
        # Other initial values than zero would change the weights of the model itself.
        settings = {"target_modules": sorted(set(layers.values()))} | metadata
        settings |= {"init_lora_weights": True, "base_model_name_or_path": None}
        config = LoraConfig.from_peft_type(**settings)
        inject_adapter_in_model(config, copy, adapter_name, low_cpu_mem_usage=True, state_dict=state_dict)
    except Exception as error:  # peft raises what its many kinds of adapters raise
        raise ValueError(f"{does_not_fit} they cannot be added: {error}") from error
    expected = get_peft_model_state_dict(copy, adapter_name=adapter_name)
    refuse(state_dict.keys() - expected.keys(), "is not part of such an adapter")
    refuse(expected.keys() - state_dict.keys(), "is missing")
    for name, weight in state_dict.items():
        if weight.shape != expected[name].shape:
            refuse({name}, f"has the shape {list(weight.shape)} instead of {list(expected[name].shape)}")
    return config.to_dict()


def block_weights(unet: ModelMixin, weights: Mapping[str, Any]) -> dict[str, float]:
    """
    The weight of each LoRA layer, from weights by blocks as diffusers takes them for its U-Nets.

    Args:
        unet (`ModelMixin`): The model.
        weights (`Mapping`): Such as `{"down": 0.5, "up": {"block_0": 0.0, "block_1": [1.0, 0]}}`, where a list has one
            weight for each transformer of the block, or by parts of layers' names; 1 where nothing is said.

    Returns:
        `dict[str, float]`: The weights by the names of all LoRA layers.
    """

    def flatten(value: Any, name: str) -> Iterator[tuple[str, float]]:
        if isinstance(value, Mapping):
            for key, inner in value.items():
                yield from flatten(inner, f"{name}{key.removeprefix('block_')}.")
        elif isinstance(value, list):
            for i, inner in enumerate(value):
                yield from flatten(inner, f"{name}attentions.{i}.")
        else:
            yield name, value

    names = [f"{name}." for name, _ in unet.named_modules()]
    by_part = {}
    for key, value in weights.items():
        for part, weight in flatten(value, f"{key}_blocks." if key in ("down", "up") else key):
            if not any(part in name for name in names):
                raise ValueError(f"`adapter_weights` has a weight for {key!r}, but the U-Net has no layer {part!r}.")
            by_part[part] = weight
    return {
        layer: next((weight for part, weight in by_part.items() if part in f"{layer}."), 1.0)
        for layer in sorted(adapter_layers(unet), key=len, reverse=True)  # diffusers takes the first that fits
    }


def without_adapters(unet: ModelMixin) -> ModelMixin:
    """A model with the same weights, also those into which adapters have been fused, in plain layers."""
    with torch.device("meta"):
        plain = type(unet).from_config(unet.config)
    weights = {name.replace(".base_layer.", "."): weight for name, weight in unet.state_dict().items()}
    plain.load_state_dict({name: weight for name, weight in weights.items() if ".lora_" not in name}, assign=True)
    return plain


class MoebiusLoraLoaderMixin(LoraBaseMixin):
    """
    LoRA adapters of the `unet` of a Moebius pipeline; to stand before the class that loads and saves it.

    Adapters act in every λ processor and in train mode. While some are fused the others do not act, and none can be
    added, weighed or deleted: undo it with [`unfuse_lora`], or keep it for good with [`unload_lora_weights`]. Changing
    adapters while another thread runs the pipeline is not safe.
    """

    _lora_loadable_modules = ["unet"]
    unet_name = "unet"

    @classmethod
    def lora_state_dict(
        cls,
        pretrained_model_name_or_path_or_dict: str | os.PathLike | Mapping[str, torch.Tensor],
        return_lora_metadata: bool = False,
        **kwargs,
    ) -> dict[str, torch.Tensor] | tuple[dict[str, torch.Tensor], dict | None]:
        """
        Reads the weights of an adapter, without adding them to a model; arguments as in [`load_lora_weights`].

        Args:
            return_lora_metadata (`bool`, defaults to `False`): Also return the arguments of `LoraConfig` that the file
                holds, or `None`.

        Returns:
            `dict[str, torch.Tensor]`, or a tuple of it and the metadata.
        """
        weight_name, subfolder = kwargs.pop("weight_name", None), kwargs.pop("subfolder", None)
        if unknown := sorted(set(kwargs) - {*HUB_ARGUMENTS}):
            raise ValueError(f"`{unknown[0]}` is not an argument; allowed are {', '.join(HUB_ARGUMENTS)}.")
        source, metadata = pretrained_model_name_or_path_or_dict, None
        if isinstance(source, Mapping):
            state_dict = dict(source)
        else:
            if not os.path.isfile(source):
                source = find_lora_file(os.fspath(source), weight_name, subfolder, **kwargs)
            state_dict, metadata = read_lora_file(os.fspath(source))
        return (state_dict, metadata) if return_lora_metadata else state_dict

    def load_lora_weights(
        self,
        pretrained_model_name_or_path_or_dict: str | os.PathLike | Mapping[str, torch.Tensor],
        adapter_name: str | None = None,
        hotswap: bool = False,
        **kwargs,
    ) -> None:
        """
        Adds a LoRA adapter to the U-Net and makes it the active one; one that does not fit changes nothing.

        Args:
            pretrained_model_name_or_path_or_dict (`str`, `os.PathLike` or `Mapping`): A folder or a repository on the
                hub with `pytorch_lora_weights.safetensors` (or `.bin`, or one other safetensors file), such a file, or
                the weights by name. Names are those of peft, with or without `unet.` before them; without the metadata
                that a safetensors file carries alpha is the rank.
            adapter_name (`str`, *optional*): Name of the adapter, by default `default_0`, `default_1` and so on.
            hotswap (`bool`, defaults to `False`): Puts the weights in the place of those of the adapter of this name;
                see [`~loaders.PeftAdapterMixin.load_lora_adapter`].
            kwargs: `weight_name` (the file, if the folder has several), `subfolder`, `metadata` (arguments of
                `LoraConfig`, instead of the file's), and of the hub `revision`, `token`, `cache_dir`,
                `local_files_only`, `force_download` and `proxies`.

        Raises:
            ValueError: If the adapter does not fit to the U-Net, its name is taken, the U-Net has been prepared for
                inference, or adapters are fused.
            ImportError: If peft is not installed.
        """
        if not USE_PEFT_BACKEND:
            raise ImportError("LoRA adapters need the package peft: `pip install peft`, or the extra `lora`.")
        self._check_not_fused("load_lora_weights")
        names = getattr(self.unet, "peft_config", {})
        if adapter_name is None:
            adapter_name = next(name for number in count() if (name := f"default_{number}") not in names)
        if "." in adapter_name:
            raise ValueError(f"`adapter_name` must have no dot, but is {adapter_name!r}.")
        if (adapter_name in names) != hotswap:
            allowed = f"one of {', '.join(names) or 'none'} for `hotswap`" if hotswap else "a new one"
            raise ValueError(f"`adapter_name` must be {allowed}, but is {adapter_name!r}.")

        given_metadata = kwargs.pop("metadata", None)
        kwargs.pop("low_cpu_mem_usage", None)  # it is always low
        state_dict, metadata = self.lora_state_dict(
            pretrained_model_name_or_path_or_dict, return_lora_metadata=True, **kwargs
        )
        if not any(".lora_" in name for name in state_dict):
            logger.warning(f"`{LORA_SOURCE}` holds no LoRA weights for {type(self.unet).__name__}: nothing is added.")
            return
        prefix = f"{self.unet_name}."
        state_dict = {name.removeprefix(prefix): weight for name, weight in state_dict.items()}
        metadata = given_metadata or metadata
        if metadata is not None:
            metadata = {name.removeprefix(prefix): value for name, value in metadata.items()}
        self.unet.load_lora_adapter(
            state_dict,
            prefix=None,
            adapter_name=adapter_name,
            metadata=lora_metadata_for(self.unet, state_dict, metadata, adapter_name),
            hotswap=hotswap,
            low_cpu_mem_usage=True,
            _pipeline=self,
        )
        for layer in adapter_layers(self.unet).values():
            layer.train(layer.get_base_layer().training)  # or dropout would act in eval mode

    @classmethod
    def save_lora_weights(
        cls,
        save_directory: str | os.PathLike,
        unet_lora_layers: Mapping[str, torch.Tensor] | torch.nn.Module | None = None,
        is_main_process: bool = True,
        weight_name: str | None = None,
        save_function=None,
        safe_serialization: bool = True,
        unet_lora_adapter_metadata: dict | None = None,
    ) -> None:
        """
        Writes an adapter as `pytorch_lora_weights.safetensors`.

        Args:
            save_directory (`str` or `os.PathLike`): The folder, created if need be.
            unet_lora_layers (`Mapping[str, torch.Tensor]`): The weights, as `peft.get_peft_model_state_dict(pipe.unet,
                adapter_name=...)` returns them.
            is_main_process (`bool`, defaults to `True`): As in diffusers, without effect.
            weight_name (`str`, *optional*): Another name for the file.
            save_function (`Callable`, *optional*): Called with the weights and the file's path to write it.
            safe_serialization (`bool`, defaults to `True`): If not, a pickle is written, which holds no metadata.
            unet_lora_adapter_metadata (`dict`, *optional*): Arguments of `LoraConfig` to store with the weights, as
                `pipe.unet.peft_config[adapter_name].to_dict()` returns them. Without them an alpha that is not the
                rank is lost.
        """
        if not unet_lora_layers:
            raise ValueError(
                "`unet_lora_layers` must be the weights of an adapter, as `peft.get_peft_model_state_dict(pipe.unet,"
                f" adapter_name=...)` returns them, but is {unet_lora_layers!r}."
            )
        if unet_lora_adapter_metadata and not safe_serialization:
            raise ValueError("`unet_lora_adapter_metadata` needs `safe_serialization`: a pickle holds weights only.")
        if os.path.isfile(save_directory):
            raise ValueError(f"`save_directory` must be a folder, but {save_directory} is a file.")
        if isinstance(unet_lora_layers, torch.nn.Module):
            unet_lora_layers = unet_lora_layers.state_dict()
        cls._save_lora_weights(  # as all mixins of diffusers do; there is no public function for it
            save_directory=save_directory,
            lora_layers={cls.unet_name: {name: weight.contiguous() for name, weight in unet_lora_layers.items()}},
            lora_metadata={cls.unet_name: unet_lora_adapter_metadata},
            is_main_process=is_main_process,
            weight_name=weight_name,
            save_function=save_function,
            safe_serialization=safe_serialization,
        )

    def set_adapters(
        self,
        adapter_names: list[str] | str,
        adapter_weights: float | dict | list[float] | list[dict] | None = None,
    ) -> None:
        """
        Chooses the active adapters and their weights; their effects add up.

        Args:
            adapter_names (`list[str]` or `str`): The adapters; the others become inactive.
            adapter_weights (`float`, `dict` or a list of them, *optional*): One weight for all or one each, 1 if not
                given. A dict has weights by blocks, as in diffusers: `{"unet": {"down": 0.5, "up": {"block_1": 0}}}`.
        """
        self._check_not_fused("set_adapters")
        is_list = isinstance(adapter_weights, list)
        by_layer = [
            {**weight, self.unet_name: block_weights(self.unet, weight[self.unet_name])}
            if isinstance(weight, Mapping) and isinstance(weight.get(self.unet_name), Mapping)
            else weight
            for weight in (adapter_weights if is_list else [adapter_weights])
        ]
        super().set_adapters(adapter_names, by_layer if is_list else by_layer[0])

    def fuse_lora(
        self,
        components: list[str] = ["unet"],  # noqa: B006, as in every diffusers pipeline
        lora_scale: float = 1.0,
        safe_fusing: bool = False,
        adapter_names: list[str] | None = None,
        **kwargs,
    ) -> None:
        """
        Adds adapters to the weights of their layers, which makes the U-Net as fast as without them.

        Args:
            components (`list[str]`, defaults to `["unet"]`): As in diffusers.
            lora_scale (`float`, defaults to 1.0): Multiplies the adapters' weights until they are unfused.
            safe_fusing (`bool`, defaults to `False`): Refuse if that makes weights that are not finite.
            adapter_names (`list[str]`, *optional*): The adapters; the active ones if not given.
            kwargs: As in diffusers.
        """
        self._check_not_fused("fuse_lora")
        loaded = getattr(self.unet, "peft_config", {})
        if not loaded:
            raise ValueError("`fuse_lora` needs adapters: load them with `load_lora_weights` first.")
        if unknown := set(adapter_names or ()) - set(loaded):
            raise ValueError(f"`adapter_names` must be among {', '.join(loaded)}, but holds {sorted(unknown)}.")
        layers = adapter_layers(self.unet).values()
        if any(layer.disable_adapters for layer in layers):
            raise ValueError("`fuse_lora` needs adapters that are not disabled: call `enable_lora` first.")
        for layer in layers:
            layer.scaling_before_fusing = dict(layer.scaling)
        try:
            super().fuse_lora(components, lora_scale, safe_fusing, adapter_names, **kwargs)
        except Exception:
            self.unfuse_lora(components)
            raise

    def unfuse_lora(self, components: list[str] = ["unet"], **kwargs) -> None:  # noqa: B006
        """
        Undoes [`fuse_lora`] but for rounding; the adapters are active again with the weights that they had.

        Args:
            components (`list[str]`, defaults to `["unet"]`): As in diffusers.
            kwargs: As in diffusers.
        """
        super().unfuse_lora(components, **kwargs)
        for layer in adapter_layers(self.unet).values():
            layer.scaling.update(layer.__dict__.pop("scaling_before_fusing", {}))

    def unload_lora_weights(self) -> None:
        """Removes all adapters; those that are fused stay in the weights for good."""
        if hasattr(self.unet, "peft_config"):  # without adapters there is nothing to do, nor need for peft
            super().unload_lora_weights()

    def disable_lora(self) -> None:
        """Turns the adapters off, after unfusing them if need be, until [`enable_lora`] is called."""
        if any(layer.merged for layer in adapter_layers(self.unet).values()):
            self.unfuse_lora()  # peft would do it within the next call, of which there may be several at once
        super().disable_lora()

    def delete_adapters(self, adapter_names: list[str] | str) -> None:
        """
        Removes adapters.

        Args:
            adapter_names (`list[str]` or `str`): Their names.
        """
        self._check_not_fused("delete_adapters")
        adapter_names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        names = list(getattr(self.unet, "peft_config", {}))
        unknown = sorted(set(adapter_names) - set(names))
        if unknown:
            raise ValueError(f"`adapter_names` must be among {', '.join(names) or 'none'}, but holds {unknown}.")
        if set(adapter_names) == set(names):
            self.unload_lora_weights()  # leaves no empty LoRA layers behind
        else:
            super().delete_adapters(adapter_names)

    def save_pretrained(self, save_directory: str | os.PathLike, *args, **kwargs) -> None:
        """
        As [`MoebiusLoaderMixin.save_pretrained`]; fused adapters are saved within the weights.

        Raises:
            ValueError: If adapters are active and not fused.
        """
        if not adapter_layers(self.unet):
            return super().save_pretrained(save_directory, *args, **kwargs)
        check_adapters_fused(self.unet)
        plain = type(self).from_pipe(self, unet=without_adapters(self.unet))
        return plain.save_pretrained(save_directory, *args, **kwargs)

    def _check_not_fused(self, method: str) -> None:
        if getattr(self.unet, "is_fused", False):
            raise ValueError(
                f"`{method}` needs a U-Net that has not been prepared for inference: load the pipeline again, then its"
                " adapters, call `fuse_lora`, and prepare it last."
            )
        if any(layer.merged for layer in adapter_layers(self.unet).values()):
            raise ValueError(
                f"`{method}` cannot be called while adapters are fused: call `unfuse_lora` first, or"
                " `unload_lora_weights` to keep them in the weights for good."
            )
