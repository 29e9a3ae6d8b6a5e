"""`moebius space`."""

from pathlib import Path
from typing import Annotated

import typer

space = typer.Typer(name="space", help="The web demo as a Space on the hub.", rich_markup_mode=None)


@space.callback()
def _space() -> None:  # With one command alone Typer would leave its name out.
    pass


@space.command()
def push(
    repository: Annotated[str, typer.Argument(metavar="REPO", help="The Space, as owner/name; made if need be.")],
    folder: Annotated[Path, typer.Option(help="What is uploaded; `make space` gathers it.")] = Path("build/space"),
    model: Annotated[
        str | None,
        typer.Option(
            metavar="nano|REPO[/CHECKPOINT]",
            help="The model that the page begins with.",
            show_default="nano; on ZeroGPU hustvl/Moebius/ft_places2",
        ),
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="Make a new Space private.")] = False,
) -> None:
    """
    Create or update a Space with the web demo.

    \b
    Example:
      make space && moebius space push me/remove-things --private
    """
    for name in ("app.py", "README.md", "requirements.txt"):
        if not (folder / name).is_file():
            raise ValueError(f"`--folder` must hold what `make space` gathers, but {folder} has no {name}.")

    from huggingface_hub import HfApi

    hub = HfApi()
    try:
        hub.create_repo(repository, repo_type="space", space_sdk="gradio", private=private or None, exist_ok=True)
        if model is not None:
            hub.add_space_variable(repository, "MOEBIUS_DEMO_MODEL", model)
        # A wheel of an older version would stay beside the new one.
        commit = hub.upload_folder(
            repo_id=repository,
            repo_type="space",
            folder_path=folder,
            delete_patterns="*.whl",
            commit_message="Upload the demo",
        )
    except Exception as error:  # A wrong name, no token, no network: the hub's client has an error for each.
        raise ValueError(f"{folder} cannot be pushed to {repository}: {error}") from error
    print(commit.commit_url)
