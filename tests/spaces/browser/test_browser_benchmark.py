"""`benchmarks/browser.py`, which measures the page."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[3] / "benchmarks" / "browser.py"


@pytest.mark.slow
def test_runs_are_measured(chromium, page_folder):
    options = ["--chromium", chromium, "--page", page_folder, "--model", page_folder / "models" / "nano", "--threads"]
    command = [sys.executable, SCRIPT, *options, "--size", "128", "--detail", "none"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    runs = re.findall(r"^run (\d): ([\d.]+) s, ([\d.]+) s of processors, ([\d.]+) GB", run.stdout, re.MULTILINE)
    assert [number for number, *_ in runs] == ["1", "2"] and run.stdout.count("Done in") == 2, run.stdout
    assert all(float(figure) > 0 for _, *figures in runs for figure in figures)
