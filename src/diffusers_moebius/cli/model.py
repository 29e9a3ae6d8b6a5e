"""The model that a command works with: its options, and how it is loaded."""

import math
import os
import re
import sys
from enum import Enum
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:  # Torch takes seconds to import: `--help` and bad arguments do without.
    import torch

    from ..pipelines.pipeline_moebius_inpaint import MoebiusInpaintPipeline

DEFAULT_MODEL = "nano"


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


def is_bundled(model: str) -> bool:
    """Whether a name is that of the model that is part of the package; a folder of that name goes before it."""
    return model == DEFAULT_MODEL and not os.path.isdir(model)


def load_pipeline(
    model: str, checkpoint: str | None, device: str, dtype: DType, vae: str | None = None
) -> "MoebiusInpaintPipeline":
    import diffusers
    import torch

    from .. import MoebiusInpaintPipeline

    torch_device = choose_device(device)
    if dtype is DType.auto:
        torch_dtype = torch.float16 if torch_device.type == "cuda" else torch.float32
    else:
        torch_dtype = getattr(torch, dtype.value)
    if Path(model, "unet", "model.onnx").is_file():
        from ..export import load_onnx_pipeline

        return load_onnx_pipeline(model)
    diffusers.utils.logging.disable_progress_bar()
    try:
        pipeline = MoebiusInpaintPipeline.from_pretrained(model, checkpoint=checkpoint, vae=vae, dtype=torch_dtype)
    except Exception as error:  # Broken weights, an unreachable hub and an odd config all raise errors of their own.
        raise ValueError(f"The model {model} cannot be loaded: {error}") from error
    finally:
        diffusers.utils.logging.enable_progress_bar()
    return pipeline.to(torch_device)


def make_scheduler(scheduler: Scheduler, other: Any) -> Any:
    import diffusers

    return getattr(diffusers, SCHEDULER_CLASSES[scheduler]).from_config(other.config)


def split_scale(lora: str) -> tuple[str, float]:
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


def add_adapters(pipeline: "MoebiusInpaintPipeline", adapters: list[tuple[str, float]]) -> None:
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


def check_device(device: str) -> None:
    """Refuses, before torch is imported, what can be known not to be there."""
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", device):
        raise ValueError(f"`--device` must be auto, cpu, cuda, cuda:N or mps, but is {device!r}.")
    kind = device.partition(":")[0]
    if kind == "mps" and sys.platform != "darwin":
        raise ValueError("`--device` mps is for Macs.")
    if kind == "cuda":
        version_file = Path(find_spec("torch").origin).with_name("version.py")
        build = version_file.read_text() if version_file.exists() else ""
        # AMD's build, which has hip, calls its devices cuda, too.
        if all(re.search(rf"^{name}\b.*=\s*None$", build, re.MULTILINE) for name in ("cuda", "hip")):
            raise ValueError(f"`--device` is {device}, but the PyTorch that is installed is a build without CUDA.")


def choose_device(device: str) -> "torch.device":
    """The device of a name, or for `auto` an accelerator where there is one."""
    import torch

    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if device == "auto":
        return torch.device(next(name for name in ("cuda", "mps", "cpu") if available[name]))
    chosen = torch.device(device)
    count = torch.cuda.device_count() if chosen.type == "cuda" else 1
    if not available[chosen.type] or (chosen.index or 0) >= count:
        raise ValueError(f"`--device` must be a device that PyTorch finds on this machine, but is {device!r}.")
    return chosen
