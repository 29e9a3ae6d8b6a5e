"""`moebius export`."""

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from ..loaders import TINY_AUTOENCODER
from .model import CheckpointOption, DType, load_pipeline


class ExportFormat(str, Enum):
    """What is written."""

    onnx = "onnx"


class ExportDType(str, Enum):
    """The types in which weights are stored."""

    float32 = "float32"
    float16 = "float16"


def export(
    model: Annotated[str, typer.Argument(metavar="nano|REPO|FOLDER", help="The model.")],
    target: Annotated[Path, typer.Argument(metavar="TARGET", help="The folder to be written.")],
    checkpoint: CheckpointOption = None,
    format: Annotated[ExportFormat, typer.Option(help="What to write.")] = ExportFormat.onnx,
    size: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SIZE|HEIGHTxWIDTH",
            help="Pixels at which the graphs are checked; each serves every size. May be given several times.",
            show_default="the model's own, and half as high",
        ),
    ] = None,
    dtype: Annotated[
        ExportDType, typer.Option(help="Type in which the weights are stored, but for the encoder's.")
    ] = ExportDType.float32,
    vae: Annotated[
        str | None,
        typer.Option(
            metavar="tiny|FOLDER|REPO",
            help=f"Another autoencoder; tiny is {TINY_AUTOENCODER}, which has the latents of the published models.",
            show_default="the model's own",
        ),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an exported folder.")] = False,
) -> None:
    """
    Write a model as ONNX graphs, for browsers and for ONNX Runtime.

    \b
    Example:
      moebius export hustvl/Moebius moebius-onnx --dtype float16 --vae tiny
    """
    sizes = [_parse_size(value) for value in size] if size else None
    try:
        from ..export import export_onnx
    except ModuleNotFoundError as error:
        if error.name not in ("onnx", "onnxruntime"):
            raise
        raise ValueError("Exporting needs `pip install diffusers-moebius[onnx]`.") from error
    pipeline = load_pipeline(model, checkpoint, "cpu", DType.float32, vae=TINY_AUTOENCODER if vae == "tiny" else vae)
    print(export_onnx(pipeline, target, sizes=sizes, dtype=dtype.value, overwrite=overwrite))


def _parse_size(text: str) -> tuple[int, int]:
    lengths = text.lower().split("x")
    if len(lengths) > 2 or not all(length.isdecimal() for length in lengths):
        raise ValueError(f"`--size` must be a number of pixels or HEIGHTxWIDTH, but is {text!r}.")
    return int(lengths[0]), int(lengths[-1])
