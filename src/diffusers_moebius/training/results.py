"""What a run leaves behind: the weights, the model card with the command, data and curves, and the upload."""

import argparse
import logging
import shlex
import sys
from importlib.metadata import version
from itertools import islice
from pathlib import Path

from huggingface_hub import HfApi, ModelCard
from matplotlib.figure import Figure
from torch.optim.swa_utils import update_bn
from tqdm.auto import tqdm

from ..loaders.model_card import make_lora_card
from .data import describe_dataset
from .denoiser import adapter_weights, has_adapter
from .loop import TrainingLoop

logger = logging.getLogger(__name__)
RECALIBRATION_BATCHES = 50
PACKAGES = ("diffusers-moebius", "diffusers", "torch", "accelerate")


def plot_curves(rows: list[dict], path: Path) -> None:
    """Draws the columns of `loss.csv` over the steps."""
    names = [name for name in rows[0] if name not in ("step", "lr", "skipped")]
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


def training_section(loop: TrainingLoop, scores: dict[str, float]) -> str:
    """The part of a model card that says how the weights came about, in Markdown."""
    args, accelerator = loop.args, loop.accelerator
    words = [Path(sys.argv[0]).name, *_arguments_without_paths_of_this_machine(args)]
    text = f"""## Training

{loop.step:,} steps of {args.train_batch_size * args.gradient_accumulation_steps} samples on each of \
{accelerator.num_processes} processes ({accelerator.device.type}, mixed precision: {args.mixed_precision}), \
{loop.skipped} of them skipped. Data: {describe_dataset(args, loop.dataset)}.

```bash
accelerate launch {shlex.join(words)}
```

Versions: {", ".join(f"{name} {version(name)}" for name in PACKAGES)}.
"""
    if scores:
        text += "\n| validation | |\n|---|---|\n"
        text += "".join(f"| {name} | {value:.4f} |\n" for name, value in scores.items())
    if loop.log_rows:
        plot_curves(loop.log_rows, loop.output_dir / "loss.png")
        text += "\n![curves](loss.png)\n"
    return text


def _arguments_without_paths_of_this_machine(args: argparse.Namespace) -> list[str]:
    """The arguments that differ from None and False; of an absolute path only the last part."""
    words = [] if args.random_flip else ["--no-random_flip"]
    for name, value in vars(args).items():
        if value is None or value is False or name == "resume_from_checkpoint":
            continue
        values = [] if value is True else value if isinstance(value, list) else [value]
        words += [f"--{name}", *(Path(str(v)).name if Path(str(v)).is_absolute() else str(v) for v in values)]
    return words


def add_to_card(folder: Path, section: str) -> None:
    """Puts a section in front of the licence of the model card in a folder, or at the end of a card without one."""
    path = folder / "README.md"
    head, found, tail = path.read_text(encoding="utf-8").partition("\n## Licence\n")
    ModelCard(f"{head}\n{section}{found}{tail}", ignore_metadata_errors=True).save(path)


def push_results(loop: TrainingLoop) -> None:
    """Uploads the folder of the run without its checkpoints and logs, if `push_to_hub` is set."""
    args = loop.args
    logger.info("wrote the result to %s", loop.output_dir)
    if not args.push_to_hub:
        return
    HfApi().upload_folder(
        repo_id=loop.repo_id,
        folder_path=loop.output_dir,
        commit_message=f"Training, {loop.step} steps",
        ignore_patterns=["checkpoint-*/*", "partial-*/*", f"{args.logging_dir}/*", "args.json"],
    )
    logger.info("uploaded to %s", loop.repo_id)


def save_parts(pipeline, folder: Path) -> None:
    """Writes what a run trains of a pipeline into a folder: the adapter, or U-Net, embedder and perhaps decoder."""
    if has_adapter(pipeline.unet):  # as diffusers' pipelines load it
        metadata = pipeline.unet.peft_config["default"].to_dict()
        pipeline.save_lora_weights(folder, adapter_weights(pipeline.unet), unet_lora_adapter_metadata=metadata)
    else:
        pipeline.unet.save_pretrained(folder / "unet")
        pipeline.lcg_embedder.save_pretrained(folder / "lcg_embedder")
        if any(parameter.requires_grad for parameter in pipeline.vae.parameters()):
            pipeline.vae.save_pretrained(folder / "vae")
    pipeline.scheduler.save_pretrained(folder / "scheduler")


def write_results(loop: TrainingLoop, pipeline, scores: dict[str, float], noise=None) -> None:
    """
    Writes the pipeline or the adapter of a finished run, averaged, with its model card, and uploads it if asked to.

    The statistics of BatchNorm belong to the weights that were trained; for the averaged ones they are measured anew,
    on the batches that would have come next. To be called in all processes.

    Args:
        loop ([`TrainingLoop`]): The run.
        pipeline ([`MoebiusInpaintPipeline`]): The pipeline of which the run trained the U-Net or an adapter.
        scores (`dict[str, float]`): The last validation, for the card.
        noise (callable, *optional*): Makes a `NoisedBatch` of a batch and the generators of its samples; needed unless
            BatchNorm's statistics are frozen.
    """
    args = loop.args
    with loop.averaged_weights() as model:
        if not args.freeze_batch_norm:
            noised = (noise(*batch) for batch in islice(loop.upcoming, RECALIBRATION_BATCHES))
            batches = ([(b.model_input, b.timesteps, b.category_ids)] for b in noised)
            # `update_bn` gives a model one argument, the first of a batch: here a tuple of all of them.
            hook = model.register_forward_pre_hook(lambda module, arguments: arguments[0])
            update_bn(tqdm(batches, "BatchNorm statistics", RECALIBRATION_BATCHES, mininterval=5), model)
            hook.remove()
        if not loop.is_main:
            return
        if has_adapter(pipeline.unet):
            save_parts(pipeline, loop.output_dir)
            is_few_step = hasattr(args, "num_inference_steps")
            card = make_lora_card(pipeline, loop.run_name, args.pretrained_model_name_or_path, is_few_step)
            card.save(loop.output_dir / "README.md")
        else:
            pipeline.save_pretrained(loop.output_dir)
    add_to_card(loop.output_dir, training_section(loop, scores))
    push_results(loop)
