"""The `moebius` command: fills the marked part of photos, converts checkpoints and describes models."""

import json as json_module
import logging
import math
import os
import sys
import warnings
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, NoReturn

import typer
from PIL import Image

from .pictures.files import ImageMetadata, check_output, read_image, write_image

if TYPE_CHECKING:  # Torch takes seconds to import: `--help` and bad arguments do without.
    import torch

    from .pipelines.pipeline_moebius_inpaint import MoebiusInpaintPipeline

DEFAULT_MODEL = "nano"
FULL_MODEL_HINT = "for full quality add `--model hustvl/Moebius` (downloads about 1.2 GB once)"
PREVIEW_SIDE = 1024
TINY_AUTOENCODER = "madebyollin/taesdxl"  # has the latents of the published models


class Scheduler(str, Enum):
    """The schedulers by the names that the command knows them by."""

    ddim = "ddim"
    dpm = "dpm"
    unipc = "unipc"
    euler = "euler"
    euler_ancestral = "euler-ancestral"
    lcm = "lcm"


SCHEDULER_CLASSES = {
    Scheduler.ddim: "DDIMScheduler",
    Scheduler.dpm: "DPMSolverMultistepScheduler",
    Scheduler.unipc: "UniPCMultistepScheduler",
    Scheduler.euler: "EulerDiscreteScheduler",
    Scheduler.euler_ancestral: "EulerAncestralDiscreteScheduler",
    Scheduler.lcm: "LCMScheduler",
}


class DType(str, Enum):
    """The data types that weights can have."""

    auto = "auto"
    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"


class ExportFormat(str, Enum):
    """What `moebius export` writes."""

    onnx = "onnx"


class ExportDType(str, Enum):
    """The types in which exported weights are stored."""

    float32 = "float32"
    float16 = "float16"


class Paste(str, Enum):
    """The ways in which the filling comes into the photo."""

    auto = "auto"
    exact = "exact"
    seamless = "seamless"
    blur = "blur"
    none = "none"


class MaskedContent(str, Enum):
    """What the hole holds where the start is not pure noise."""

    original = "original"
    fill = "fill"
    noise = "noise"


class Job(NamedTuple):
    """One photo with its mask and the files to be written."""

    photo: Path
    masks: list[Path]  # One; more or none is an error of this photo alone.
    output: Path
    preview: Path | None


app = typer.Typer(
    name="moebius",
    help="Fill the marked part of photos with the Moebius inpainting model.",
    add_completion=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(value: bool) -> None:
    if value:
        from . import __version__

        print(f"moebius {__version__}")
        raise typer.Exit()


@app.callback()
def _moebius(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


ModelOption = Annotated[
    str,
    typer.Option(
        metavar="nano|REPO|FOLDER",
        help="The bundled model, a repository on the hub such as hustvl/Moebius, or a pipeline folder.",
    ),
]
CheckpointOption = Annotated[
    str | None,
    typer.Option(help="Folder of a published repository: pretrained, ft_places2, ft_celebahq or ft_ffhq."),
]


@app.command()
def inpaint(
    photo: Annotated[Path, typer.Argument(metavar="PHOTO", exists=True, help="A photo, or a folder of photos.")],
    mask: Annotated[
        Path,
        typer.Argument(
            metavar="MASK",
            exists=True,
            help="A picture of the photo's size: white is filled, black is kept. Or a folder of masks that are named"
            " like their photos; the suffix may differ.",
        ),
    ],
    output: Annotated[
        Path,
        typer.Option(
            "-o",
            "--output",
            help="The picture to be written, whose suffix decides the format, or a folder.",
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
        typer.Option("--fast", help="Few steps where the model takes many, and weights prepared for speed."),
    ] = False,
    seed: Annotated[int, typer.Option(min=0, help="Another seed, another filling.")] = 0,
    crop_margin: Annotated[
        int,
        typer.Option(min=0, help="Work on the mask's box and this many pixels around it, at full sharpness."),
    ] = 64,
    no_crop: Annotated[bool, typer.Option("--no-crop", help="Work on the whole photo instead.")] = False,
    mask_threshold: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=1,
            help="Fill where a grey mask is at least so bright, as a share of white.",
            show_default="grey is an error",
        ),
    ] = None,
    mask_dilation: Annotated[int, typer.Option(min=0, help="Grow the mask by this many pixels.")] = 0,
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
    preview: Annotated[
        bool, typer.Option("--preview", help="Also write OUTPUT.preview.png: photo, mask and result side by side.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace outputs that exist already.")] = False,
) -> None:
    """
    Fill the white part of MASK in PHOTO.

    The output keeps the photo's size, ICC profile, EXIF and format, upright. Paths of written files go to standard
    output, everything else to standard error. With folders every photo is done, what cannot be done is reported, and
    photos whose output exists already are left out, so that an interrupted run goes on where it was.

    \b
    Examples:
      moebius inpaint photo.jpg mask.png -o result.jpg
      moebius inpaint photo.jpg mask.png -o result.jpg --model hustvl/Moebius
      moebius inpaint photos/ masks/ -o results/
    """
    if strength is not None and not 0 < strength <= 1:
        raise ValueError(f"`--strength` must be above 0 and at most 1, but is {strength}.")
    if model == DEFAULT_MODEL and checkpoint is not None:
        raise ValueError(f"`--checkpoint` is for published repositories, but the model is {model!r}.")
    adapters = [_split_scale(value) for value in lora or []]
    many = photo.is_dir()
    failures = 0

    def attempt(action: Callable[..., Any], job: Job, *arguments: Any) -> Any:
        """Does something with a picture; with a folder of them a bad one does not end the others."""
        nonlocal failures
        try:
            return action(job, *arguments)
        except (ValueError, OSError) as error:
            if not many:
                raise
            failures += 1
            _note(f"error: {_one_line(error)}")

    jobs = _list_jobs(photo, mask, output, preview)
    if many and not overwrite:
        finished = [job for job in jobs if job.output.exists()]
        if finished:
            _note(f"{len(finished)} outputs exist already and are left as they are (`--overwrite` replaces them)")
        jobs = [job for job in jobs if not job.output.exists()]
    # All pictures are looked at before the model is, so that what is wrong shows at once.
    jobs = [job for job in jobs if attempt(_read_job, job, mask_threshold, overwrite)]
    if jobs:
        if model == DEFAULT_MODEL:
            _note(f"using the small model {model!r} that comes with the package; {FULL_MODEL_HINT}")
        pipeline = _load_pipeline(model, checkpoint, device, dtype)
        _add_adapters(pipeline, adapters)
        if fast:
            pipeline.use_few_steps().prepare_for_inference()
        if scheduler is not None:
            pipeline.scheduler = _make_scheduler(scheduler, pipeline.scheduler)
        options = {
            "num_inference_steps": steps,
            "guidance_scale": guidance,
            "strength": strength,
            "masked_content": masked_content.value,
            "padding_mask_crop": None if no_crop else crop_margin,
            "mask_dilation": mask_dilation,
            "paste": None if paste is Paste.none else paste.value,
            "color_compensation": color_compensation,
        }
        for job in jobs:
            for path in attempt(_inpaint_job, job, pipeline, mask_threshold, seed, options, overwrite) or []:
                print(path, flush=True)
    if failures:
        _note(f"{failures} of the photos could not be done")
        raise typer.Exit(1)


@app.command()
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
    from . import convert_release_checkpoint

    print(convert_release_checkpoint(source, target, config=config, vae=vae, overwrite=overwrite))


@app.command()
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
            help="Another autoencoder; tiny is madebyollin/taesdxl, which has the latents of the published models.",
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
    from .export import export_onnx, parse_size

    sizes = [parse_size(value) for value in size] if size else None
    pipeline = _load_pipeline(model, checkpoint, "cpu", DType.float32, vae=vae)
    print(export_onnx(pipeline, target, sizes=sizes, dtype=dtype.value, overwrite=overwrite))


@app.command()
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
    pipeline = _load_pipeline(model, checkpoint, "cpu", DType.auto)
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


@app.command()
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
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        from .demo import VisitorError, launch_demo
    except ModuleNotFoundError as error:
        if error.name != "gradio":
            raise
        raise ValueError("The demo needs gradio: install it with `pip install diffusers-moebius[demo]`.") from error

    try:
        launch_demo(model, host=host, port=port, share=share)
    except VisitorError as error:
        raise ValueError(f"`--model`: {error}") from error


@app.command()
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
    pipeline = _load_pipeline(model, checkpoint, "cpu", DType.float32)
    try:
        commit = pipeline.push_to_hub(repository, private=private or None)
    except Exception as error:  # A wrong name, no token, no network: the hub's client has an error for each.
        raise ValueError(f"{model} cannot be pushed to {repository}: {error}") from error
    print(commit.commit_url)


def _list_jobs(photo: Path, mask: Path, output: Path, preview: bool) -> list[Job]:
    def job(photo: Path, masks: list[Path], output: Path) -> Job:
        return Job(photo, masks, output, output.with_name(f"{output.name}.preview.png") if preview else None)

    if not photo.is_dir():
        if mask.is_dir():
            raise ValueError(f"MASK must be a file, as PHOTO is, but {mask} is a folder.")
        return [job(photo, [mask], output / photo.name if output.is_dir() else output)]

    if output.exists() and not output.is_dir():
        raise ValueError(f"`--output` must be a folder, as PHOTO is, but {output} is a file.")
    if output.exists() and output.samefile(photo):
        raise ValueError(f"`--output` must be another folder than PHOTO, but both are {output}.")
    photos = _pictures_in(photo)
    if not photos:
        raise ValueError(f"PHOTO must hold pictures, but there are none in the folder {photo}.")
    masks_of: dict[str, list[Path]] = {}
    for path in _pictures_in(mask) if mask.is_dir() else []:
        masks_of.setdefault(path.stem, []).append(path)
    jobs = []
    for path in photos:
        masks = masks_of.get(path.stem, []) if mask.is_dir() else [mask]
        same_name = [candidate for candidate in masks if candidate.name == path.name]
        jobs.append(job(path, same_name or masks, output / path.name))
    output.mkdir(exist_ok=True)
    return jobs


def _pictures_in(folder: Path) -> list[Path]:
    suffixes = Image.registered_extensions()
    return sorted(
        path
        for path in folder.iterdir()
        if path.is_file() and path.suffix.lower() in suffixes and not path.name.startswith(".")
    )


def _read_job(
    job: Job, mask_threshold: float | None, overwrite: bool
) -> tuple[Image.Image, Image.Image, ImageMetadata]:
    if len(job.masks) != 1:
        raise ValueError(f"{job.photo} must have one mask of the same name, but has {len(job.masks)}.")
    photo, metadata = read_image(job.photo)
    mask, _ = read_image(job.masks[0])
    if photo.size != mask.size:
        raise ValueError(
            f"MASK must have the size of PHOTO, but {job.masks[0]} is {mask.width}×{mask.height} pixels and"
            f" {job.photo} {photo.width}×{photo.height}."
        )
    check_output(job.output, photo.mode, metadata, overwrite)
    if job.preview is not None:
        check_output(job.preview, "RGB", overwrite=overwrite)

    from .pictures.mask import load_masks, mask_values
    from .pictures.picture import load_pictures

    try:
        values = mask_values(mask) if mask_threshold is not None else None
        mask = load_masks(mask if values is None else values >= mask_threshold, load_pictures(photo))[0]
    except ValueError as error:
        hint = "" if mask_threshold is not None else " The command does that with `--mask-threshold 0.5`."
        raise ValueError(f"{job.masks[0]} with {job.photo}: {error}{hint}") from error
    return photo, Image.fromarray(mask), metadata


def _inpaint_job(
    job: Job,
    pipeline: "MoebiusInpaintPipeline",
    mask_threshold: float | None,
    seed: int,
    options: dict[str, Any],
    overwrite: bool,
) -> list[Path]:
    import torch
    from diffusers.utils import make_image_grid, numpy_to_pil

    from .pictures.picture import load_pictures

    photo, mask, metadata = _read_job(job, mask_threshold, overwrite)
    pipeline.set_progress_bar_config(desc=job.photo.name, disable=None)
    try:
        # From the processor's generator, so that a seed means the same picture on every device.
        generator = torch.Generator().manual_seed(seed)
        result = pipeline(image=photo, mask_image=mask, generator=generator, **options).images[0]
    except torch.OutOfMemoryError as error:
        raise ValueError(
            f"{job.photo} takes more memory than the device has; `--device cpu` may have more."
        ) from error
    if not mask.getbbox():
        _note(f"warning: nothing in {job.masks[0]} is white, so {job.photo} stays as it is")
    write_image(result, job.output, metadata, overwrite)
    if job.preview is None:
        return [job.output]
    pictures = [numpy_to_pil(picture.rgb())[0] for picture in load_pictures([photo, mask, result])]
    for picture in pictures:
        picture.thumbnail((PREVIEW_SIDE, PREVIEW_SIDE))
    write_image(make_image_grid(pictures, rows=1, cols=3), job.preview, overwrite=overwrite)
    return [job.output, job.preview]


def _load_pipeline(
    model: str, checkpoint: str | None, device: str, dtype: DType, vae: str | None = None
) -> "MoebiusInpaintPipeline":
    import diffusers
    import torch

    from . import MoebiusInpaintPipeline, bundled_checkpoint

    torch_device = _choose_device(device)
    if dtype is DType.auto:
        torch_dtype = torch.float16 if torch_device.type == "cuda" else torch.float32
    else:
        torch_dtype = getattr(torch, dtype.value)
    source = bundled_checkpoint(model) if model == DEFAULT_MODEL else model
    diffusers.utils.logging.disable_progress_bar()
    try:
        vae = TINY_AUTOENCODER if vae == "tiny" else vae
        pipeline = MoebiusInpaintPipeline.from_pretrained(source, checkpoint=checkpoint, vae=vae, dtype=torch_dtype)
    except Exception as error:  # Broken weights, an unreachable hub and an odd config all raise errors of their own.
        raise ValueError(f"The model {model} cannot be loaded: {error}") from error
    finally:
        diffusers.utils.logging.enable_progress_bar()
    return pipeline.to(torch_device)


def _make_scheduler(scheduler: Scheduler, other: Any) -> Any:
    import diffusers

    return getattr(diffusers, SCHEDULER_CLASSES[scheduler]).from_config(other.config)


def _split_scale(lora: str) -> tuple[str, float]:
    source, colon, scale = lora.rpartition(":")
    if not colon or os.path.exists(lora):
        return lora, 1.0
    try:
        number = float(scale)
    except ValueError:
        number = math.nan
    if not source or not math.isfinite(number):
        raise ValueError(f"`--lora` must be a folder, a file or a repository, or that and :SCALE, but is {lora!r}.")
    return source, number


def _add_adapters(pipeline: "MoebiusInpaintPipeline", adapters: list[tuple[str, float]]) -> None:
    if not adapters:
        return
    names = [f"adapter_{number}" for number in range(len(adapters))]
    for name, (source, _) in zip(names, adapters):
        try:
            pipeline.load_lora_weights(source, adapter_name=name)
        except Exception as error:  # As for models, each kind of trouble has an error of its own.
            raise ValueError(f"`--lora` {source} cannot be loaded: {error}") from error
    pipeline.set_adapters(names, [scale for _, scale in adapters])
    pipeline.fuse_lora()  # costs no time in the steps


def _choose_device(device: str) -> "torch.device":
    import torch

    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if device == "auto":
        return torch.device(next(name for name in ("cuda", "mps", "cpu") if available[name]))
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise ValueError(f"`--device` must be auto, cpu, cuda, cuda:N or mps, but is {device!r}.") from None
    count = torch.cuda.device_count() if chosen.type == "cuda" else 1
    if not available.get(chosen.type) or (chosen.index or 0) >= count:
        raise ValueError(f"`--device` must be a device that PyTorch finds on this machine, but is {device!r}.")
    return chosen


def _describe(pipeline: "MoebiusInpaintPipeline") -> dict[str, Any]:
    import torch
    from torch.utils.flop_counter import FlopCounterMode

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

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, device="meta", dtype=dtype)

    tokens = empty(1, pipeline.lcg_embedder.context_length, pipeline.lcg_embedder.config.embedding_dim)
    calls = {
        "unet_evaluation": lambda: unet(empty(1, unet.config.in_channels, side, side), empty(1), tokens),
        "vae_encoding": lambda: vae.encode(empty(1, 3, pixels, pixels)),
        "vae_decoding": lambda: vae.decode(empty(1, unet.config.out_channels, side, side)),
    }
    multiply_adds = {}
    for name, call in calls.items():
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            call()
        multiply_adds[name] = counter.get_total_flops() // 2
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


def _note(text: str) -> None:
    print(f"moebius: {text}", file=sys.stderr)


def _one_line(error: Exception | str) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def main(arguments: list[str] | None = None) -> NoReturn:
    """
    Runs the `moebius` command and exits: 0 if all is done, 1 if some photos of a folder are not, 2 on a bad argument,
    130 when interrupted. An error is one line on standard error.

    Args:
        arguments (`list[str]`, *optional*): Command-line arguments; those of the process if not given.
    """
    try:
        with warnings.catch_warnings():
            # What the libraries below say is nothing that the command's user can change; errors say what is wrong.
            os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
            logging.disable(logging.WARNING)
            warnings.simplefilter("ignore")
            warnings.filterwarnings("default", module="diffusers_moebius")
            warnings.showwarning = lambda message, *_args, **_kwargs: _note(f"warning: {_one_line(message)}")
            arguments = sys.argv[1:] if arguments is None else arguments
            code = app(args=arguments or ["--help"], prog_name="moebius", standalone_mode=False) or 0
        sys.stdout.flush()
    except (BrokenPipeError, SystemExit):
        # Nobody reads the output any more, for which Typer exits. What is left in the buffer would raise once more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.__stdout__.fileno())
        code = 130
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    except Exception as error:
        # Usage errors have a message of their own; all else that users can cause is a ValueError or an OSError.
        if hasattr(error, "format_message"):
            message = error.format_message()
        elif isinstance(error, (ValueError, OSError)):
            message = error
        else:
            raise
        _note(f"error: {_one_line(message)}")
        code = 2
    finally:
        logging.disable(logging.NOTSET)
    sys.exit(code)
