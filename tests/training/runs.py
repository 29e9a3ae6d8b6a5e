"""Small training runs: what tests start them with and look at afterwards."""

import csv
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

SCRIPTS = Path(__file__).parents[2] / "training"
UNET = {
    "sample_size": 4,
    "block_out_channels": [8, 8],
    "layers_per_block": 1,
    "num_attention_heads": 2,
    "cross_attention_dim": 8,
    "encoder_hid_dim": 8,
    "context_length": 3,
    "local_window_size": 3,
    "norm_num_groups": 4,
}


def load_script(name):
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def start(name, arguments, num_processes=1):
    """Starts a script in processes of its own, as its user would."""
    launch = [sys.executable]
    if num_processes > 1:
        # `accelerate launch --cpu --num_processes 2` starts one process only, unless MPI is there.
        launch += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={num_processes}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    return subprocess.Popen([*launch, str(SCRIPTS / f"{name}.py"), *map(str, arguments)], env=environment)


def weights(folder):
    return load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")


def first_gradients(checkpoint):
    """The gradients of a first step of AdamW, which keeps a tenth of them."""
    state = torch.load(checkpoint / "optimizer.bin", weights_only=True)
    (group,) = state["param_groups"]
    return [state["state"][index]["exp_avg"] / (1 - group["betas"][0]) for index in group["params"]]


def read_log(folder):
    with (folder / "loss.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def assert_equal_weights(first, second):
    first, second = weights(first), weights(second)
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name
