import importlib
import sys
from pathlib import Path

import pytest
import torch

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
    generator = torch.Generator().manual_seed(0)
    weights, channels = {}, 3
    for i, (width, kernel) in enumerate([(4, 11), (5, 5), (6, 3), (4, 3), (3, 3)]):
        weights[f"conv.{i}.weight"] = torch.randn(width, channels, kernel, kernel, generator=generator) / kernel
        weights[f"conv.{i}.bias"] = torch.zeros(width)
        weights[f"head.{i}"] = torch.rand(width, generator=generator)
        channels = width
    return LPIPS(weights).eval()
