"""`moebius push`."""

from typing import Annotated

import typer

from .model import CheckpointOption, DType, load_pipeline


def push(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="nano, a pipeline folder, or a repository on the hub.")
    ],
    repository: Annotated[str, typer.Argument(metavar="REPO", help="Where to, as owner/name; made if need be.")],
    checkpoint: CheckpointOption = None,
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
) -> None:
    """
    Upload a model to the hub, with its model card and the code that diffusers needs to load it.

    \b
    Example:
      moebius push my-moebius me/my-moebius --private
    """
    pipeline = load_pipeline(model, checkpoint, "cpu", DType.float32)
    try:
        commit = pipeline.push_to_hub(repository, private=private or None)
    except Exception as error:  # A wrong name, no token, no network: the hub's client has an error for each.
        raise ValueError(f"{model} cannot be pushed to {repository}: {error}") from error
    print(commit.commit_url)
