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
