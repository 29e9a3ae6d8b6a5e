"""Checkpoint folders of a training run: complete ones have their final name, others do not."""

import shutil
from pathlib import Path


def list_checkpoints(output_dir: Path) -> list[Path]:
    """The complete checkpoints `checkpoint-STEP`, oldest first."""
    folders = [path for path in output_dir.glob("checkpoint-*") if path.name.split("-")[1].isdigit()]
    return sorted(folders, key=checkpoint_step)


def checkpoint_step(folder: Path) -> int:
    """The step of a checkpoint by its name."""
    step = folder.name.rpartition("-")[2]
    if not step.isdigit():
        raise ValueError(f"`resume_from_checkpoint` must be a folder named checkpoint-STEP, but is {str(folder)!r}.")
    return int(step)


def find_checkpoint(output_dir: Path, resume_from_checkpoint: str) -> Path | None:
    """
    The checkpoint to go on from.

    Args:
        output_dir (`Path`): Folder of the run.
        resume_from_checkpoint (`str`): A folder, the name of one in `output_dir`, or `"latest"`.

    Returns:
        `Path`, or `None` if the latest is asked for and there is none.

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


def partial_checkpoint(output_dir: Path, step: int) -> Path:
    """The folder in which the checkpoint of a step is put together; what a killed run left there is removed."""
    for leftover in output_dir.glob("partial-*"):
        shutil.rmtree(leftover)
    return output_dir / f"partial-{step}"


def complete_checkpoint(partial: Path, total_limit: int | None) -> Path:
    """
    Gives a whole checkpoint its final name, then deletes the oldest ones beyond the limit.

    A run that is killed at any moment of this has at least one complete checkpoint to go on from if it had one before.
    """
    target = partial.with_name(f"checkpoint-{checkpoint_step(partial)}")
    if target.exists():
        _remove(target)
    partial.rename(target)
    for old in list_checkpoints(target.parent)[: -total_limit if total_limit else 0]:
        _remove(old)
    return target


def _remove(checkpoint: Path) -> None:
    # Out of the way first: deleting takes time, and half a folder must not look like a whole one.
    shutil.rmtree(checkpoint.rename(checkpoint.with_name(f"partial-old-{checkpoint_step(checkpoint)}")))
