"""`moebius convert`."""

from pathlib import Path
from typing import Annotated

import typer


def convert(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="SOURCE", exists=True, help="A published checkpoint, .bin or .safetensors, or its folder."
        ),
    ],
    target: Annotated[Path, typer.Argument(metavar="TARGET", help="The pipeline folder to be written.")],
    config: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="JSON or YAML config in the names of the release."),
    ] = None,
    vae: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER|REPO", help="The autoencoder.", show_default="that of the release, hustvl/PixelHacker"
        ),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a pipeline folder.")] = False,
) -> None:
    """
    Convert a published checkpoint to a folder that diffusers loads.

    \b
    Example:
      moebius convert ft_places2/diffusion_pytorch_model.bin moebius-places2
    """
    from .. import convert_release_checkpoint

    print(convert_release_checkpoint(source, target, config=config, vae=vae, overwrite=overwrite))
