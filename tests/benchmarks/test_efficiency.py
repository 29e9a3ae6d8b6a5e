import importlib.util
from pathlib import Path

import torch

from diffusers_moebius.models.unet_2d_moebius import MoebiusUNet2DModel

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "efficiency.py"


def test_multiply_adds_of_the_full_model():
    spec = importlib.util.spec_from_file_location("efficiency", SCRIPT)
    efficiency = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(efficiency)
    with torch.device("meta"):
        unet = MoebiusUNet2DModel()
    # 158 G were measured on the original release, in which each lambda is built before a query meets it.
    assert round(efficiency.count_multiply_adds(unet, (10, 3072), reference=True) / 1e9) == 158
