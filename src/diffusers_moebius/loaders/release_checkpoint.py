"""
The layout in which Moebius and its teacher PixelHacker were published: one state dict `diffusion_pytorch_model.bin` a
checkpoint, without configs.

A state dict holds `embedding_layer.weight` and `diff_model.<name>`; behind the prefix the names are those of our
models. Shapes tell nearly the whole configuration, the rest comes from a config in the release's names.
"""

import inspect
import json
import math
import os
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import yaml
from diffusers import DDIMScheduler, UNet2DConditionModel
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME

from ..models.latent_categories import LatentCategoriesEmbedder
from ..models.unet_2d_moebius import MoebiusUNet2DModel
from ..models.unet_2d_pixelhacker import PixelHackerUNet2DModel

RELEASE_VAE_REPOSITORY = "hustvl/PixelHacker"
DEFAULT_CHECKPOINT = "ft_places2"
PORTRAIT_CHECKPOINTS = ("ft_celebahq", "ft_ffhq")

UNET_PREFIX = "diff_model."
EMBEDDER_PREFIX = "embedding_layer."

# Config names of the release that differ from ours. `attention_head_dim` is the number of heads there.
RENAMED_CONFIG = {"attention_head_dim": "num_attention_heads", "mix_mlp_ratio": "mix_ffn_ratio"}
# Says nothing that the names and shapes of the weights do not say.
IGNORED_CONFIG = (
    "down_block_types",
    "mid_block_type",
    "projection_class_embeddings_input_dim",
    "up_block_types",
    "use_lambda_cross_attn",
    "use_local_self_attn",
)
# The arguments of our student with their defaults, which are the published model; the teacher's are among them.
DEFAULTS = inspect.signature(MoebiusUNet2DModel.__init__).parameters


def default_guidance_scale(checkpoint: str) -> float:
    """The guidance scale at which a published checkpoint is best: 2.0 for the two portrait ones, else 2.5 (paper)."""
    return 2.0 if checkpoint in PORTRAIT_CHECKPOINTS else 2.5


def make_release_scheduler() -> DDIMScheduler:
    """The scheduler of the release: DDIM, whose 20 steps at strength 0.99 are the 19 timesteps 900, 850, …, 0."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        steps_offset=0,
        timestep_spacing="leading",
    )


def weight_names(variant: str | None = None, use_safetensors: bool | None = None) -> list[str]:
    """
    The file names under which a model's weights may lie, best first.

    Args:
        variant (`str`, *optional*): As in `diffusion_pytorch_model.<variant>.bin`.
        use_safetensors (`bool`, *optional*): Only safetensors, or only pickles; both if not given.
    """
    names = []
    if use_safetensors is not False:
        names.append(SAFETENSORS_WEIGHTS_NAME)
    if not use_safetensors:
        names.append(WEIGHTS_NAME)
    if variant is None:
        return names
    return [f"{stem}.{variant}.{suffix}" for stem, suffix in (name.rsplit(".", 1) for name in names)]


def find_release_weights(source: Any, folder: str, variant: str | None, use_safetensors: bool | None) -> str:
    """The name of a checkpoint's file among those of a `ModelSource`, in the folder that `checkpoint` names."""
    names = [f"{folder}/{name}" for name in weight_names(variant, use_safetensors)]
    # A folder with a config is a component in the layout of diffusers, such as the autoencoder.
    is_component = f"{folder}/config.json" in source.files
    for name in names:
        if name in source.files and not is_component:
            return name
    if source.is_cache:
        raise source.not_cached_error()
    folders = {
        parent
        for parent, _, name in (file.rpartition("/") for file in source.files)
        if name in weight_names() and f"{parent}/config.json" not in source.files
    }
    if folder in folders:
        raise ValueError(
            f"`variant` and `use_safetensors` ask for {' or '.join(names)}, which {source.location} does not have."
        )
    if folders - {""}:
        raise ValueError(
            f"`checkpoint` must be one of {', '.join(sorted(folders - {''}))} for {source.location}, but is"
            f" {folder!r}."
        )
    raise ValueError(
        f"`{source.argument}` must hold model_index.json or folders with checkpoints of the release, but"
        f" {source.location} does not."
    )


def read_state_dict(path: str | os.PathLike, disable_mmap: bool = False) -> dict[str, torch.Tensor]:
    """
    Reads a checkpoint file without running code that it may hold, and maps it into memory where possible.

    Args:
        path (`str` or `os.PathLike`): A `.safetensors` file, or a pickle, of which only weights are read.
        disable_mmap (`bool`, defaults to `False`): Read the whole file at once.

    Returns:
        `dict[str, torch.Tensor]`: The tensors by their names.

    Raises:
        ValueError: If the file is damaged or holds anything but a dict of tensors.
    """
    path = Path(path)
    try:
        if path.suffix == ".safetensors":
            state_dict = safetensors.torch.load_file(path)
        else:
            mmap = not disable_mmap and zipfile.is_zipfile(path)  # pickles from before torch 1.6 are no archives
            state_dict = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except OSError:
        raise
    except pickle.UnpicklingError as error:
        # The text of the error advises to run the pickle after all.
        raise ValueError(f"{path} is no checkpoint, or holds more than tensors; only weights are read.") from error
    except Exception as error:  # a damaged file makes the readers fail in many ways
        raise ValueError(f"{path} is no readable checkpoint, it may be truncated: {error}") from error
    if not isinstance(state_dict, dict) or not all(
        isinstance(name, str) and torch.is_tensor(tensor) for name, tensor in state_dict.items()
    ):
        raise ValueError(f"{path} is no checkpoint of the release: it does not hold a dict of tensors.")
    return dict(state_dict)


def read_release_config(config: Mapping[str, Any] | str | os.PathLike | None) -> dict[str, Any]:
    """
    Translates a config in the release's names into arguments of our models.

    Args:
        config (`Mapping`, `str` or `os.PathLike`, *optional*): The config, or a JSON or YAML file of it.

    Returns:
        `dict[str, Any]`: Arguments of our models, and `num_embeddings`.

    Raises:
        ValueError: If the file is not a mapping, or a name or value belongs to no Moebius.
    """
    if config is None:
        return {}
    if not isinstance(config, Mapping):
        path = Path(config)
        if not path.is_file():
            raise ValueError(f"`config` must be a mapping or a JSON or YAML file, but there is no file {path}.")
        try:
            text = path.read_text(encoding="utf-8")
            config = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
        except (ValueError, yaml.YAMLError) as error:
            raise ValueError(f"`config` must be a JSON or YAML file, but {path} cannot be read: {error}") from error
        if not isinstance(config, dict):
            raise ValueError(f"`config` must hold names and values, but {path} does not.")

    theirs = inspect.signature(UNet2DConditionModel.__init__).parameters  # from which the release's model derives
    # Another value would be another network with weights of the same shapes.
    fixed = {name: parameter.default for name, parameter in theirs.items()} | {"encoder_hid_dim_type": "text_proj"}
    arguments = {}
    for name, value in config.items():
        if str(name).startswith("_") or name in IGNORED_CONFIG:
            continue
        argument = RENAMED_CONFIG.get(name, name)
        if argument == "num_embeddings":
            default = 20
        elif name in RENAMED_CONFIG or (argument in DEFAULTS and argument not in RENAMED_CONFIG.values()):
            default = DEFAULTS[argument].default
        elif name in fixed and value == fixed[name]:
            continue
        elif name in fixed:
            raise ValueError(f"`config` must have {name} = {fixed[name]!r}, but has {value!r}.")
        else:
            raise ValueError(f"`config` has the unknown name {name!r}.")
        arguments[argument] = _checked_value(name, value, default)
    return arguments


def _checked_value(name: str, value: Any, default: Any) -> Any:
    if isinstance(default, tuple) and isinstance(value, list | tuple):
        return tuple(_checked_value(name, item, default[0]) for item in value)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if isinstance(default, float) and is_number:
        return float(value)
    if type(value) is not type(default):
        raise ValueError(f"`config` must have a value like {default!r} for {name}, but has {value!r}.")
    return value


def infer_config(shapes: Mapping[str, tuple[int, ...]]) -> tuple[type[ModelMixin], dict[str, Any]]:
    """
    Reads from a checkpoint's names and shapes what model it is of, and what they tell about its configuration.

    Args:
        shapes (`Mapping[str, tuple[int, ...]]`): The shapes of all tensors by the release's names.

    Returns:
        The class, [`MoebiusUNet2DModel`] or [`PixelHackerUNet2DModel`], and `dict[str, Any]`: its arguments, and
        `num_embeddings`. What shapes cannot tell is left out: `norm_num_groups`, `norm_eps`, `dropout`, and the
        teacher's `sample_size`.

    Raises:
        ValueError: If a tensor that is needed for this is missing or has an impossible shape.
    """

    def shape(name: str, ndim: int) -> tuple[int, ...]:
        if name not in shapes:
            raise ValueError(f"The checkpoint is not one of Moebius, or is truncated: {name} is missing.")
        if len(shapes[name]) != ndim or 0 in shapes[name]:
            raise ValueError(f"The checkpoint is not one of Moebius: {name} has the shape {list(shapes[name])}.")
        return shapes[name]

    def count(prefix: str) -> int:
        return len({name[len(prefix) :].split(".")[0] for name in shapes if name.startswith(prefix)})

    unet = UNET_PREFIX
    transformer = f"{unet}down_blocks.0.attentions.0.transformer_blocks.0."
    num_embeddings, encoder_hid_dim = shape(f"{EMBEDDER_PREFIX}weight", 2)
    arguments = {
        "num_embeddings": num_embeddings,
        "block_out_channels": tuple(
            shape(f"{unet}down_blocks.{level}.resnets.0.norm2.weight", 1)[0]
            for level in range(count(f"{unet}down_blocks."))
        ),
        "layers_per_block": count(f"{unet}down_blocks.0.resnets."),
        "cross_attention_dim": shape(f"{unet}encoder_hid_proj.weight", 2)[0],
        "encoder_hid_dim": encoder_hid_dim,
    }
    if f"{unet}conv_in.weight" in shapes:
        width = arguments["block_out_channels"][0]
        return PixelHackerUNet2DModel, arguments | {
            "in_channels": shape(f"{unet}conv_in.weight", 4)[1],
            "out_channels": shape(f"{unet}conv_out.weight", 4)[0],
            "num_attention_heads": max(1, width // shape(f"{transformer}attn1.g_norm_swish_gate.weight", 1)[0]),
        }
    positions, context_length, key_dim, _ = shape(f"{transformer}attn2.rel_pos_emb", 4)
    width, ffn_width = shape(f"{transformer}ff.point_conv.conv.weight", 4)[:2]
    # The width is int(ratio * C), which several ratios give; the usual one first.
    ratios = (DEFAULTS["mix_ffn_ratio"].default, ffn_width / width, (ffn_width + 0.5) / width)
    return MoebiusUNet2DModel, arguments | {
        "sample_size": math.isqrt(positions),
        "in_channels": shape(f"{unet}conv_in.conv_dw.weight", 4)[0],
        "out_channels": shape(f"{unet}conv_out.conv_pw.weight", 4)[0],
        "num_attention_heads": max(1, width // key_dim),
        "context_length": context_length,
        "local_window_size": shape(f"{transformer}attn1.pos_conv.weight", 5)[-1],
        "mix_ffn_ratio": next(ratio for ratio in ratios if int(ratio * width) == ffn_width),
    }


def load_release_components(
    path: str | os.PathLike,
    config: Mapping[str, Any] | str | os.PathLike | None = None,
    dtype: torch.dtype | Mapping[str, torch.dtype] | None = None,
    disable_mmap: bool = False,
) -> dict[str, ModelMixin]:
    """
    Builds the denoiser and the LCG embedding of one checkpoint of the release.

    Args:
        path (`str` or `os.PathLike`): The checkpoint, `.bin` or `.safetensors`.
        config (`Mapping`, `str` or `os.PathLike`, *optional*): A config in the release's names, or a JSON or YAML file
            of it. Needed only if `norm_num_groups`, which shapes do not tell, is not that of the published models.
        dtype (`torch.dtype` or `Mapping`, *optional*): Type of the weights, or one for each component as in diffusers;
            as stored if not given.
        disable_mmap (`bool`, defaults to `False`): Read the whole file at once.

    Returns:
        `dict[str, ModelMixin]`: `unet` and `lcg_embedder`, in eval mode.

    Raises:
        ValueError: If the file is damaged, or its names and shapes are not exactly those of the model.
    """
    given = read_release_config(config)
    state_dict = read_state_dict(path, disable_mmap)
    shapes = {name: tuple(tensor.shape) for name, tensor in state_dict.items()}
    try:
        unet_class, arguments = infer_config(shapes)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    for name, value in given.items():
        if arguments.get(name, value) != value:
            raise ValueError(f"`config` has {name} = {value!r}, but the weights in {path} have {arguments[name]!r}.")
        if name != "num_embeddings" and name not in inspect.signature(unet_class.__init__).parameters:
            raise ValueError(
                f"`config` has {name}, but {path} holds a {unet_class.__name__}, which has no such thing."
            )
    arguments |= given
    default_groups = DEFAULTS["norm_num_groups"].default
    if "norm_num_groups" not in arguments and any(width % default_groups for width in arguments["block_out_channels"]):
        raise ValueError(
            f"`config` must give norm_num_groups for {path}: shapes do not tell it, and the published model's"
            f" {default_groups} does not divide the widths {arguments['block_out_channels']}."
        )

    num_embeddings = arguments.pop("num_embeddings")
    with torch.device("meta"):  # the checkpoint's tensors take the place of the weights
        unet = unet_class(**arguments)
        lcg_embedder = LatentCategoriesEmbedder(
            num_embeddings=num_embeddings, embedding_dim=arguments["encoder_hid_dim"]
        )
    components = {"unet": (unet, UNET_PREFIX), "lcg_embedder": (lcg_embedder, "")}
    expected = {
        prefix + name: tuple(tensor.shape)
        for model, prefix in components.values()
        for name, tensor in model.state_dict().items()
    }
    _check_names_and_shapes(path, expected, shapes)

    for component, (model, prefix) in components.items():
        weights = {
            name: _cast(model, name, state_dict[prefix + name], component_dtype(dtype, component))
            for name in model.state_dict()
        }
        model.load_state_dict(weights, assign=True)
        model.eval()
    return {component: model for component, (model, _) in components.items()}


def component_dtype(dtype: torch.dtype | Mapping[str, torch.dtype] | None, component: str) -> torch.dtype | None:
    """The `dtype` of one component, where `dtype` may name several, as in `DiffusionPipeline.from_pretrained`."""
    if isinstance(dtype, Mapping):
        return dtype.get(component, dtype.get("default", torch.float32))
    return dtype


def _check_names_and_shapes(
    path: str | os.PathLike, expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]
) -> None:
    problems = {
        "missing": [name for name in expected if name not in found],
        "unexpected": [name for name in found if name not in expected],
        "misshapen": [
            f"{name} {list(found[name])} instead of {list(shape)}"
            for name, shape in expected.items()
            if name in found and found[name] != shape
        ],
    }
    if any(problems.values()):
        described = "; ".join(
            f"{len(names)} {kind} ({', '.join(names[:3])}{', …' if len(names) > 3 else ''})"
            for kind, names in problems.items()
            if names
        )
        raise ValueError(f"{path} is not a checkpoint of Moebius, or is truncated: {described}.")


def _cast(model: ModelMixin, name: str, tensor: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    if dtype is None or not tensor.is_floating_point():
        return tensor
    keeps_float32 = any(part in name.split(".") for part in model._keep_in_fp32_modules or ())
    return tensor.to(torch.float32 if keeps_float32 else dtype)
