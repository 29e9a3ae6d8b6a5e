import importlib
import sys
from pathlib import Path

import pytest
from lpips_weights import make_weights

from diffusers_moebius.evaluation.lpips import LPIPS

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="session")
def import_script():
    """Imports a script of `benchmarks/` by its name; its own modules lie beside it."""

    def load(name):
        sys.path.append(str(BENCHMARKS))
        try:
            return importlib.import_module(name)
        finally:
            sys.path.remove(str(BENCHMARKS))

    return load


@pytest.fixture(scope="session")
def lpips():
    """AlexNet's shape with few channels and random weights."""
    return LPIPS(make_weights("alex")).eval()
