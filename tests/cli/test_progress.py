"""Many photos: folders, shards, progress, reports and interruptions."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from cli_pictures import SIZE, folder_of, make_mask, make_photo, outside
from PIL import Image

from diffusers_moebius.pipelines.pipeline_moebius_inpaint import MoebiusInpaintPipeline


def test_folders_of_outputs_are_made(moebius, folder, model):
    code, out, _ = moebius("inpaint", "photo.png", "mask.png", "-o", "a/b/out.png", "--model", model, "--steps", 2)
    assert (code, out) == (0, ["a/b/out.png"])


@pytest.fixture
def photo_folders(folder):
    """`photos/` with three photos, one that is text, one without a mask and one with two, and `masks/`."""
    for name in ("photos", "masks"):
        Path(name).mkdir()
    for seed, name in enumerate(("a.png", "b.jpg", "c.webp", "lonely.png", "double.png")):
        make_photo(seed=seed).save(Path("photos") / name)
    Path("photos/broken.png").write_text("Dear diary")
    Path("photos/notes.txt").write_text("not a photo")
    Path("photos/.hidden.png").write_text("a thumbnail of some other program")
    for name in ("a.png", "b.png", "c.png", "broken.png", "double.gif", "double.tif"):
        make_mask().save(Path("masks") / name)
    # The name itself decides before the stem does.
    make_mask(hole=(0, 0, 8, 8)).save("masks/a.tif")
    return folder


def test_folders(moebius, photo_folders, model):
    arguments = ("inpaint", "photos", "masks", "-o", "results", "--model", model, "--steps", 2)
    code, out, err = moebius(*arguments)
    written = ["a.png", "b.jpg", "c.webp"]
    assert code == 1
    assert [Path(line).name for line in out] == written == sorted(os.listdir("results"))
    assert len(err) == 5 and "3 of" in err[-1] and "no pictures" in err[-2] and "notes.txt" in err[-2]
    for name, line in zip(("broken.png", "double.png", "lonely.png"), err, strict=False):
        assert line.startswith("moebius: error: ") and name in line
    assert np.array_equal(outside(Image.open("photos/a.png")), outside(Image.open("results/a.png")))

    Path("results/b.jpg").unlink()
    old = Path("results/a.png").stat().st_mtime_ns
    code, out, err = moebius(*arguments)
    assert code == 1 and [Path(line).name for line in out] == ["b.jpg"]
    assert any("2 outputs exist already" in line for line in err)
    assert Path("results/a.png").stat().st_mtime_ns == old
    assert len(moebius(*arguments, "--overwrite")[1]) == 3
    assert Path("results/a.png").stat().st_mtime_ns > old


def test_one_mask_for_a_folder_and_no_failure(moebius, photo_folders, model):
    for name in ("broken.png", "b.jpg", "double.png", "lonely.png", "notes.txt"):
        Path("photos", name).unlink()
    code, out, err = moebius("inpaint", "photos", "mask.png", "-o", "results", "--model", model, "--steps", 2)
    assert (code, err) == (0, [])
    assert [Path(line).name for line in out] == ["a.png", "c.webp"]


def test_photos_of_a_folder_do_not_depend_on_each_other(moebius, photo_folders, model):
    moebius("inpaint", "photos", "masks", "-o", "results", "--model", model, "--steps", 2)
    moebius("inpaint", "photos/c.webp", "masks/c.png", "-o", "alone.webp", "--model", model, "--steps", 2)
    assert Path("results/c.webp").read_bytes() == Path("alone.webp").read_bytes()


@pytest.mark.parametrize("output, words", [("photos", "another folder"), ("mask.png", "must be a folder")])
def test_output_of_a_folder_is_another_folder(moebius, photo_folders, model, output, words):
    code, out, err = moebius("inpaint", "photos", "masks", "-o", output, "--model", model, "--overwrite")
    assert (code, out, len(err)) == (2, [], 1) and words in err[0]


@pytest.fixture
def album(folder):
    """`album/` with four photos, one of them in a folder and one of another size, and `masks/`."""
    for seed, name in enumerate(("a.png", "b.png", "c.png", "deep/d.png")):
        for top in ("album", "masks"):
            (folder / top / name).parent.mkdir(parents=True, exist_ok=True)
        size = (96, 80) if name == "c.png" else SIZE
        make_photo(size=size, seed=seed).save(folder / "album" / name)
        make_mask(size).save(folder / "masks" / name)
    return folder


def test_folders_of_folders_in_batches_with_a_report(moebius, album, model):
    arguments = ("inpaint", "album", "masks", "-o", "results", "--model", model, "--steps", 2)
    arguments = (*arguments, "--report", "report.jsonl")
    code, out, err = moebius(*arguments)
    assert code == 0 and len(out) == 3 and len(err) == 1 and "`--recursive`" in err[0]
    code, out, err = moebius(*arguments, "--recursive")
    assert (code, out) == (0, ["results/deep/d.png"]) and len(err) == 1 and "3 outputs exist" in err[0]
    Path("album/e.png").write_text("Dear diary")
    assert moebius(*arguments, "--recursive", "--batch-size", 2, "-o", "batched")[0] == 1
    single, batched = folder_of("results"), folder_of("batched")
    assert list(single) == list(batched) == ["a.png", "b.png", "c.png", "deep/d.png"]
    assert all(np.abs(single[name] - batched[name]).max() <= 1 for name in single)

    lines = [json.loads(line) for line in Path("report.jsonl").read_text().splitlines()]
    assert [line["status"] for line in lines].count("done") == 8 and len(lines) == 9
    assert all(line["seconds"] > 0 and line["error"] is None for line in lines if line["status"] == "done")
    assert lines[3] | {"seconds": None} == {
        "photo": "album/deep/d.png",
        "output": "results/deep/d.png",
        "status": "done",
        "seconds": None,
        "error": None,
    }
    (failed,) = [line for line in lines if line["status"] == "failed"]
    assert failed["photo"] == "album/e.png" and failed["output"] is None and "one mask" in failed["error"]


@pytest.mark.parametrize("output_format", ["webdataset", "parquet"])
def test_shards_in_and_out(moebius, album, model, output_format):
    if output_format == "parquet":
        pytest.importorskip("pyarrow")
    options = ("--model", model, "--steps", 2)
    shards = (*options, "--output-format", output_format, "--shard-size", 2)
    code, out, err = moebius("inpaint", "album", "masks", "-o", "shards", "--recursive", *shards)
    suffix = {"webdataset": "tar", "parquet": "parquet"}[output_format]
    assert (code, out, err) == (0, [f"shards/00000.{suffix}", f"shards/00001.{suffix}"], [])
    code, out, err = moebius("inpaint", "album", "masks", "-o", "shards", "--recursive", *shards)
    assert (code, out) == (0, []) and "4 outputs exist" in err[0]
    # What comes out of the shards again are the photos as they were done from files; a black mask keeps them so.
    Image.new("L", (18, 14)).save("black.png")
    assert moebius("inpaint", "shards", "black.png", "-o", "out", "--resize-mask", *options)[0] == 0
    assert moebius("inpaint", "album", "masks", "-o", "results", "--recursive", *options)[0] == 0
    ours, theirs = folder_of("results"), folder_of("out")
    assert list(ours) == list(theirs) and all(np.array_equal(ours[name], theirs[name]) for name in ours)


def test_one_bar_for_many_photos(moebius, album, model, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TQDM_MININTERVAL", "0")
    code, _, err = moebius("inpaint", "album", "masks", "-o", "results", "--model", model, "--steps", 2)
    assert code == 0
    bars = [part for line in err for part in line.split("\r") if "photo/s" in part or "s/photo" in part]
    assert any("0/3" in bar for bar in bars) and "3/3" in bars[-1]
    assert not any("/2 [" in part for line in err for part in line.split("\r"))  # none of the steps


def test_an_interruption_finishes_the_photo_at_hand_and_says_how_to_go_on(moebius, album, model, monkeypatch):
    call, calls = MoebiusInpaintPipeline.__call__, []

    def interrupted(self, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            signal.raise_signal(signal.SIGINT)
        return call(self, **kwargs)

    monkeypatch.setattr(MoebiusInpaintPipeline, "__call__", interrupted)
    arguments = ("inpaint", "album", "masks", "-o", "results", "--model", model, "--steps", 2)
    handler = signal.getsignal(signal.SIGINT)  # a background process ignores the signal
    code, out, err = moebius(*arguments)
    assert (code, out) == (130, ["results/a.png", "results/b.png"])
    assert "the photo at hand" in err[-2]
    assert "stopped after 2 of 3 photos; the same command goes on" in err[-1]
    assert sorted(os.listdir("results")) == ["a.png", "b.png"]
    assert signal.getsignal(signal.SIGINT) is handler
    assert moebius(*arguments)[:2] == (0, ["results/c.png"])


def test_a_second_interruption_ends_at_once(moebius, album, model, monkeypatch):
    def interrupted(self, **kwargs):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(MoebiusInpaintPipeline, "__call__", interrupted)
    code, out, err = moebius("inpaint", "album", "masks", "-o", "results", "--model", model)
    assert (code, out) == (130, []) and "stopped after 0 of 3 photos; the same command goes on" in err[-1]
    assert not Path("results").exists()


@pytest.mark.slow
def test_a_killed_run_leaves_whole_pictures_and_the_next_goes_on(moebius, folder, model):
    Path("photos").mkdir()
    for seed in range(24):
        make_photo(size=(256, 192), seed=seed).save(f"photos/{seed:02}.png")
    make_mask((256, 192)).save("mask.png")
    arguments = ["inpaint", "photos", "mask.png", "-o", "results", "--model", model, "--steps", "2"]
    process = subprocess.Popen(
        [sys.executable, "-m", "diffusers_moebius", *arguments],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},  # as in this process: sums are rounded by threads
    )
    for _ in range(3):
        process.stdout.readline()
    process.kill()
    process.wait()
    before = folder_of("results")
    assert 3 <= len(before) < 24
    assert moebius(*arguments)[0] == 0
    after = folder_of("results")
    assert not list(Path("results").glob(".*"))
    assert list(after) == [f"{seed:02}.png" for seed in range(24)]
    assert all(np.array_equal(values, after[name]) for name, values in before.items())
    assert moebius(*arguments, "-o", "alone", "--overwrite")[0] == 0
    alone = folder_of("alone")
    assert all(np.array_equal(values, alone[name]) for name, values in after.items())


def test_interruption_leaves_nothing(moebius, folder, model, monkeypatch):
    def interrupted(self, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(MoebiusInpaintPipeline, "__call__", interrupted)
    assert moebius("inpaint", "photo.png", "mask.png", "-o", "out.png", "--model", model) == (
        130,
        [],
        ["moebius: stopped; nothing is written"],
    )
    assert sorted(os.listdir()) == ["mask.png", "photo.png"]
