"""`moebius info`."""

import json as json_module
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .model import DEFAULT_MODEL, CheckpointOption, DType, load_pipeline

if TYPE_CHECKING:
    from ..pipelines.pipeline_moebius_inpaint import MoebiusInpaintPipeline


def info(
    model: Annotated[
        str, typer.Argument(metavar="[nano|REPO|FOLDER]", help="The model, as in `moebius inpaint --model`.")
    ] = DEFAULT_MODEL,
    checkpoint: CheckpointOption = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """
    Show a model's parameters, multiply-adds, sizes and scheduler.

    \b
    Example:
      moebius info nano --json
    """
    pipeline = load_pipeline(model, checkpoint, "cpu", DType.auto)
    description = _describe(pipeline)
    if json:
        print(json_module.dumps({"model": model, **description}, indent=2))
        return
    lines = [f"{model}: {description['native_size']} px native, guidance {description['default_guidance_scale']}"]
    lines.append(f"{'component':<14}{'class':<28}{'parameters':>12}{'size':>12}  type")
    for name, part in description["components"].items():
        size = f"{part['bytes'] / 1e6:.1f} MB"
        lines.append(f"{name:<14}{part['class']:<28}{part['parameters']:>12,}{size:>12}  {part['dtype']}")
    lines.append(f"{'':<42}{description['parameters']:>12,}{description['bytes'] / 1e6:>9.1f} MB")
    lines.append("multiply-adds at the native size, one picture:")
    for name, value in description["multiply_adds"].items():
        lines.append(f"  {name.replace('_', ' '):<40}{value / 1e9:>12.2f} G")
    lines.append("scheduler " + ", ".join(f"{key}: {value}" for key, value in description["scheduler"].items()))
    print("\n".join(lines))


def _describe(pipeline: "MoebiusInpaintPipeline") -> dict[str, Any]:
    import torch

    from ..models.multiply_adds import count_multiply_adds

    components = {}
    for name, component in pipeline.components.items():
        if isinstance(component, torch.nn.Module):
            parameters = list(component.parameters())
            components[name] = {
                "class": type(component).__name__,
                "parameters": sum(p.numel() for p in parameters),
                "bytes": sum(t.nbytes for t in component.state_dict().values()),
                "dtype": str(component.dtype).removeprefix("torch."),
            }

    unet, vae, scheduler = pipeline.unet, pipeline.vae, pipeline.scheduler
    side = unet.config.sample_size
    pixels = side * pipeline.vae_scale_factor
    dtype = unet.dtype
    for model in (unet, vae):  # On the meta device shapes are worked out and nothing is computed.
        model.to("meta").requires_grad_(False)

    tokens = (1, pipeline.lcg_embedder.context_length, pipeline.lcg_embedder.config.embedding_dim)
    calls = {
        "unet_evaluation": (unet, (1, unet.config.in_channels, side, side), (1,), tokens),
        "vae_encoding": (vae.encode, (1, 3, pixels, pixels)),
        "vae_decoding": (vae.decode, (1, unet.config.out_channels, side, side)),
    }
    multiply_adds = {name: count_multiply_adds(*call, dtype=dtype) for name, call in calls.items()}
    # Guidance evaluates the U-Net for background and foreground.
    multiply_adds["guided_step"] = 2 * multiply_adds["unet_evaluation"]
    return {
        "native_size": pixels,
        "default_guidance_scale": pipeline.config.default_guidance_scale,
        "parameters": sum(part["parameters"] for part in components.values()),
        "bytes": sum(part["bytes"] for part in components.values()),
        "components": components,
        "multiply_adds": multiply_adds,
        "scheduler": {
            "class": type(scheduler).__name__,
            "prediction_type": scheduler.config.prediction_type,
            "timestep_spacing": scheduler.config.timestep_spacing,
        },
    }
