"""Ways to fill a hole, by name: ours, any pipeline of diffusers, the classical ones, and pictures made elsewhere."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

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


@dataclass(frozen=True)
class Settings:
    """
    How a method is run, from a section `[NAME]` of a TOML file.

    Args:
        repository (`str`): A folder or repository with a pipeline of diffusers.
        call (`dict`): Arguments of its call: `prompt`, `num_inference_steps`, `guidance_scale`, `strength`, `height`,
            `width` and the like.
        load (`dict`): Arguments of `from_pretrained`, such as `variant`; `dtype` by its name.
    """

    repository: str
    call: dict[str, Any] = field(default_factory=dict)
    load: dict[str, Any] = field(default_factory=dict)


def read_settings(path: str | Path) -> dict[str, Settings]:
    """
    Reads the sections of a TOML file, each with `repository` and perhaps the tables `call` and `load`.

    Raises:
        ValueError: If a section has other entries or no repository.
    """
    try:
        import tomllib
    except ModuleNotFoundError:  # Python 3.10
        import tomli as tomllib

    sections = {}
    for name, section in tomllib.loads(Path(path).read_text(encoding="utf-8")).items():
        unknown = set(section) - {"repository", "call", "load"}
        if unknown or "repository" not in section:
            raise ValueError(
                f"Section [{name}] of {path} must have `repository`, and may have `call` and `load`, but has "
                f"{', '.join(section)}."
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
            .jpg, .webp) made elsewhere; a section of `settings`, for any inpainting pipeline of diffusers; else a
            Moebius pipeline: `nano`, a folder or a repository (`owner/name/checkpoint` for one of several).
        settings (`dict[str, Settings]`, *optional*): From [`read_settings`].
        device (`torch.device`, defaults to the CPU): Where pipelines run.
        dtype (`torch.dtype`, defaults to `torch.float32`): Type of their weights.
        call: Arguments of the call of a Moebius pipeline.

    Raises:
        ValueError: If a folder of results does not exist.
    """
    if name in CLASSICAL:
        return CLASSICAL[name]
    if name.startswith("results:"):
        return _results(Path(name.removeprefix("results:")))
    if settings and name in settings:
        return _diffusers_method(settings[name], device, dtype)
    return _moebius_method(name, device, dtype, call)


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


def _as_images(blanked: np.ndarray, mask: np.ndarray) -> dict[str, Image.Image]:
    return {"image": Image.fromarray(blanked), "mask_image": Image.fromarray(mask.astype(np.uint8) * 255)}


def _moebius_method(name: str, device, dtype: torch.dtype, call: dict[str, Any]) -> Method:
    from .. import MoebiusInpaintPipeline

    repository, _, checkpoint = (
        name.rpartition("/") if name.count("/") == 2 and not Path(name).is_dir() else ("", "", "")
    )
    options = {"checkpoint": checkpoint} if checkpoint else {}
    pipeline = MoebiusInpaintPipeline.from_pretrained(repository or name, dtype=dtype, **options).to(device)
    pipeline.set_progress_bar_config(disable=True)

    def method(blanked: np.ndarray, mask: np.ndarray, name: str, seed: int) -> np.ndarray:
        generator = torch.Generator().manual_seed(seed)
        return np.asarray(pipeline(**_as_images(blanked, mask), generator=generator, **call).images[0].convert("RGB"))

    return method


def _diffusers_method(settings: Settings, device, dtype: torch.dtype) -> Method:
    """Any inpainting pipeline: the photo is brought to its size, a multiple of 16, and the result back."""
    from diffusers import AutoPipelineForInpainting

    load = dict(settings.load)
    dtype = getattr(torch, load.pop("dtype")) if "dtype" in load else dtype
    pipeline = AutoPipelineForInpainting.from_pretrained(settings.repository, dtype=dtype, **load).to(device)
    pipeline.set_progress_bar_config(disable=True)
    call = {"prompt": "", **settings.call}

    def method(blanked: np.ndarray, mask: np.ndarray, name: str, seed: int) -> np.ndarray:
        height, width = mask.shape
        size = {"height": max(16, height // 16 * 16), "width": max(16, width // 16 * 16)}
        generator = torch.Generator().manual_seed(seed)
        result = pipeline(**_as_images(blanked, mask), generator=generator, **{**size, **call}).images[0]
        return np.asarray(result.convert("RGB").resize((width, height), Image.Resampling.LANCZOS))

    return method
