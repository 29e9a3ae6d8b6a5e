"""Conversion of the release's checkpoints to folders that diffusers loads."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusers.models.modeling_utils import ModelMixin

from .loaders.hub import load_vae
from .loaders.release_checkpoint import (
    RELEASE_VAE_REPOSITORY,
    default_guidance_scale,
    load_release_components,
    make_release_scheduler,
    weight_names,
)
from .pictures.files import replace_folder
from .pipelines.pipeline_moebius_inpaint import MoebiusInpaintPipeline


def convert_release_checkpoint(
    source: str | os.PathLike,
    target: str | os.PathLike,
    config: Mapping[str, Any] | str | os.PathLike | None = None,
    vae: str | os.PathLike | ModelMixin | None = None,
    overwrite: bool = False,
) -> Path:
    """
    Converts one checkpoint of the release to a pipeline folder of diffusers: all of it, or nothing.

    Weights keep their type. A checkpoint in a folder named `ft_celebahq` or `ft_ffhq`, as published, gets the default
    guidance scale of portraits.

    Args:
        source (`str` or `os.PathLike`): The checkpoint, `.bin` or `.safetensors`, or the folder in which it lies as
            `diffusion_pytorch_model.*`.
        target (`str` or `os.PathLike`): The folder to be written, with `unet/`, `lcg_embedder/`, `scheduler/`, `vae/`
            and `model_index.json`.
        config (`Mapping`, `str` or `os.PathLike`, *optional*): A config in the release's names, or a JSON or YAML file
            of it. Needed only for what the weights' shapes do not tell (`norm_num_groups`).
        vae (`str`, `os.PathLike` or `ModelMixin`, *optional*): The autoencoder, its folder or its repository on the
            hub; that of the release (`hustvl/PixelHacker`, folder `vae`) if not given.
        overwrite (`bool`, defaults to `False`): Replace a pipeline folder that is already at `target`.

    Returns:
        `Path`: The folder written.

    Raises:
        ValueError: If `source` is not exactly a checkpoint of Moebius, or `target` exists and may not be replaced.
    """
    source, target = Path(source), Path(target).absolute()
    if source.is_dir():
        files = [source / name for name in weight_names() if (source / name).is_file()]
        if not files:
            raise ValueError(f"`source` must hold one of {', '.join(weight_names())}, but {source} does not.")
        source = files[0]
    elif not source.is_file():
        raise ValueError(f"`source` must be a checkpoint file or its folder, but there is no {source}.")
    if source.resolve().is_relative_to(target.resolve()):
        raise ValueError(f"`target` must not contain `source`, but {target} contains {source}.")
    _check_target(target, overwrite)

    components = load_release_components(source, config)
    pipeline = MoebiusInpaintPipeline(
        **components,
        vae=load_vae(RELEASE_VAE_REPOSITORY if vae is None else vae),
        scheduler=make_release_scheduler(),
        default_guidance_scale=default_guidance_scale(source.absolute().parent.name),
    )
    with replace_folder(target) as folder:  # of the target's name, from which the model card takes its title
        pipeline.save_pretrained(folder)
    return target


def _check_target(target: Path, overwrite: bool) -> None:
    if not target.exists():
        return
    if not overwrite:
        raise ValueError(f"`target` must not exist, but {target} does; `overwrite` replaces a pipeline folder.")
    if not target.is_dir() or (any(target.iterdir()) and not (target / "model_index.json").is_file()):
        raise ValueError(f"`target` is only overwritten if it is a pipeline folder or empty, but {target} is neither.")
