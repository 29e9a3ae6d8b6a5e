"""`moebius study`: blind studies of fillings."""

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from .messages import note
from .model import choose_device

study = typer.Typer(help="Make, serve and report a blind study: which filling do people prefer?")


class Layout(str, Enum):
    """How fillings are shown."""

    rows = "rows"
    pairs = "pairs"


@study.command()
def make(
    methods: Annotated[
        list[str],
        typer.Option(
            "--methods",
            metavar="METHOD",
            help="Give it once a method: mean, telea, navier-stokes, patchmatch, results:FOLDER, a section of"
            " --settings, nano, a pipeline folder or a repository. A name before = is what the report calls it.",
        ),
    ],
    photos: Annotated[
        Path, typer.Option(exists=True, file_okay=False, help="Folder of photos NAME.jpg with masks NAME.mask.png.")
    ],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder of the study, which must not exist.")],
    settings: Annotated[
        Path | None,
        typer.Option(exists=True, help="TOML with a section a pipeline: repository, call, load."),
    ] = None,
    layout: Annotated[Layout, typer.Option(help="All fillings of a photo at once, or each two.")] = Layout.rows,
    limit: Annotated[int | None, typer.Option(min=1, help="Photos, drawn by the seed.", show_default="all")] = None,
    dilate: Annotated[
        bool, typer.Option("--dilate", help="Grow masks by the paper's rule, over the rims of objects to remove.")
    ] = False,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the fillings, the order and the draw.")] = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda, mps; auto takes an accelerator.")] = "auto",
) -> None:
    """
    Fill photos by several methods, and write them in random order with the key apart.

    \b
    Example:
      moebius study make --methods nano --methods patchmatch --methods telea --photos photos/ -o study/
    """
    from tqdm import tqdm

    from ..evaluation.methods import make_method, read_settings, split_names
    from ..evaluation.study import key_path, make_study, photos_of

    sections = read_settings(settings) if settings else None
    named = split_names(methods)
    made = {name: make_method(method, sections, choose_device(device)) for name, method in named.items()}
    shown = tqdm(photos_of(photos, limit, seed, dilate), unit="photo", disable=None)
    count = make_study(shown, made, output, layout.value, seed)
    note(f"{count} cases; {key_path(output)} says which filling is whose: keep it from those who answer")
    print(output)


@study.command()
def serve(
    folder: Annotated[Path, typer.Argument(metavar="STUDY", exists=True, file_okay=False, help="The study.")],
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 is open to the network.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 7861,
) -> None:
    """Serve the page on which people answer."""
    from ..evaluation.study import Study

    try:
        from ..evaluation.study_page import serve_study
    except ModuleNotFoundError as error:
        raise ValueError("The page needs gradio: install it with `pip install diffusers-moebius[demo]`.") from error
    serve_study(Study(folder), host, port)


@study.command()
def report(
    folder: Annotated[Path, typer.Argument(metavar="STUDY", exists=True, file_okay=False, help="The study.")],
) -> None:
    """Print how often each method was preferred, with intervals, agreement and tests, as Markdown."""
    from ..evaluation.study import Study, report_markdown, report_study

    print(report_markdown(report_study(Study(folder))))
