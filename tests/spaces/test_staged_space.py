"""The Space as it is pushed: gathered by `make space`, installed into a fresh environment, started, and used."""

import os
import shutil
import socket
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
from gradio_client import Client, handle_file
from PIL import Image

ROOT = Path(__file__).parents[2]
START_SECONDS = 120

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


# Nothing of this checkout's own environment.
ENVIRONMENT = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "MOEBIUS"))}


def call(*command, **options):
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, env=ENVIRONMENT, **options)


def interpreters() -> list[str]:
    """Those of ZeroGPU, where they are on the path and start; else the one that runs the tests."""
    found = filter(None, map(shutil.which, ("python3.10", "python3.12")))
    return [path for path in found if call(path, "--version").returncode == 0] or [sys.executable]


@pytest.fixture(scope="module")
def package_index(tmp_path_factory):
    """Skips without an index to install from; CI fails instead."""
    folder = tmp_path_factory.mktemp("download")
    tried = call(sys.executable, "-m", "pip", "download", "--no-deps", "--no-cache-dir", "-d", folder, "setuptools")
    if tried.returncode:
        (pytest.fail if os.environ.get("CI") else pytest.skip)("pip reaches no package index")


@pytest.fixture(scope="module")
def staged(package_index):
    stale = ROOT / "build" / "lib" / "diffusers_moebius" / "stale.py"
    stale.parent.mkdir(parents=True, exist_ok=True)
    stale.touch()
    made = call("make", "space", f"PYTHON={sys.executable}", cwd=ROOT)
    assert made.returncode == 0, made.stderr[-3000:]
    return ROOT / "build" / "space"


@pytest.fixture(params=interpreters(), ids=lambda path: Path(path).name)
def python(request, staged, tmp_path):
    """The interpreter of a new environment with what the Space asks for, and nothing else."""
    environment = tmp_path / "environment"
    subprocess.run([request.param, "-m", "venv", environment], check=True)
    python = environment / "bin" / "python"
    # Of torch, the version that the other tests run with.
    wanted = ["-c", ROOT / "constraints.txt", "-r", "requirements.txt"]
    installed = call(python, "-m", "pip", "install", "--quiet", *wanted, cwd=staged)
    assert installed.returncode == 0, installed.stderr[-3000:]
    yield python
    shutil.rmtree(environment)  # gigabytes


def test_the_wheel_holds_no_file_of_an_older_build(staged):
    (wheel,) = staged.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        packed = {
            name for name in archive.namelist() if name.startswith("diffusers_moebius/") and name.endswith(".py")
        }
    assert packed == {path.relative_to(ROOT / "src").as_posix() for path in (ROOT / "src").rglob("*.py")}


def test_the_staged_space_serves(staged, python, photo, mask, tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = ENVIRONMENT | {"GRADIO_SERVER_NAME": "127.0.0.1", "GRADIO_SERVER_PORT": str(port)}
    with open(tmp_path / "log.txt", "w") as log:
        server = subprocess.Popen([python, "app.py"], cwd=staged, env=environment, stdout=log, stderr=log)
    try:
        for _ in range(START_SECONDS):
            try:
                client = Client(f"http://127.0.0.1:{port}", verbose=False, download_files=str(tmp_path / "downloads"))
                break
            except Exception:  # not there yet
                assert server.poll() is None, (tmp_path / "log.txt").read_text()[-3000:]
                time.sleep(1)
        files = {"photo": handle_file(str(photo)), "mask": handle_file(str(mask))}
        path, settings = client.predict(**files, edge_margin=0, api_name="/predict")
    finally:
        server.terminate()
        server.wait(30)
    before, after, hole = (np.asarray(Image.open(file)) for file in (photo, path, mask))
    changed = (before != after).any(axis=2)
    assert changed[hole > 0].mean() > 0.5 and not changed[hole == 0].any()
    assert settings["model"].startswith("Nano")
