"""The loop of the training scripts, through the script for plain training."""

import os
import shutil
import signal
import time

import pytest
import torch
from runs import assert_equal_weights, first_gradients, load_script, read_log, run, start, weights
from safetensors.torch import load_file, save_file

from diffusers_moebius.training.loop import list_checkpoints


@pytest.fixture(scope="module")
def script():
    return load_script("train_inpainting")


def wait_until(condition, process, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.exitcode is None and time.monotonic() < deadline
        time.sleep(0.002)


@pytest.mark.slow
def test_sigterm_leaves_a_complete_checkpoint(script, command, tmp_path):
    out = tmp_path / "out"
    command = [*command, f"--output_dir={out}", "--logging_steps=1"]
    (process,) = start("train_inpainting", [*command, "--max_train_steps=1000000"])
    try:
        wait_until((out / "loss.csv").exists, process)
        os.kill(process.pid, signal.SIGTERM)
        process.join(60)
        assert process.exitcode == 0
    finally:
        process.kill()
    (checkpoint,) = list_checkpoints(out)
    step = int(checkpoint.name.split("-")[1])
    assert not list(out.glob("partial-*")) and not (out / "unet").exists()
    script.main([*command, f"--max_train_steps={step + 1}", "--resume_from_checkpoint=latest"])
    assert [int(row["step"]) for row in read_log(out)] == list(range(1, step + 2))


@pytest.mark.slow
@pytest.mark.parametrize("delay", [0.0, 0.004, 0.012])
def test_killed_while_it_writes_a_checkpoint_it_resumes_to_the_same_parameters(script, command, tmp_path, delay):
    command = [*command, f"--cache_latents={tmp_path / 'cache'}", "--checkpointing_steps=2", "--optimizer=muon"]
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    (process,) = start("train_inpainting", [*command, f"--output_dir={killed}", "--max_train_steps=1000000"])
    try:
        # In the midst of the third checkpoint, some milliseconds after its folder has appeared.
        wait_until((killed / "checkpoint-4").exists, process)
        wait_until((killed / "partial-6").exists, process)
        time.sleep(delay)
    finally:
        process.kill()
    process.join(60)
    last = int(list_checkpoints(killed)[-1].name.split("-")[1])
    assert last in (4, 6)
    finish = f"--max_train_steps={last + 3}"
    script.main([*command, f"--output_dir={killed}", finish, "--resume_from_checkpoint=latest"])
    assert not list(killed.glob("partial-*"))
    script.main([*command, f"--output_dir={whole}", finish])
    assert_equal_weights(killed, whole)


def spoil_cache(folder, count):
    """Makes the latents of the first `count` cached samples NaN; returns how many samples there are."""
    path = next(folder.glob("latents-*.safetensors"))
    tensors = load_file(path)
    tensors["latents"][:count] = torch.nan
    save_file(tensors, path)
    return len(tensors["latents"])


def test_steps_that_are_not_finite_leave_no_trace(script, command, tmp_path):
    cache = tmp_path / "cache"
    command = [*command, f"--cache_latents={cache}", "--train_batch_size=2", "--cache_masks_per_picture=1"]
    script.main([*command, "--max_train_steps=1", f"--output_dir={tmp_path / 'x'}"])
    assert spoil_cache(cache, 2) == 12
    out = tmp_path / "out"
    script.main([*command, f"--output_dir={out}", "--max_train_steps=6", "--freeze_batch_norm", "--logging_steps=6"])
    (row,) = read_log(out)
    assert row["skipped"] in ("1", "2") and float(row["loss"]) > 0
    assert all(value.isfinite().all() for value in weights(out).values())
    assert f"{row['skipped']} of them skipped" in (out / "README.md").read_text()
    # Running statistics are finite as well, though the forward pass saw the broken samples.
    live = tmp_path / "live"
    script.main([*command, f"--output_dir={live}", "--max_train_steps=6"])
    assert all(value.isfinite().all() for value in weights(live / "checkpoint-6").values())


def test_ten_broken_steps_in_a_row_end_the_run_with_the_last_good_weights(script, command, tmp_path):
    cache, out = tmp_path / "cache", tmp_path / "out"
    command = [*command, f"--cache_latents={cache}", f"--output_dir={out}"]
    script.main([*command, "--max_train_steps=3"])
    spoil_cache(cache, 12)
    with pytest.raises(RuntimeError, match=r"10 steps in a row, up to step 13.*checkpoint-13.*last good step, 3"):
        script.main([*command, "--max_train_steps=100", "--resume_from_checkpoint=latest"])
    assert_equal_weights(out / "checkpoint-3", out / "checkpoint-13")


def test_a_checkpoint_by_its_bare_name(script, command, tmp_path):
    out = tmp_path / "out"
    command = [*command, f"--output_dir={out}", "--checkpointing_steps=2"]
    script.main([*command, "--max_train_steps=4"])
    kept = weights(out / "checkpoint-4")
    script.main([*command, "--max_train_steps=4", "--resume_from_checkpoint=checkpoint-2"])
    assert all(torch.equal(kept[name], value) for name, value in weights(out / "checkpoint-4").items())
    with pytest.raises(ValueError, match=r"`resume_from_checkpoint`.*'checkpoint-3' is neither"):
        script.main([*command, "--resume_from_checkpoint=checkpoint-3"])


def test_epochs_decide_the_number_of_steps(script, command, tmp_path):
    out = tmp_path / "out"
    options = ["--num_train_epochs=3", "--max_train_samples=9", "--gradient_accumulation_steps=2", "--logging_steps=1"]
    script.main([*command, f"--output_dir={out}", *options])
    assert len(read_log(out)) == 3  # of two batches of four each


def test_push_to_hub_is_checked_before_anything_else(script, command, tmp_path, monkeypatch):
    asked = []

    def refuse(name, private, exist_ok):
        asked.append((name, private))
        raise OSError("401 Client Error")

    monkeypatch.setattr("diffusers_moebius.training.loop.create_repo", refuse)
    monkeypatch.setattr(script, "build_pipeline", lambda *arguments: 1 / 0)
    with pytest.raises(OSError, match="401"):
        script.main([*command, f"--output_dir={tmp_path / 'my-run'}", "--push_to_hub", "--hub_private"])
    assert asked == [("my-run", True)]


def test_old_checkpoints_are_pruned_by_number(script, command, tmp_path):
    out = tmp_path / "out"
    (out / "partial-2").mkdir(parents=True)  # what a killed run leaves behind
    (out / "partial-2" / "junk").write_text("")
    limits = ["--max_train_steps=11", "--checkpointing_steps=1", "--checkpoints_total_limit=2"]
    script.main([*command, f"--output_dir={out}", *limits])
    assert sorted(path.name for path in out.glob("*-*")) == ["checkpoint-10", "checkpoint-11"]


@pytest.mark.slow
def test_two_processes_give_the_gradients_of_one_with_the_doubled_batch(command, tmp_path):
    command = [*command, f"--cache_latents={tmp_path / 'cache'}", "--max_train_steps=1", "--max_grad_norm=1e9"]
    command += ["--hole_loss_weight=8", "--checkpointing_steps=1"]
    gradients = {}
    for name, num_processes, options in (
        ("one", 1, ["--train_batch_size=4", "--freeze_batch_norm"]),
        ("two", 2, ["--train_batch_size=2", "--freeze_batch_norm"]),
        ("one, live", 1, ["--train_batch_size=4"]),
        ("two, live", 2, ["--train_batch_size=2"]),
    ):
        out = tmp_path / name
        run("train_inpainting", [*command, f"--output_dir={out}", *options], num_processes)
        gradients[name] = torch.cat([value.flatten() for value in first_gradients(out / "checkpoint-1")])
        shutil.rmtree(out)

    def difference(first, second):
        return ((gradients[first] - gradients[second]).norm() / gradients[first].norm()).item()

    assert gradients["one"].norm() > 0
    assert difference("one", "two") < 1e-5
    # On processors BatchNorm sees the samples of its process only (on GPUs it is synchronised): training/README.md
    # says so and why a small batch wants `--freeze_batch_norm`.
    assert difference("one, live", "two, live") > 1e-3
