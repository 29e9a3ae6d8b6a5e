"""What every training script does around its loss: batches, optimiser steps, checkpoints, logs and the result."""

import argparse
import json
import logging
import math
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, ProjectConfiguration, gather_object, set_seed
from diffusers.training_utils import EMAModel
from huggingface_hub import create_repo
from PIL import Image
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from tqdm.auto import tqdm

from ..pictures.files import replace_file
from .data import TrainingBatches, describe_dataset
from .objective import sample_generators
from .optimizers import build_lr_scheduler, build_optimizer

logger = logging.getLogger(__name__)
# So many steps without a finite loss end a run: it does not come back from there.
MAX_SKIPPED_IN_ROW = 10
# The balance of the losses, the average of the weights and validation need whole weights.
SHARDED = (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)


class TrainingLoop:
    """
    The loop of a training script.

    A script has the step in its own text, see `training/train_inpainting.py`. What is the same for all is here:
    optimiser, learning rate, batches and their randomness, average of the weights, logs, checkpoints, signals.

    A step whose loss or gradient is not finite in any process is skipped in all of them: the weights, their average
    and BatchNorm's statistics stay as they were. After ten of them in a row the run ends with a checkpoint of that
    state.

    SIGTERM and Ctrl-C end the loop after the present step, with a checkpoint; a second Ctrl-C at once.

    Args:
        args (`argparse.Namespace`): See `training.arguments`.
        project (`str`): Name of the run for the trackers.

    Attributes:
        accelerator (`Accelerator`): Of accelerate.
        step (`int`): Optimiser steps done, skipped ones included.
        skipped (`int`): Steps skipped.
        finished (`bool`): Whether all steps are done.
        log_rows (`list[dict]`): The rows of `loss.csv`.
        upcoming (iterator): After [`~TrainingLoop.batches`], the batches that would have come next.
    """

    def __init__(self, args: argparse.Namespace, project: str):
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
        self.args = args
        self.output_dir = Path(args.output_dir)
        self.output_dir.mkdir(parents=True, exist_ok=True)
        self.accelerator = Accelerator(
            gradient_accumulation_steps=args.gradient_accumulation_steps,
            mixed_precision=args.mixed_precision,
            log_with=args.report_to,
            project_config=ProjectConfiguration(str(self.output_dir), str(self.output_dir / args.logging_dir)),
            step_scheduler_with_optimizer=False,
        )
        args.mixed_precision = self.accelerator.mixed_precision
        if args.allow_tf32:
            torch.set_float32_matmul_precision("high")
        set_seed(args.seed)
        if self.is_main:
            (self.output_dir / "args.json").write_text(json.dumps(vars(args), indent=2) + "\n")
        if args.report_to:
            settings = {name: value for name, value in vars(args).items() if isinstance(value, int | float | str)}
            self.accelerator.init_trackers(project, settings)
        if self.accelerator.distributed_type in SHARDED:
            raise ValueError(
                f"The weights must be whole in every process, but accelerate is set to"
                f" {self.accelerator.distributed_type.value}: choose data parallelism (`accelerate config`)."
            )
        if args.push_to_hub and self.is_main:  # a wrong name or token is known before the run, not after it
            self.repo_id = create_repo(self.run_name, private=args.hub_private, exist_ok=True).repo_id
        self.step = self.skipped = self._skipped_in_row = 0
        self.stop_requested = False
        self.ema: EMAModel | None = None
        self._data_states: list[dict] | None = None
        self._broken = self._stop_agreed = False
        self.log_rows: list[dict] = []
        self._logged: list[dict[str, float]] = []  # since the last row

    @property
    def is_main(self) -> bool:
        return self.accelerator.is_main_process

    @property
    def run_name(self) -> str:
        """The repository that the result is for, or the name of the folder."""
        return self.args.hub_model_id or self.output_dir.resolve().name

    @property
    def finished(self) -> bool:
        return self.step >= self.args.max_train_steps

    def prepare(
        self, model: nn.Module, dataset, save_parts: Callable[[Path], None]
    ) -> tuple[nn.Module, torch.optim.Optimizer]:
        """
        Wraps what is trained for the processes, and goes on from a checkpoint if that is asked for.

        Args:
            model (`torch.nn.Module`): One module with all that is trained.
            dataset: Of [`build_dataset`].
            save_parts (callable): Writes it (with averaged weights, if there are any) into a checkpoint folder, ready
                to be used.

        Returns:
            The model to call and its optimiser.
        """
        args, self.dataset = self.args, dataset
        trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad) / 1e6
        logger.info("%s, %.2f M parameters are trained", describe_dataset(args, dataset), trained)
        optimizer = build_optimizer(args, model, self.accelerator.device, self.accelerator.num_processes)
        lr_scheduler = build_lr_scheduler(args, optimizer)
        if self.accelerator.num_processes > 1 and self.accelerator.device.type == "cuda":
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        self.model, self.optimizer, self.lr_scheduler = self.accelerator.prepare(model, optimizer, lr_scheduler)
        self.save_parts = save_parts
        if args.use_ema:
            # The warm-up (1 + n) / (10 + n) lets a short run follow its weights at first.
            self.ema = EMAModel(self.trained_parameters, decay=args.ema_decay)
            self.accelerator.register_for_checkpointing(self.ema)
        self.accelerator.register_for_checkpointing(self)
        if args.resume_from_checkpoint:
            folder = find_checkpoint(self.output_dir, args.resume_from_checkpoint)
            if folder is None:
                logger.info("no checkpoint in %s: starting anew", self.output_dir)
            else:
                self.accelerator.load_state(str(folder))
                self.step = checkpoint_step(folder)
                logger.info("resuming from %s", folder)
        if self.ema is not None:
            self.ema.to(self.accelerator.device)  # accelerate loads it to the processor
        self._good_statistics = [buffer.clone() for buffer in self._statistics()]
        return self.model, self.optimizer

    @property
    def bare_model(self) -> nn.Module:
        """The model without what accelerate wrapped around it."""
        return self.accelerator.unwrap_model(self.model)

    @property
    def trained_parameters(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.bare_model.parameters() if parameter.requires_grad]

    # What accelerate stores with a checkpoint.
    def state_dict(self) -> dict:
        return {"skipped": self.skipped, "data": self._data_states, "log": self.log_rows}

    def load_state_dict(self, state: dict) -> None:
        self.skipped, self._data_states, self.log_rows = state["skipped"], state["data"], state.get("log", [])

    def _set_train_mode(self) -> None:
        self.model.train()
        for module in self.model.modules():
            if isinstance(module, _BatchNorm) and self.args.freeze_batch_norm:
                module.eval()

    def _with_generators(self, first_batch: int) -> Iterator[tuple[dict, list[torch.Generator]]]:
        """Batches on the device with the generators of their samples."""
        accelerator, size = self.accelerator, self.args.train_batch_size
        for number, batch in enumerate(self._batches, first_batch):
            batch = {name: tensor.to(accelerator.device, non_blocking=True) for name, tensor in batch.items()}
            position = number * accelerator.num_processes + accelerator.process_index
            yield batch, sample_generators(self.args.seed, position * size, len(batch["mask"]))

    def batches(self) -> Iterator[tuple[dict, list[torch.Generator]]]:
        """Yields batches with the generators of their samples until all steps are done or a stop is requested."""
        args = self.args
        self._set_train_mode()
        self._progress = tqdm(initial=self.step, total=args.max_train_steps, disable=not self.is_main, mininterval=10)
        with self._progress, self._stopping_at_signals():
            first_batch = self.step * args.gradient_accumulation_steps
            order = args.train_batch_size, args.seed, first_batch
            place = self.accelerator.process_index, self.accelerator.num_processes, args.dataloader_num_workers
            self._batches = TrainingBatches(self.dataset, *order, *place, self._data_states)
            self.upcoming = self._with_generators(first_batch)
            while not self.finished and not self.stop_requested:
                yield next(self.upcoming)
        if self.skipped:
            logger.warning("%d of %d steps were skipped: their loss was not finite", self.skipped, self.step)
        if self._batches.skipped:
            unreadable = ", ".join(f"{name} ({count}x)" for name, count in self._batches.skipped.items())
            logger.warning("%d unreadable pictures were skipped: %s", len(self._batches.skipped), unreadable)
        if not self.finished:
            logger.info("stopped at step %d; go on with --resume_from_checkpoint latest", self.step)

    @contextmanager
    def _stopping_at_signals(self) -> Iterator[None]:
        numbers = (signal.SIGTERM, signal.SIGINT) if threading.current_thread() is threading.main_thread() else ()
        previous = {number: signal.getsignal(number) for number in numbers}

        def request_stop(number, frame):
            self.stop_requested = True
            signal.signal(number, previous[number])

        try:
            for number in numbers:
                signal.signal(number, request_stop)
            yield
        finally:
            for number in numbers:
                signal.signal(number, previous[number])

    def reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """The mean of a tensor over the processes."""
        return self.accelerator.reduce(tensor, "mean") if self.accelerator.num_processes > 1 else tensor

    def is_finite(self, loss: torch.Tensor) -> bool:
        """Whether a loss and those before it in this step are finite in all processes: else the step is skipped."""
        flags = torch.tensor([float(not torch.isfinite(loss)), float(self.stop_requested)])
        flags = self.reduce(flags.to(self.accelerator.device)).cpu()
        self._broken = self._broken or bool(flags[0])
        self._stop_agreed = bool(flags[1])
        return not self._broken

    def may_step(self, gradient_norm: torch.Tensor | float) -> bool:
        """Whether the gradient is finite too; in float16 the scaler looks for overflow and skips the step itself."""
        self._broken = self.accelerator.scaler is None and not math.isfinite(gradient_norm)
        return not self._broken

    def end_batch(self, logged: dict[str, torch.Tensor]) -> None:
        """
        Ends a batch and, with the last one of a step, the step: average of the weights, logs, checkpoint.

        Args:
            logged (`dict`): Scalars whose means are written to `loss.csv` and the trackers.
        """
        args = self.args
        if not self._broken:
            self._logged.append({name: value.item() for name, value in logged.items()})
        if not self.accelerator.sync_gradients:
            return
        if self._broken:
            self.skipped += 1
            self._skipped_in_row += 1
            logger.warning("step %d skipped: its loss or gradient is not finite", self.step + 1)
            for buffer, value in zip(self._statistics(), self._good_statistics):
                buffer.copy_(value)
        else:
            self._skipped_in_row = 0
            if self.ema is not None:
                self.ema.step(self.trained_parameters)
            self._good_statistics = [buffer.clone() for buffer in self._statistics()]
        self.optimizer.zero_grad()
        self.lr_scheduler.step()
        self._broken = False
        self.step += 1
        self._progress.update()
        self.stop_requested = self.stop_requested or self._stop_agreed
        if self.step % args.logging_steps == 0:
            self._log()
        hopeless = self._skipped_in_row >= MAX_SKIPPED_IN_ROW
        if self.step % args.checkpointing_steps == 0 or self.stop_requested or self.finished or hopeless:
            self.save_checkpoint()
        if hopeless:
            raise RuntimeError(
                f"The loss or its gradient was not finite in {MAX_SKIPPED_IN_ROW} steps in a row, up to step"
                f" {self.step}. The weights in checkpoint-{self.step} are those of the last good step,"
                f" {self.step - MAX_SKIPPED_IN_ROW}. Look for broken samples, or go on with a lower `--learning_rate`"
                " or without `--mixed_precision`."
            )

    def is_due(self, every: int) -> bool:
        """Whether a step has just been completed whose number is a multiple of `every`."""
        return self.accelerator.sync_gradients and self.step % every == 0

    def _statistics(self) -> list[torch.Tensor]:
        """BatchNorm's, which a forward pass with a NaN spoils before anybody sees the loss."""
        kinds = ("running_mean", "running_var", "num_batches_tracked")
        return [buffer for name, buffer in self.model.named_buffers() if name.endswith(kinds)]

    def _log(self) -> None:
        if not self._logged:  # every step since the last time was skipped
            return
        means = torch.tensor([list(values.values()) for values in self._logged]).mean(0)
        means = self.reduce(means.to(self.accelerator.device)).tolist()
        values = dict(zip(self._logged[0], means)) | {
            "lr": self.lr_scheduler.get_last_lr()[0],
            "skipped": self.skipped,
        }
        if self.is_main:
            self.log_rows.append({"step": self.step} | {name: f"{value:.6g}" for name, value in values.items()})
            lines = [self.log_rows[0].keys(), *(row.values() for row in self.log_rows)]
            with replace_file(self.output_dir / "loss.csv") as file:
                file.write("".join(",".join(map(str, line)) + "\n" for line in lines).encode())
            self._progress.set_postfix({name: f"{value:.4g}" for name, value in values.items() if name != "skipped"})
        self.accelerator.log(values, step=self.step)
        self._logged = []

    @contextmanager
    def averaged_weights(self) -> Iterator[nn.Module]:
        """The bare model with its averaged weights, if there are any; afterwards it has its own again."""
        model = self.bare_model
        if self.ema is None:
            yield model
            return
        parameters = self.trained_parameters
        self.ema.store(parameters)
        self.ema.copy_to(parameters)
        try:
            yield model
        finally:
            self.ema.restore(parameters)

    def save_checkpoint(self) -> None:
        """Writes `checkpoint-STEP`; the folder has this name only once all of it is there."""
        partial = self.output_dir / f"partial-{self.step}"
        if self.is_main:
            remove_partial(self.output_dir)
            partial.mkdir()
        self.accelerator.wait_for_everyone()
        self._data_states = gather_object([self._batches.state_dict()])
        self.accelerator.save_state(str(partial))
        self.accelerator.wait_for_everyone()
        if self.is_main:
            with self.averaged_weights():
                self.save_parts(partial)
            logger.info("wrote %s", complete_checkpoint(partial, self.args.checkpoints_total_limit))
        self.accelerator.wait_for_everyone()

    @contextmanager
    def validation(self) -> Iterator[nn.Module]:
        """[`~TrainingLoop.averaged_weights`] in evaluation mode; afterwards the model trains on as before."""
        with self.averaged_weights() as model:
            model.eval()
            try:
                yield model
            finally:
                self._set_train_mode()

    def log_image(self, name: str, image: Image.Image) -> None:
        """Sends a picture to the trackers that take some."""
        for tracker in self.accelerator.trackers:
            if tracker.name == "tensorboard":
                tracker.log_images({name: np.asarray(image)[None]}, step=self.step, dataformats="NHWC")
            elif tracker.name == "wandb":
                tracker.log_images({name: [image]}, step=self.step)


def list_checkpoints(output_dir: Path) -> list[Path]:
    """The complete checkpoints `checkpoint-STEP`, oldest first."""
    return sorted(output_dir.glob("checkpoint-*[0-9]"), key=checkpoint_step)


def checkpoint_step(folder: Path) -> int:
    """The step of a checkpoint by its name."""
    step = folder.name.rpartition("-")[2]
    if not step.isdigit():
        raise ValueError(f"`resume_from_checkpoint` must be a folder named checkpoint-STEP, but is {str(folder)!r}.")
    return int(step)


def find_checkpoint(output_dir: Path, resume_from_checkpoint: str) -> Path | None:
    """
    The checkpoint to go on from: a folder, the name of one in `output_dir`, or `"latest"`, which may be none.

    Raises:
        ValueError: If the folder does not exist.
    """
    if resume_from_checkpoint == "latest":
        return next(reversed(list_checkpoints(output_dir)), None)
    for folder in (Path(resume_from_checkpoint), output_dir / resume_from_checkpoint):
        if folder.is_dir():
            return folder
    raise ValueError(
        f"`resume_from_checkpoint` must be a folder or `latest`, but {resume_from_checkpoint!r} is neither, nor is"
        f" there one of that name in {str(output_dir)!r}."
    )


def remove_partial(output_dir: Path) -> None:
    """Removes what a killed run left of checkpoints that it wrote or deleted."""
    for leftover in output_dir.glob("partial-*"):
        shutil.rmtree(leftover)


def complete_checkpoint(partial: Path, total_limit: int | None) -> Path:
    """
    Gives a whole checkpoint, `partial-STEP`, its final name, then deletes the oldest ones beyond the limit.

    A run that is killed at any moment of this has at least one complete checkpoint to go on from if it had one before.
    """
    target = partial.with_name(f"checkpoint-{checkpoint_step(partial)}")
    if target.exists():
        _put_away(target)
    partial.rename(target)
    for old in list_checkpoints(target.parent)[: -total_limit if total_limit else 0]:
        _put_away(old)
    remove_partial(target.parent)
    return target


def _put_away(checkpoint: Path) -> None:
    # Deleting takes time, and half a folder must not look like a whole one.
    checkpoint.rename(checkpoint.with_name(f"partial-old-{checkpoint.name}"))
