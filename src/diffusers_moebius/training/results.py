"""What a run leaves behind: the weights, the model card with the command, data and curves, and the upload."""

import argparse
import logging
import shlex
import sys
from importlib.metadata import version
from itertools import islice
from pathlib import Path

from huggingface_hub import HfApi, ModelCard, ModelCardData
from matplotlib.figure import Figure
from torch import nn
from torch.optim.swa_utils import update_bn
from tqdm.auto import tqdm

from ..loaders.model_card import PAPER, hub_repository
from ..models.fusion import adapter_layers
from .adapters import has_adapter, save_adapter
from .checkpoints import list_checkpoints
from .data import describe_dataset
from .loop import TrainingLoop

logger = logging.getLogger(__name__)
RECALIBRATION_BATCHES = 50
DEFAULTS = ("default_num_inference_steps", "default_guidance_scale", "default_strength", "default_guidance_start")
PACKAGES = ("diffusers-moebius", "diffusers", "torch", "accelerate")
LORA_TEXT = """# {title}

A LoRA adapter for {base}, a [Moebius](https://arxiv.org/abs/{paper}) pipeline for image inpainting.

## Use

```python
import torch
from diffusers.utils import load_image
from diffusers_moebius import MoebiusInpaintPipeline

pipe = MoebiusInpaintPipeline.from_pretrained("{location}", dtype=torch.float16).to("cuda")
pipe.load_lora_weights("{name}")
pipe.fuse_lora(lora_scale=1.0)  # a smaller scale has less effect
{setup}photo, mask = load_image("photo.png"), load_image("mask.png")  # white is filled
result = pipe(image=photo, mask_image=mask).images[0]
```

{command}Rank {rank}, beside {layers} layers: {targets}.
"""


def plot_curves(rows: list[dict[str, str]], path: Path) -> bool:
    """Draws the columns of `loss.csv` over the steps, if there are any; returns whether it did."""
    names = [name for name in rows[0] if name not in ("step", "lr", "skipped")] if rows else []
    if not names:
        return False
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    steps = [int(row["step"]) for row in rows]
    for name in names:
        axes.plot(steps, [float(row[name]) for row in rows], label=name)
    axes.set_xlabel("step")
    if all(float(row[name]) > 0 for row in rows for name in names):
        axes.set_yscale("log")
    axes.legend()
    figure.savefig(path)
    return True


def make_lora_card(pipeline, loop: TrainingLoop) -> ModelCard:
    """
    The model card of the adapter `default` of a pipeline.

    Args:
        pipeline ([`MoebiusInpaintPipeline`]): The pipeline with the adapter.
        loop ([`TrainingLoop`]): Its run.
    """
    config = pipeline.unet.peft_config["default"]
    base = hub_repository(loop.args.pretrained_model_name_or_path)
    name, setup = loop.run_name, ""
    location = base or Path(loop.args.pretrained_model_name_or_path).name
    command = f"Or `moebius inpaint photo.png mask.png -o result.png --model {location} --lora {name}`. "
    if hasattr(loop.args, "num_inference_steps"):  # for few steps: what a file of weights cannot say
        pipeline.scheduler.save_pretrained(loop.output_dir / "scheduler")
        values = ", ".join(f"{name}={pipeline.config[name]}" for name in DEFAULTS)
        setup = (
            'pipe.scheduler = pipe.scheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing")\n'
            f"pipe.register_to_config({values})\n"
        )
        command = ""  # the command line sets no timestep spacing
    data = ModelCardData(
        library_name="diffusers",
        pipeline_tag="image-to-image",  # the hub has no tag for inpainting
        tags=["lora", "inpainting", "image-inpainting", "moebius", f"arxiv:{PAPER}"],
        base_model=base,
    )
    text = LORA_TEXT.format(
        title=name.rpartition("/")[2],
        name=name,
        base=f"[{base}](https://huggingface.co/{base})" if base else "a model that was in a folder",
        location=location,
        paper=PAPER,
        setup=setup,
        command=command,
        rank=config.r,
        layers=len(adapter_layers(pipeline.unet)),
        targets=", ".join(f"`{target}`" for target in sorted(config.target_modules)),
    )
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}")


def training_section(loop: TrainingLoop, data: str, scores: dict[str, float] | None) -> str:
    """The part of a model card that says how the weights came about, in Markdown."""
    args = loop.args
    words = [Path(sys.argv[0]).name, *_arguments_without_paths_of_this_machine(args)]
    lines = [
        "## Training",
        "",
        f"{loop.step:,} steps of {args.train_batch_size * args.gradient_accumulation_steps} samples on each of"
        f" {loop.accelerator.num_processes} processes ({loop.accelerator.device.type},"
        f" mixed precision: {args.mixed_precision}), {loop.skipped} of them skipped. Data: {data}.",
        "",
        "```bash",
        "accelerate launch " + " ".join(shlex.quote(word) for word in words),
        "```",
        "",
        "Versions: " + ", ".join(f"{name} {version(name)}" for name in PACKAGES) + ".",
    ]
    if scores:
        lines += [
            "",
            "| validation | |",
            "|---|---|",
            *(f"| {name} | {value:.4f} |" for name, value in scores.items()),
        ]
    if plot_curves(loop.log_rows(), loop.output_dir / "loss.png"):
        lines += ["", "![curves](loss.png)"]
    return "\n".join(lines) + "\n"


def _arguments_without_paths_of_this_machine(args: argparse.Namespace) -> list[str]:
    """The arguments that differ from None and False; of an absolute path only the last part."""
    words = [] if args.random_flip else ["--no-random_flip"]
    for name, value in vars(args).items():
        if value is None or value is False or name in ("resume_from_checkpoint",):
            continue
        values = [] if value is True else value if isinstance(value, list) else [value]
        words += [f"--{name}", *(Path(str(v)).name if Path(str(v)).is_absolute() else str(v) for v in values)]
    return words


def add_to_card(folder: Path, section: str) -> None:
    """Puts a section in front of the licence of the model card in a folder, or at the end of a card without one."""
    path = folder / "README.md"
    text = path.read_text(encoding="utf-8")
    marker = "\n## Licence\n"
    head, found, tail = text.partition(marker)
    ModelCard(f"{head}\n{section}{found}{tail}", ignore_metadata_errors=True).save(path)


def push_results(loop: TrainingLoop) -> None:
    """Uploads the folder of the run without its checkpoints and logs, if `push_to_hub` is set."""
    args = loop.args
    if not args.push_to_hub:
        return
    repo_id = loop.repo_id
    ignored = [f"{folder.name}/*" for folder in list_checkpoints(loop.output_dir)]
    HfApi().upload_folder(
        repo_id=repo_id,
        folder_path=loop.output_dir,
        commit_message=f"Training, {loop.step} steps",
        ignore_patterns=[*ignored, "partial-*/*", f"{args.logging_dir}/*", "args.json"],
    )
    logger.info("uploaded to %s", repo_id)


def save_parts(pipeline, folder: Path) -> None:
    """Writes what a run trains of a pipeline into a folder: the adapter, or U-Net, embedder and perhaps decoder."""
    if has_adapter(pipeline.unet):
        save_adapter(pipeline, folder)
    else:
        pipeline.unet.save_pretrained(folder / "unet")
        pipeline.lcg_embedder.save_pretrained(folder / "lcg_embedder")
        if any(parameter.requires_grad for parameter in pipeline.vae.parameters()):
            pipeline.vae.save_pretrained(folder / "vae")
    pipeline.scheduler.save_pretrained(folder / "scheduler")


class _OfNoised(nn.Module):
    """A denoiser as a function of one argument, a `NoisedBatch`."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, noised):
        return self.model(noised.model_input, noised.timesteps, noised.category_ids)


def write_results(loop: TrainingLoop, pipeline, dataset, scores: dict[str, float], noise=None) -> None:
    """
    Writes the pipeline or the adapter of a finished run, averaged, with its model card, and uploads it if asked to.

    The statistics of BatchNorm belong to the weights that were trained; for the averaged ones they are measured anew,
    on the batches that would have come next. To be called in all processes.

    Args:
        loop ([`TrainingLoop`]): The run.
        pipeline ([`MoebiusInpaintPipeline`]): The pipeline of which the run trained the U-Net or an adapter.
        dataset: The dataset of the run.
        scores (`dict[str, float]`): The last validation, for the card.
        noise (callable, *optional*): Makes a `NoisedBatch` of a batch and the generators of its samples; needed unless
            BatchNorm's statistics are frozen.
    """
    args = loop.args
    with loop.averaged_weights() as model:
        if not args.freeze_batch_norm:
            batches = (noise(*batch) for batch in islice(loop.upcoming, RECALIBRATION_BATCHES))
            update_bn(tqdm(batches, "BatchNorm statistics", RECALIBRATION_BATCHES, mininterval=5), _OfNoised(model))
        if not loop.is_main:
            return
        if has_adapter(pipeline.unet):
            save_adapter(pipeline, loop.output_dir)
            make_lora_card(pipeline, loop).save(loop.output_dir / "README.md")
        else:
            pipeline.save_pretrained(loop.output_dir)
    add_to_card(loop.output_dir, training_section(loop, describe_dataset(args, dataset), scores))
    logger.info("wrote the result to %s", loop.output_dir)
    push_results(loop)
