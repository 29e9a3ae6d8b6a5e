"""`moebius demo`."""

from typing import Annotated

import typer

from .messages import note
from .model import DEFAULT_MODEL


def demo(
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 is open to the network.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 7860,
    model: Annotated[
        str,
        typer.Option(metavar="nano|REPO[/CHECKPOINT]|FOLDER", help="The model that is chosen at first."),
    ] = DEFAULT_MODEL,
    share: Annotated[bool, typer.Option("--share", help="Also make a public link, through gradio's server.")] = False,
) -> None:
    """
    Serve the web page on which things are painted away.

    \b
    Example:
      moebius demo --model hustvl/Moebius/ft_places2
    """
    note(f"starting the page at http://{host}:{port}; its libraries take a few seconds to load")
    try:
        from ..demo import VisitorError, launch_demo
    except ModuleNotFoundError as error:
        if error.name != "gradio":
            raise
        raise ValueError("The demo needs gradio: install it with `pip install diffusers-moebius[demo]`.") from error

    try:
        launch_demo(model, host=host, port=port, share=share)
    except VisitorError as error:
        raise ValueError(f"`--model`: {error}") from error
