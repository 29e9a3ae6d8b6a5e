"""Moebius image inpainting for diffusers."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .checkpoints import bundled_checkpoint
    from .conversion import convert_release_checkpoint
    from .models.latent_categories import LatentCategoriesEmbedder
    from .models.unet_2d_moebius import MoebiusUNet2DModel
    from .models.unet_2d_pixelhacker import PixelHackerUNet2DModel
    from .pipelines.modular_blocks_moebius import MoebiusAutoBlocks
    from .pipelines.modular_pipeline_moebius import MoebiusModularPipeline
    from .pipelines.pipeline_moebius_inpaint import MoebiusInpaintPipeline

# Imported on first use: `import diffusers_moebius` and `moebius --help` do without torch.
_MODULES = {
    "LatentCategoriesEmbedder": "models.latent_categories",
    "MoebiusAutoBlocks": "pipelines.modular_blocks_moebius",
    "MoebiusInpaintPipeline": "pipelines.pipeline_moebius_inpaint",
    "MoebiusModularPipeline": "pipelines.modular_pipeline_moebius",
    "MoebiusUNet2DModel": "models.unet_2d_moebius",
    "PixelHackerUNet2DModel": "models.unet_2d_pixelhacker",
    "bundled_checkpoint": "checkpoints",
    "convert_release_checkpoint": "conversion",
}
__version__ = "0.1.0"
__all__ = [
    "LatentCategoriesEmbedder",
    "MoebiusAutoBlocks",
    "MoebiusInpaintPipeline",
    "MoebiusModularPipeline",
    "MoebiusUNet2DModel",
    "PixelHackerUNet2DModel",
    "bundled_checkpoint",
    "convert_release_checkpoint",
]


def __getattr__(name: str):
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_MODULES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
