"""The static page, built, with the bundled model exported beside it."""

import shutil
import subprocess
from pathlib import Path

import pytest
from filelock import FileLock

BROWSER = Path(__file__).parents[3] / "spaces" / "browser"


@pytest.fixture(scope="session")
def browser_folder() -> Path:
    """The page's sources with what npm installs for them."""
    if shutil.which("npm") is None:
        pytest.skip("npm is not installed")
    with FileLock(BROWSER / ".install.lock"):
        if not (BROWSER / "node_modules" / ".package-lock.json").is_file():
            run = subprocess.run(["npm", "ci", "--no-audit", "--no-fund"], cwd=BROWSER, capture_output=True, text=True)
            if run.returncode:
                pytest.skip(f"npm cannot install what the page is built with: {run.stderr.strip()[-300:]}")
    return BROWSER


@pytest.fixture(scope="session")
def page_folder(browser_folder, tmp_path_factory) -> Path:
    """What a server has to serve."""
    from diffusers_moebius import MoebiusInpaintPipeline, bundled_checkpoint
    from diffusers_moebius.export import export_onnx

    folder = tmp_path_factory.mktemp("page") / "dist"
    command = ["npm", "run", "build", "--silent", "--", "--outDir", str(folder), "--logLevel", "warn"]
    run = subprocess.run(command, cwd=browser_folder, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    pipeline = MoebiusInpaintPipeline.from_pretrained(bundled_checkpoint("nano"))
    export_onnx(pipeline, folder / "models" / "nano", dtype="float16", sizes=[(64, 128)])
    return folder
