"""The models that a visitor can choose from, loaded when first used."""

import functools
import logging
import os
import re
from pathlib import Path

import torch

from .. import MoebiusInpaintPipeline
from .photos import VisitorError

logger = logging.getLogger(__name__)

NANO = "Nano (comes with the app, fast)"
FULL = "Moebius Places2 (landscapes, rooms)"
FULL_GIGABYTES = 1.2
PUBLISHED = {
    FULL: ("hustvl/Moebius", "ft_places2"),
    "Moebius CelebA-HQ (portraits)": ("hustvl/Moebius", "ft_celebahq"),
    "Moebius FFHQ (portraits)": ("hustvl/Moebius", "ft_ffhq"),
    "Moebius pretrained (general)": ("hustvl/Moebius", "pretrained"),
}
# How many pipelines stay in memory.
CAPACITY = 2
# Where a GPU is lent, the model that is worth it.
ZERO_GPU_MODEL = "hustvl/Moebius/ft_places2"


def on_zero_gpu() -> bool:
    """Whether this is a ZeroGPU Space. The package `spaces` alone does not tell: the hub installs it on all Spaces."""
    return os.environ.get("SPACES_ZERO_GPU", "").lower() in ("1", "t", "true")


class ModelShelf:
    """
    Pipelines by name; the least recently used ones are let go.

    Args:
        default (`str`, *optional*): The model that is chosen at first: `"nano"`, `owner/name`, `owner/name/folder`, or
            a pipeline folder of the server, of which visitors see the last part of the path alone. If not given:
            `MOEBIUS_DEMO_MODEL`, or `hustvl/Moebius/ft_places2` on a ZeroGPU Space and `"nano"` elsewhere.
    """

    def __init__(self, default: str | None = None):
        self.sources: dict[str, tuple[str, str | None]] = {NANO: ("nano", None), **PUBLISHED}
        default = default or os.environ.get("MOEBIUS_DEMO_MODEL") or (ZERO_GPU_MODEL if on_zero_gpu() else "nano")
        if default == "nano":
            self.default = NANO
        elif Path(default).is_dir():
            self.default = f"{Path(default).resolve().name} (of this server)"
            self.sources = {self.default: (default, None), **self.sources}
        else:
            source = parse_repository(default)
            known = {value: key for key, value in self.sources.items()}
            self.default = known.get(source, default)
            self.sources.setdefault(self.default, source)
        # One run at a time asks for a model, so that none is loaded twice at once.
        self.get = functools.lru_cache(CAPACITY)(_load)

    def resolve(self, name: str) -> tuple[str, str | None]:
        """Source and checkpoint folder of a model on the list, or of any repository."""
        return self.sources.get(name) or parse_repository(name)


def parse_repository(text: str) -> tuple[str, str | None]:
    """
    Reads `owner/name` or `owner/name/folder`.

    Raises:
        VisitorError: If it is something else; above all a visitor must not name a folder of the server.
    """
    match = re.fullmatch(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:/([A-Za-z0-9][\w-]*))?", text.strip())
    if match is None or ".." in text or Path(match[1]).exists():
        raise VisitorError(
            f"{text.strip()!r} is not the name of a repository on the hub; it looks like owner/name, or "
            "owner/name/folder for one of several checkpoints."
        )
    return match[1], match[2]


def _load(location: tuple[str, str | None]) -> MoebiusInpaintPipeline:
    source, checkpoint = location
    device = (
        "cuda" if torch.cuda.is_available() or on_zero_gpu() else "mps" if torch.backends.mps.is_available() else "cpu"
    )
    dtype = torch.float16 if device == "cuda" else torch.float32
    try:
        return MoebiusInpaintPipeline.from_pretrained(source, checkpoint=checkpoint, dtype=dtype).to(device)
    except Exception as error:  # Broken weights, an unreachable hub and an odd config all raise errors of their own.
        logger.warning("%s cannot be loaded", source, exc_info=True)
        name = Path(source).name if Path(source).is_dir() else source
        raise VisitorError(
            f"The model {name} could not be loaded. It may not exist, be no Moebius model, or the hub may be out of "
            "reach. Please try another one."
        ) from error
