"""Many photos by a real Ray on this machine, with two workers."""

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time

import numpy as np
import pytest
from PIL import Image

ray = pytest.importorskip("ray", reason="the extra `ray` is not installed")
pyarrow_parquet = pytest.importorskip("pyarrow.parquet")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


@pytest.fixture(scope="module")
def cluster():
    os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"
    ray.init(num_cpus=3, include_dashboard=False, log_to_driver=False, object_store_memory=200_000_000)
    yield
    ray.shutdown()


@pytest.fixture
def model(tiny_pipeline, tmp_path):
    tiny_pipeline.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


@pytest.fixture
def photos(tmp_path):
    """200 photos with masks, of which five cannot be read."""
    folders = tmp_path / "photos", tmp_path / "masks"
    generator = np.random.default_rng(0)
    for folder in folders:
        folder.mkdir()
    mask = np.zeros((32, 32), np.uint8)
    mask[8:20, 10:24] = 255
    for number in range(200):
        Image.fromarray(generator.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(folders[0] / f"{number:03d}.png")
        Image.fromarray(mask).save(folders[1] / f"{number:03d}.png")
    for number in range(0, 200, 40):
        (folders[0] / f"{number:03d}.png").write_bytes(b"this is no picture")
    return folders


OPTIONS = {"call": {"num_inference_steps": 2}, "batch_size": 4, "seed": 3}


def read_results(target):
    rows = [row for path in sorted(target.glob("*.parquet")) for row in pyarrow_parquet.read_table(path).to_pylist()]
    assert len({row["key"] for row in rows}) == len(rows)
    return {row["key"]: row for row in rows}


def check_results(results, photos, model):
    from diffusers_moebius import MoebiusInpaintPipeline
    from diffusers_moebius.batch.photo import Item, MaskOptions, fill_photos, read_photo

    assert sorted(results) == [f"{number:03d}.png" for number in range(200)]
    broken = {key for key, row in results.items() if row["error"] is not None}
    assert broken == {f"{number:03d}.png" for number in range(0, 200, 40)}
    pipeline = MoebiusInpaintPipeline.from_pretrained(model)
    pipeline.set_progress_bar_config(disable=True)
    for key in ("001.png", "099.png", "199.png"):
        photo = read_photo(Item(key, photos[0] / key, [photos[1] / key]), MaskOptions())
        call = {"padding_mask_crop": 64, **OPTIONS["call"]}
        (alone,) = fill_photos(pipeline, [photo], OPTIONS["seed"], call)
        together = np.asarray(Image.open(io.BytesIO(results[key]["image"]))).astype(int)
        assert np.abs(together - np.asarray(alone)).max() <= 1  # rounding


def test_every_photo_once_though_a_worker_is_killed(cluster, model, photos, tmp_path):
    import threading

    from diffusers_moebius.batch.cluster import inpaint_source, read_source

    killed = []

    def kill_one():
        """Kills the first worker that is seen at work."""
        for _ in range(4000):
            found = subprocess.run(
                ["pgrep", "-f", "ray::.*MapBatches.Inpainter"], capture_output=True, text=True
            ).stdout.split()
            if len(found) > 1 and any((tmp_path / "out").glob("*.parquet")):
                os.kill(int(found[0]), signal.SIGKILL)
                killed.append(found[0])
                return
            time.sleep(0.1)

    threading.Thread(target=kill_one, daemon=True).start()
    counts = inpaint_source(
        read_source(*photos).repartition(20), tmp_path / "out", model=model, min_workers=2, **OPTIONS
    )
    assert killed
    assert counts == {"done": 0, "filled": 195, "failed": 5}
    check_results(read_results(tmp_path / "out"), photos, model)


DRIVER = """
import json, sys
import ray
from diffusers_moebius.batch.cluster import inpaint_source, read_source

photos, masks, target, model, options = sys.argv[1:]
ray.init(num_cpus=3, include_dashboard=False, log_to_driver=False, object_store_memory=200_000_000)
dataset = read_source(photos, masks).repartition(20)
print(json.dumps(inpaint_source(dataset, target, model=model, min_workers=2, **json.loads(options))))
"""


def test_a_run_goes_on_after_its_driver_was_killed(model, photos, tmp_path):
    target = tmp_path / "out"
    command = [sys.executable, "-c", DRIVER, *map(str, photos), str(target), model, json.dumps(OPTIONS)]
    driver = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    for _ in range(4000):  # on a busy machine its workers take minutes to start
        if len(list(target.glob("*.parquet"))) >= 3:
            break
        assert driver.poll() is None
        time.sleep(0.1)
    os.killpg(driver.pid, signal.SIGKILL)
    driver.wait()
    time.sleep(5)  # Ray's own processes notice
    first = max(target.glob("*.parquet"), key=lambda path: path.stat().st_mtime)
    first.write_bytes(first.read_bytes()[:100])  # as a file that is cut off
    finished = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert finished.returncode == 0, finished.stderr[-3000:]
    counts = json.loads(finished.stdout.splitlines()[-1])
    assert 0 < counts["done"] < 200 and counts["done"] + counts["filled"] + counts["failed"] == 200
    check_results(read_results(target), photos, model)


def test_other_sources_and_columns(cluster, model, photos, tmp_path):
    from diffusers_moebius.batch.cluster import inpaint_dataset, inpaint_source, read_source

    keys = [f"{number:03d}.png" for number in (1, 2, 3)]
    with tarfile.open(tmp_path / "shard.tar", "w") as archive:
        for key in keys:
            archive.add(photos[0] / key, key)
            archive.add(photos[1] / key, key.replace(".png", ".mask.png"))
    lines = [{"key": key, "image": f"photos/{key}", "mask": f"masks/{key}", "owner": "me"} for key in keys]
    (tmp_path / "list.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    results = {}
    for name in ("shard.tar", "list.jsonl"):
        rows = inpaint_dataset(read_source(tmp_path / name), model=model, **OPTIONS).take_all()
        results[name] = {row["key"]: row["image"] for row in rows}
        assert [row["error"] for row in rows] == [None] * 3
        assert all(row.get("owner") == "me" for row in rows) or name == "shard.tar"
    target = tmp_path / "shards"
    source = read_source(tmp_path / "list.jsonl")
    for expected in ({"done": 0, "filled": 3, "failed": 0}, {"done": 3, "filled": 0, "failed": 0}):
        assert inpaint_source(source, target, "webdataset", model=model, **OPTIONS) == expected
    stored = {}
    for path in target.glob("*.tar"):
        with tarfile.open(path) as archive:
            stored |= {m.name: archive.extractfile(m).read() for m in archive if m.name.endswith(".png")}
    assert stored == results["list.jsonl"]
    assert results["shard.tar"] == results["list.jsonl"] and sorted(results["shard.tar"]) == keys
