"""`moebius inpaint`."""

import gc
import os
from contextlib import nullcontext
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..batch.photo import MaskOptions, prepare_pipeline
from ..batch.run import inpaint_items
from ..batch.sinks import FileSink, ShardSink, named_in
from ..batch.sources import Source, find_photos
from .messages import note
from .model import (
    DEFAULT_MODEL,
    CheckpointOption,
    DType,
    ModelOption,
    Scheduler,
    add_adapters,
    check_device,
    is_bundled,
    load_pipeline,
    make_scheduler,
    split_scale,
)
from .progress import Progress, finish_what_runs

if TYPE_CHECKING:
    from ..pipelines.pipeline_moebius_inpaint import MoebiusInpaintPipeline

FULL_MODEL_HINT = "for full quality add `--model hustvl/Moebius` (downloads about 1.2 GB once)"
OUTPUT_PATTERN = "{folder}/{name}"


class Paste(str, Enum):
    """The ways in which the filling comes into the photo."""

    auto = "auto"
    exact = "exact"
    seamless = "seamless"
    blur = "blur"
    none = "none"


class Detail(str, Enum):
    """The ways in which the filling gets texture from the photo itself."""

    auto = "auto"
    patches = "patches"
    enlarged = "enlarged"
    none = "none"


class MaskedContent(str, Enum):
    """What the hole holds where the start is not pure noise."""

    original = "original"
    fill = "fill"
    noise = "noise"


class MaskSource(str, Enum):
    """What of a mask says which pixels are filled."""

    auto = "auto"
    alpha = "alpha"
    transparent = "transparent"
    luminance = "luminance"


class OutputFormat(str, Enum):
    """How results of many photos are stored."""

    files = "files"
    webdataset = "webdataset"
    parquet = "parquet"


def inpaint(
    photo: Annotated[
        Path,
        typer.Argument(
            metavar="PHOTO",
            exists=True,
            help="A photo; a folder of photos; or WebDataset shards (.tar, NAME.jpg with NAME.mask.png) or Parquet"
            " files (columns image and mask), one or a folder of them.",
        ),
    ],
    mask: Annotated[
        Path | None,
        typer.Argument(
            metavar="MASK",
            exists=True,
            help="A picture of the photo's size or aspect ratio: white is filled, black is kept. If it has an alpha"
            " channel, opaque is filled and transparent is kept, whatever the colour (see --mask-from). Or a folder of"
            " masks that are named like their photos; the suffix may differ.",
        ),
    ] = None,
    *,
    output: Annotated[
        str,
        typer.Option(
            "-o",
            "--output",
            metavar="FILE|FOLDER",
            help="The picture to be written, whose suffix decides the format, or a folder; `results/` is a folder even"
            " if it does not exist yet.",
        ),
    ],
    model: ModelOption = DEFAULT_MODEL,
    checkpoint: CheckpointOption = None,
    lora: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FOLDER|FILE|REPO[:SCALE]",
            help="A LoRA adapter for the model, with a weight other than 1 after a colon. May be given several times.",
        ),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, max=1000, help="Denoising steps.", show_default="the model's")
    ] = None,
    guidance: Annotated[
        float | None, typer.Option(help="Guidance scale; 1 or less turns guidance off.", show_default="the model's")
    ] = None,
    strength: Annotated[
        float | None,
        typer.Option(
            help="How much of the old content is replaced by noise, above 0 and up to 1.", show_default="the model's"
        ),
    ] = None,
    masked_content: Annotated[
        MaskedContent,
        typer.Option(help="What the hole starts from with a strength below 1; fill continues the colours around it."),
    ] = MaskedContent.original,
    fast: Annotated[
        bool,
        typer.Option(
            "--fast",
            help="Few steps where the model takes many, and a tiny decoder for the published models: sooner,"
            " with other results.",
        ),
    ] = False,
    seed: Annotated[int, typer.Option(min=0, help="Another seed, another filling.")] = 0,
    crop_margin: Annotated[
        int,
        typer.Option(min=0, help="Work on the mask's box and this many pixels around it, at full sharpness."),
    ] = 64,
    no_crop: Annotated[bool, typer.Option("--no-crop", help="Work on the whole photo instead.")] = False,
    mask_from: Annotated[
        MaskSource,
        typer.Option(
            help="What is filled: luminance: white; alpha: opaque; transparent: transparent, as some interfaces have"
            " it; auto: opaque if something is transparent, else white."
        ),
    ] = MaskSource.auto,
    invert_mask: Annotated[
        bool, typer.Option("--invert-mask", help="Fill what the mask would keep, and keep what it would fill.")
    ] = False,
    mask_threshold: Annotated[
        float,
        typer.Option(min=0, max=1, help="Fill where a grey mask is at least so bright, as a share of white."),
    ] = 0.5,
    mask_dilation: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Grow the mask by this many pixels; 0 leaves it as it is.",
            show_default="up to 8 at 512 pixels, where the rim or shadow of an object is seen beside it",
        ),
    ] = None,
    resize_mask: Annotated[
        bool, typer.Option("--resize-mask", help="Stretch a mask whose aspect ratio is not the photo's.")
    ] = False,
    detail: Annotated[
        Detail,
        typer.Option(
            help="Texture from the photo itself. patches: copied from around each hole, led by the model's filling"
            " where that helps; enlarged: only where the model works below the photo's size, always led; none: the"
            " model's filling alone; auto: enlarged, or patches with nano."
        ),
    ] = Detail.auto,
    paste: Annotated[
        Paste,
        typer.Option(
            help="exact: nothing changes outside the mask; seamless: nor there, and the filling's colours are moved to"
            " meet those around it; blur: soft edges across the mask's; none: all from the model; auto: exact, or"
            " seamless with nano."
        ),
    ] = Paste.auto,
    color_compensation: Annotated[
        bool, typer.Option("--color-compensation", help="Match the filling's colours to those around it.")
    ] = False,
    scheduler: Annotated[Scheduler | None, typer.Option(help="Sampler.", show_default="the model's")] = None,
    device: Annotated[
        str, typer.Option(help="cpu, cuda, cuda:1, mps; auto takes an accelerator where there is one.")
    ] = "auto",
    dtype: Annotated[
        DType, typer.Option(help="Type of the weights; auto is float16 on CUDA and float32 elsewhere.")
    ] = DType.auto,
    recursive: Annotated[
        bool, typer.Option("--recursive", help="Also photos in the folders of a folder, to any depth.")
    ] = False,
    batch_size: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Photos of one working size that run together.",
            show_default="1 on a CPU, by free memory on a GPU",
        ),
    ] = None,
    output_pattern: Annotated[
        str,
        typer.Option(
            help="Path of a result below the output folder, with {folder}, {name}, {stem} and {suffix} of the photo,"
            " such as {folder}/{stem}-clean.png.",
        ),
    ] = OUTPUT_PATTERN,
    output_format: Annotated[
        OutputFormat,
        typer.Option(help="Many photos as files, as WebDataset shards, or as Parquet (columns key and image)."),
    ] = OutputFormat.files,
    shard_size: Annotated[int, typer.Option(min=1, help="Photos a shard.")] = 100,
    report: Annotated[
        Path | None,
        typer.Option(
            dir_okay=False,
            help="A file to which one line of JSON is added a photo: photo, output, status, seconds, error.",
        ),
    ] = None,
    preview: Annotated[
        bool, typer.Option("--preview", help="Also write OUTPUT.preview.png: photo, mask and result side by side.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace outputs that exist already.")] = False,
) -> None:
    """
    Fill the white part of MASK in PHOTO.

    The output keeps the photo's size, ICC profile, EXIF and format, upright. Paths of written files go to standard
    output, everything else to standard error. Of many photos each is done, what cannot be done is reported, and those
    whose output exists already are left out, so that an interrupted run goes on where it was.

    \b
    Examples:
      moebius inpaint photo.jpg mask.png -o result.jpg
      moebius inpaint photo.jpg mask.png -o result.jpg --model hustvl/Moebius
      moebius inpaint photos/ masks/ -o results/
      moebius inpaint photos.tar -o results/ --output-format webdataset --report report.jsonl
    """
    if strength is not None and not 0 < strength <= 1:
        raise ValueError(f"`--strength` must be above 0 and at most 1, but is {strength}.")
    if not mask_threshold > 0:
        raise ValueError(f"`--mask-threshold` must be above 0, but is {mask_threshold}.")
    if is_bundled(model) and checkpoint is not None:
        raise ValueError(f"`--checkpoint` is for published repositories, but the model is {model!r}.")
    check_device(device)
    # Until the model is loaded nearly all objects stay; collecting garbage among them takes a third of a short run.
    gc.disable()
    adapters = [split_scale(value) for value in lora or []]
    source = find_photos(photo, mask, recursive)
    if source.has_folders:
        note(f"{photo} has folders in it, which are left out; `--recursive` takes them, too")
    sink = _make_sink(source, photo, output, output_pattern, output_format, shard_size, overwrite, preview)

    def load() -> "MoebiusInpaintPipeline":
        if is_bundled(model):
            note(f"using the small model {model!r} that comes with the package; {FULL_MODEL_HINT}")
        pipeline = load_pipeline(model, checkpoint, device, dtype)
        add_adapters(pipeline, adapters)
        prepare_pipeline(pipeline, fast)
        if scheduler is not None:
            pipeline.scheduler = make_scheduler(scheduler, pipeline.scheduler)
        # One bar: of the steps for one photo, of the photos for many.
        pipeline.set_progress_bar_config(desc=photo.name, disable=None if source.is_single else True)
        progress.is_running = True
        gc.freeze()
        gc.enable()
        return pipeline

    masks = MaskOptions(mask_threshold, mask_from.value, invert_mask, resize_mask, mask_dilation)
    options = {
        "num_inference_steps": steps,
        "guidance_scale": guidance,
        "strength": strength,
        "masked_content": masked_content.value,
        "padding_mask_crop": None if no_crop else crop_margin,
        "detail": None if detail is Detail.none else detail.value,
        "paste": None if paste is Paste.none else paste.value,
        "color_compensation": color_compensation,
    }
    run = {"masks": masks, "options": options, "seed": seed, "batch_size": batch_size}
    with open(report, "a", encoding="utf-8") if report else nullcontext() as report_file:
        progress = Progress(source, report_file)
        if source.is_single:
            try:
                (outcome,) = inpaint_items(source.items, sink, load, **run)
            except KeyboardInterrupt:
                note("stopped; nothing is written")
                raise
            if outcome.error is not None:
                progress.write_report(outcome)
                raise outcome.error
            progress.add(outcome)
            return
        with progress.bar(), finish_what_runs(progress) as stopped:
            items = source.items if overwrite else progress.without_finished(source.items, sink)
            try:
                for outcome in inpaint_items(items, sink, load, is_stopped=stopped.is_set, **run):
                    progress.add(outcome)
            finally:
                progress.show_paths(sink.close())
    raise typer.Exit(progress.close(stopped.is_set()))


def _make_sink(
    source: Source,
    photo: Path,
    output: str,
    pattern: str,
    output_format: OutputFormat,
    shard_size: int,
    overwrite: bool,
    preview: bool,
) -> FileSink | ShardSink:
    target = Path(output)
    is_folder = target.is_dir() or output.endswith(("/", os.sep))
    if source.is_single:
        if output_format is not OutputFormat.files:
            raise ValueError(f"`--output-format` {output_format.value} is for many photos, but {photo} is one.")
        return FileSink(named_in(target, pattern) if is_folder else lambda item: target, overwrite, preview)
    if target.exists() and not target.is_dir():
        raise ValueError(f"`--output` must be a folder, as PHOTO is, but {output} is a file.")
    if target.exists() and target.samefile(photo):
        raise ValueError(f"`--output` must be another folder than PHOTO, but both are {output}.")
    if output_format is OutputFormat.files:
        return FileSink(named_in(target, pattern), overwrite, preview)
    if preview or overwrite or pattern != OUTPUT_PATTERN:
        raise ValueError("`--preview`, `--overwrite` and `--output-pattern` are for `--output-format` files.")
    return ShardSink(target, {"webdataset": ".tar", "parquet": ".parquet"}[output_format.value], shard_size)
