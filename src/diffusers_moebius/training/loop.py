"""What every training script does around its loss: batches, optimiser steps, checkpoints, logs and the result."""

import argparse
import csv
import json
import logging
import math
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
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from tqdm.auto import tqdm

from .checkpoints import checkpoint_step, complete_checkpoint, find_checkpoint, partial_checkpoint
from .data import TrainingBatches
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

    A script has the step in its own text, see `training/train_inpainting.py`. What is the same for all is here: optimiser,
    learning rate, batches and their randomness, average of the weights, logs, checkpoints, signals.

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
        upcoming (iterator): After [`~TrainingLoop.batches`], the batches that would have come next.
    """

    def __init__(self, args: argparse.Namespace, project: str):
        self.args = args
        self.output_dir = Path(args.output_dir)
        self.output_dir.mkdir(parents=True, exist_ok=True)
        self.accelerator = Accelerator(
            gradient_accumulation_steps=args.gradient_accumulation_steps,
            mixed_precision=args.mixed_precision,
            log_with=args.report_to,
            project_config=ProjectConfiguration(
                project_dir=str(self.output_dir), logging_dir=str(self.output_dir / args.logging_dir)
            ),
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
        self._sums: dict[str, float] = {}
        self._counts = 0

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

    def prepare(self, model: nn.Module, save_parts: Callable[[Path], None]) -> tuple[nn.Module, torch.optim.Optimizer]:
        """
        Wraps what is trained for the processes, and goes on from a checkpoint if that is asked for.

        Args:
            model (`torch.nn.Module`): One module with all that is trained.
            save_parts (callable): Writes it (with averaged weights, if there are any) into a checkpoint folder, ready
                to be used.

        Returns:
            The model to call and its optimiser.
        """
        args = self.args
        optimizer = build_optimizer(args, model, self.accelerator.device, self.accelerator.num_processes)
        lr_scheduler = build_lr_scheduler(args, optimizer)
        if self.accelerator.num_processes > 1 and self.accelerator.device.type == "cuda":
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        self.model, self.optimizer, self.lr_scheduler = self.accelerator.prepare(model, optimizer, lr_scheduler)
        self.save_parts = save_parts
        if args.use_ema:
            # The warm-up (1 + n) / (10 + n) lets a short run follow its weights at first.
            self.ema = EMAModel(self.trained_parameters, decay=args.ema_decay)
            self.ema.to(self.accelerator.device)
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
        if self.is_main:
            self._open_log()
        self._remember_buffers()
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
        return {"skipped": self.skipped, "data": self._data_states}

    def load_state_dict(self, state: dict) -> None:
        self.skipped, self._data_states = state["skipped"], state.get("data")

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

    def batches(self, dataset) -> Iterator[tuple[dict, list[torch.Generator]]]:
        """Yields batches with the generators of their samples until all steps are done or a stop is requested."""
        args = self.args
        self._set_train_mode()
        self._progress = tqdm(initial=self.step, total=args.max_train_steps, disable=not self.is_main, mininterval=10)
        with self._progress, self._stopping_at_signals():
            first_batch = self.step * args.gradient_accumulation_steps
            self._batches = TrainingBatches(
                dataset,
                args.train_batch_size,
                args.seed,
                first_batch,
                self.accelerator.process_index,
                self.accelerator.num_processes,
                args.dataloader_num_workers,
                self._data_states,
            )
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
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        previous = {}

        def request_stop(number, frame):
            self.stop_requested = True
            signal.signal(number, previous[number])

        for number in (signal.SIGTERM, signal.SIGINT):
            previous[number] = signal.signal(number, request_stop)
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def accumulate(self):
        """The context of one batch: gradients are shared between processes at the last batch of a step only."""
        return self.accelerator.accumulate(self.model)

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

    def end_batch(self, logged: dict[str, torch.Tensor | float]) -> None:
        """
        Ends a batch and, with the last one of a step, the step: average of the weights, logs, checkpoint.

        Args:
            logged (`dict`): Scalars whose means are written to `loss.csv` and the trackers.
        """
        args = self.args
        if not self._broken:
            for name, value in logged.items():
                value = float(value.detach()) if isinstance(value, torch.Tensor) else value
                self._sums[name] = self._sums.get(name, 0.0) + value
            self._counts += 1
        if not self.accelerator.sync_gradients:
            return
        if self._broken:
            self.skipped += 1
            self._skipped_in_row += 1
            logger.warning("step %d skipped: its loss or gradient is not finite", self.step + 1)
            self._restore_buffers()
        else:
            self._skipped_in_row = 0
            if self.ema is not None:
                self.ema.step(self.trained_parameters)
            self._remember_buffers()
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

    def _remember_buffers(self) -> None:
        # Running statistics, which a forward pass with a NaN spoils before anybody sees the loss.
        self._buffers = {
            name: buffer.detach().clone()
            for name, buffer in self.model.named_buffers()
            if name.rpartition(".")[2] in ("running_mean", "running_var", "num_batches_tracked")
        }

    @torch.no_grad()
    def _restore_buffers(self) -> None:
        buffers = dict(self.model.named_buffers())
        for name, value in self._buffers.items():
            buffers[name].copy_(value)

    def _open_log(self) -> None:
        # Rows beyond the step that a resumed run goes on from belong to what is done again.
        self.log_file = self.output_dir / "loss.csv"
        rows = self.log_rows()
        kept = [row for row in rows if int(row["step"]) <= self.step] if self.step else []
        self.log_file.unlink(missing_ok=True)
        for row in kept:
            self._write_row(row)

    def log_rows(self) -> list[dict[str, str]]:
        """The rows of `loss.csv`."""
        if not self.log_file.exists():
            return []
        with self.log_file.open(newline="") as file:
            return list(csv.DictReader(file))

    def _write_row(self, row: dict) -> None:
        is_new = not self.log_file.exists()
        with self.log_file.open("a", newline="") as file:
            writer = csv.DictWriter(file, row.keys())
            if is_new:
                writer.writeheader()
            writer.writerow(row)

    def _log(self) -> None:
        if not self._counts:  # every step since the last time was skipped
            return
        means = torch.tensor([value / self._counts for value in self._sums.values()])
        means = self.reduce(means.to(self.accelerator.device)).tolist()
        values = dict(zip(self._sums, means)) | {"lr": self.lr_scheduler.get_last_lr()[0], "skipped": self.skipped}
        if self.is_main:
            self._write_row({"step": self.step} | {name: f"{value:.6g}" for name, value in values.items()})
            self._progress.set_postfix({name: f"{value:.4g}" for name, value in values.items() if name != "skipped"})
        self.accelerator.log(values, step=self.step)
        self._sums, self._counts = {}, 0

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
            partial_checkpoint(self.output_dir, self.step).mkdir()
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

    def log_images(self, images: dict, step: int) -> None:
        """Sends pictures (PIL) to the trackers that take some."""
        for tracker in self.accelerator.trackers:
            if tracker.name == "tensorboard":
                arrays = {name: np.asarray(image)[None] for name, image in images.items()}
                tracker.log_images(arrays, step=step, dataformats="NHWC")
            elif tracker.name == "wandb":
                tracker.log_images({name: [image] for name, image in images.items()}, step=step)
