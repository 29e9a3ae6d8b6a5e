"""Ways to fill a hole, by name: ours, any pipeline of diffusers, the classical ones, and pictures made elsewhere."""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

if TYPE_CHECKING:  # takes seconds to import, which reports and pages do without
    from diffusers import DiffusionPipeline

# Takes a photo `[H, W, 3]` in `uint8` whose hole is blanked, the mask `[H, W]` (`True` is filled), the photo's name
# and a seed; returns a picture `[H, W, 3]` in `uint8`, of which the hole counts.
Method = Callable[[np.ndarray, np.ndarray, str, int], np.ndarray]


def blank_hole(photo: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """
    Paints the hole in the mean colour of the visible pixels.

    Args:
        photo (`np.ndarray` of shape `[H, W, 3]`): `uint8`.
        mask (`np.ndarray` of shape `[H, W]`): `True` in the hole.

    Returns:
        `np.ndarray` of shape `[H, W, 3]`, `uint8`, in which nothing of the hole's content is left.
    """
    blanked = photo.copy()
    blanked[mask] = photo[~mask].mean(0).round().astype(np.uint8)
    return blanked


def mean_colour(blanked: np.ndarray, mask: np.ndarray, name: str, seed: int) -> np.ndarray:
    """Leaves the hole as it was blanked."""
    return blanked


def telea(blanked: np.ndarray, mask: np.ndarray, name: str, seed: int) -> np.ndarray:
    """OpenCV's fast marching method (Telea 2004) with a radius of 3 px."""
    import cv2

    return cv2.inpaint(blanked, mask.astype(np.uint8), 3, cv2.INPAINT_TELEA)


def navier_stokes(blanked: np.ndarray, mask: np.ndarray, name: str, seed: int) -> np.ndarray:
    """OpenCV's Navier–Stokes method (Bertalmio et al. 2001) with a radius of 3 px."""
    import cv2

    return cv2.inpaint(blanked, mask.astype(np.uint8), 3, cv2.INPAINT_NS)


def patchmatch(blanked: np.ndarray, mask: np.ndarray, name: str, seed: int) -> np.ndarray:
    """PatchMatch (Barnes et al. 2009) of the package `pypatchmatch`, with patches of 5 px."""
    from patchmatch import patch_match

    return patch_match.inpaint(blanked, mask.astype(np.uint8) * 255, patch_size=5)


CLASSICAL: dict[str, Method] = {
    "mean": mean_colour,
    "telea": telea,
    "navier-stokes": navier_stokes,
    "patchmatch": patchmatch,
}


@dataclass
class PipelineMethod:
    """
    Fills by an inpainting pipeline; picture and noise depend on the seed alone.

    Args:
        pipeline ([`DiffusionPipeline`]): Ours, or another that takes `image` and `mask_image`.
        call (`dict`): Arguments of its call.
        size_multiple (`int`, *optional*): The photo is brought to a multiple of so many pixels, and the result back;
            by default the pipeline takes any size.
    """

    pipeline: "DiffusionPipeline"
    call: dict[str, Any]
    size_multiple: int | None = None

    def __call__(self, blanked: np.ndarray, mask: np.ndarray, name: str, seed: int) -> np.ndarray:
        height, width = mask.shape
        sizes = {}
        if self.size_multiple is not None:
            step = self.size_multiple
            sizes = {"height": max(step, height // step * step), "width": max(step, width // step * step)}
        result = self.pipeline(
            image=Image.fromarray(blanked),
            mask_image=Image.fromarray(mask.astype(np.uint8) * 255),
            generator=torch.Generator().manual_seed(seed),
            **{**sizes, **self.call},
        ).images[0]
        if result.size != (width, height):
            result = result.resize((width, height), Image.Resampling.LANCZOS)
        return np.asarray(result.convert("RGB"))


@dataclass(frozen=True)
class Settings:
    """
    How a method is run, from a section `[NAME]` of a TOML file.

    Args:
        repository (`str`): A folder or repository with a pipeline, or `nano`.
        call (`dict`): Arguments of its call: `prompt`, `num_inference_steps`, `guidance_scale`, `strength`, `height`,
            `width` and the like. For a Moebius pipeline `"none"` stands for `None`, which TOML lacks.
        load (`dict`): Arguments of `from_pretrained`, such as `variant`; `dtype` by its name.
        pipeline (`str`, defaults to `"diffusers"`): `"moebius"` for one of ours, else any inpainting pipeline.

    Raises:
        ValueError: If `pipeline` is neither.
    """

    repository: str
    call: dict[str, Any] = field(default_factory=dict)
    load: dict[str, Any] = field(default_factory=dict)
    pipeline: str = "diffusers"

    def __post_init__(self):
        if self.pipeline not in ("diffusers", "moebius"):
            raise ValueError(f"`pipeline` must be diffusers or moebius, but is {self.pipeline!r}.")


def read_toml(path: str | Path) -> dict[str, Any]:
    """Reads a TOML file."""
    try:
        import tomllib
    except ModuleNotFoundError:  # Python 3.10
        import tomli as tomllib

    return tomllib.loads(Path(path).read_text(encoding="utf-8"))


def read_settings(path: str | Path) -> dict[str, Settings]:
    """
    Reads the sections of a TOML file, each with `repository` and perhaps `pipeline` and the tables `call` and `load`.

    Raises:
        ValueError: If a section has other entries or no repository.
    """
    sections = {}
    for name, section in read_toml(path).items():
        unknown = set(section) - {"repository", "call", "load", "pipeline"}
        if unknown or "repository" not in section:
            raise ValueError(
                f"Section [{name}] of {path} must have `repository`, and may have `call`, `load` and `pipeline`, "
                f"but has {', '.join(section)}."
            )
        sections[name] = Settings(**section)
    return sections


def make_method(
    name: str,
    settings: dict[str, Settings] | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    **call: Any,
) -> Method:
    """
    A method by its name.

    Args:
        name (`str`): `mean`, `telea`, `navier-stokes` or `patchmatch`; `results:FOLDER` for pictures `NAME.png` (or
            .jpg, .webp) made elsewhere; a section of `settings`; else a Moebius pipeline: `nano`, a folder or a
            repository (`owner/name/checkpoint` for one of several).
        settings (`dict[str, Settings]`, *optional*): From [`read_settings`].
        device (`torch.device`, defaults to the CPU): Where pipelines run.
        dtype (`torch.dtype`, defaults to `torch.float32`): Type of their weights.
        call: Arguments of the call of a Moebius pipeline that is no section.

    Returns:
        `Method`: A [`PipelineMethod`] if a pipeline fills.

    Raises:
        ValueError: If a folder of results does not exist, or the package of a method is not installed.
    """
    if name == "patchmatch" and find_spec("patchmatch") is None:
        raise ValueError("The method patchmatch needs `pypatchmatch`, which the extra `eval` installs.")
    if name in CLASSICAL:
        return CLASSICAL[name]
    if name.startswith("results:"):
        return _results(Path(name.removeprefix("results:")))
    if not settings or name not in settings:
        return _moebius_method(Settings(name, call), device, dtype)
    section = settings[name]
    make = _moebius_method if section.pipeline == "moebius" else _diffusers_method
    return make(section, device, dtype)


def split_names(methods: Sequence[str]) -> dict[str, str]:
    """
    Splits `NAME=METHOD`; a method without a name goes by its own.

    Raises:
        ValueError: If a name is there twice.
    """
    named = [method.partition("=") if "=" in method else (method, "=", method) for method in methods]
    by_name = {name: method for name, _, method in named}
    if len(by_name) < len(named):
        raise ValueError(f"`methods` must have different names, but are {', '.join(methods)}.")
    return by_name


def _results(folder: Path) -> Method:
    if not folder.is_dir():
        raise ValueError(f"`results:` must name a folder of pictures, but {folder} is none.")

    def method(blanked: np.ndarray, mask: np.ndarray, name: str, seed: int) -> np.ndarray:
        paths = [folder / f"{name}{suffix}" for suffix in (".png", ".jpg", ".jpeg", ".webp")]
        path = next((path for path in paths if path.is_file()), None)
        if path is None:
            raise ValueError(f"`results:` {folder} holds no picture of {name}.")
        with Image.open(path) as image:
            picture = np.asarray(image.convert("RGB"))
        if picture.shape != blanked.shape:
            raise ValueError(
                f"`results:` {path} has {picture.shape[1]}×{picture.shape[0]} pixels, but the photo "
                f"{blanked.shape[1]}×{blanked.shape[0]}."
            )
        return picture

    return method


def _load(loader, repository: str, settings: Settings, device, dtype: torch.dtype) -> "DiffusionPipeline":
    load = dict(settings.load)
    dtype = getattr(torch, load.pop("dtype")) if "dtype" in load else dtype
    pipeline = loader.from_pretrained(repository, dtype=dtype, **load).to(device)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _moebius_method(settings: Settings, device, dtype: torch.dtype) -> PipelineMethod:
    from .. import MoebiusInpaintPipeline

    repository = settings.repository
    if repository.count("/") == 2 and not Path(repository).is_dir():
        repository, _, checkpoint = repository.rpartition("/")
        settings = replace(settings, load={"checkpoint": checkpoint, **settings.load})
    pipeline = _load(MoebiusInpaintPipeline, repository, settings, device, dtype)
    # A feathered paste would blend in the colour of the blanked hole; the seamless one looks at nothing inside it.
    paste = "seamless" if pipeline.config.default_paste == "seamless" else None
    given = {key: None if value == "none" else value for key, value in settings.call.items()}
    return PipelineMethod(pipeline, {"paste": paste, **given})


def _diffusers_method(settings: Settings, device, dtype: torch.dtype) -> PipelineMethod:
    import diffusers

    revision = {"revision": settings.load["revision"]} if "revision" in settings.load else {}
    config = diffusers.DiffusionPipeline.load_config(settings.repository, **revision)
    own_class = getattr(diffusers, str(config["_class_name"]), None)
    # What inpaints already is taken as it is: diffusers' list for the automatic choice lacks FluxFillPipeline.
    inpaints = own_class is not None and "mask_image" in inspect.signature(own_class.__call__).parameters
    loader = diffusers.DiffusionPipeline if inpaints else diffusers.AutoPipelineForInpainting
    pipeline = _load(loader, settings.repository, settings, device, dtype)
    return PipelineMethod(pipeline, {"prompt": "", **settings.call}, size_multiple=16)
