"""`moebius batch`."""

from pathlib import Path
from typing import Annotated

import typer

from ..batch.photo import MaskOptions
from .messages import note
from .model import DEFAULT_MODEL, CheckpointOption, ModelOption


def batch(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="SOURCE",
            exists=True,
            help="A folder of photos, or WebDataset shards (.tar), Parquet files or JSON lines (.jsonl, with image and"
            " mask: paths or addresses), one or a folder of them. All workers must see it under this path.",
        ),
    ],
    target: Annotated[
        Path, typer.Argument(metavar="TARGET", help="The folder of results, which all workers must see.")
    ],
    masks: Annotated[
        Path | None,
        typer.Option(exists=True, help="For a folder of photos: the folder of their masks, or one mask for all."),
    ] = None,
    model: ModelOption = DEFAULT_MODEL,
    checkpoint: CheckpointOption = None,
    address: Annotated[
        str | None, typer.Option(help="Ray cluster; auto takes the one here.", show_default="this machine alone")
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="Workers, each with a pipeline of its own.")] = 1,
    max_workers: Annotated[
        int | None, typer.Option(min=1, help="Up to so many while there is work.", show_default="--workers")
    ] = None,
    gpus_per_worker: Annotated[
        float, typer.Option(min=0, help="GPUs a worker; a fraction lets workers share one.")
    ] = 0.0,
    cpus_per_worker: Annotated[float, typer.Option(min=0.1, help="Processor cores a worker.")] = 1.0,
    batch_size: Annotated[int, typer.Option(min=1, help="Photos that a worker takes at once.")] = 4,
    output_format: Annotated[str, typer.Option(help="parquet (key, image, error) or webdataset.")] = "parquet",
    steps: Annotated[int | None, typer.Option(min=1, help="Denoising steps.", show_default="the model's")] = None,
    fast: Annotated[bool, typer.Option("--fast", help="As in `moebius inpaint`.")] = False,
    seed: Annotated[int, typer.Option(min=0, help="Seed of each photo.")] = 0,
    mask_dilation: Annotated[
        int | None,
        typer.Option(min=0, help="Grow masks by so many pixels.", show_default="up to 8 at 512 px, over rims"),
    ] = None,
    recursive: Annotated[bool, typer.Option("--recursive", help="Look into a folder's folders.")] = False,
) -> None:
    """
    Fill many photos on a Ray cluster, or by several workers on this machine.

    A photo that cannot be done is a row with its error. What TARGET holds already is left out, so that the same
    command goes on where an interrupted one was.

    \b
    Examples:
      moebius batch photos/ results/ --masks masks/ --workers 2
      moebius batch s/shards/ s/results/ --address auto --workers 8 --gpus-per-worker 1 --model hustvl/Moebius
    """
    try:
        import ray

        from ..batch.cluster import inpaint_source, read_source
    except ModuleNotFoundError as error:
        if error.name not in ("ray", "pyarrow"):
            raise
        raise ValueError("`moebius batch` needs Ray: `pip install diffusers-moebius[ray]`.") from error
    ray.init(address, include_dashboard=None if address else False, log_to_driver=bool(address))
    load = {} if checkpoint is None else {"checkpoint": checkpoint}
    counts = inpaint_source(
        read_source(source, masks, recursive),
        target,
        output_format=output_format,
        model=model,
        load=load,
        fast=fast,
        masks=MaskOptions(dilation=mask_dilation),
        call={} if steps is None else {"num_inference_steps": steps},
        seed=seed,
        batch_size=batch_size,
        min_workers=workers,
        max_workers=max_workers,
        num_gpus=gpus_per_worker,
        num_cpus=cpus_per_worker,
    )
    note(f"{counts['filled']} photos filled, {counts['failed']} failed, {counts['done']} were done before")
    print(target)
    raise typer.Exit(1 if counts["failed"] else 0)
