"""Small training runs: what tests start them with and look at afterwards."""

import csv
import importlib.util
import multiprocessing
import os
import socket
from pathlib import Path

import torch
from safetensors.torch import load_file

from diffusers_moebius.training.arguments import add_picture_arguments, training_parser
from diffusers_moebius.training.data import open_pictures

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
# Runs of their own are forked from a process that has imported everything once: that takes longer than the runs.
_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["runs", "diffusers_moebius.training.results", "diffusers_moebius.training.validation"])


def load_script(name):
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _run(name, arguments, environment):
    os.environ.update(environment)
    torch.set_num_threads(1)
    load_script(name).main(arguments)


def start(name, arguments, num_processes=1):
    """Starts a script in processes of its own, with what `torchrun` puts into their environment."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for rank in range(num_processes):
        environment = {"ACCELERATE_USE_CPU": "true"}
        if num_processes > 1:
            environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1"}
            environment |= {"WORLD_SIZE": str(num_processes), "LOCAL_WORLD_SIZE": str(num_processes)}
            environment |= {"MASTER_PORT": str(port)}
        processes.append(_FORKS.Process(target=_run, args=(name, list(map(str, arguments)), environment)))
    for process in processes:
        process.start()
    return processes


def run(name, arguments, num_processes=1, seconds=240):
    """Runs a script in processes of its own to its end."""
    processes = start(name, arguments, num_processes)
    try:
        for process in processes:
            process.join(seconds)
        assert [process.exitcode for process in processes] == [0] * num_processes
    finally:
        for process in processes:
            process.kill()


def open_data(resolution, mask_presets=("thick_256",), **options):
    """The pictures of options of a script, with the defaults of the others."""
    parser = training_parser("")
    add_picture_arguments(parser)
    parser.set_defaults(**{"seed": 0, "resolution": resolution, "mask_presets": mask_presets, **options})
    return open_pictures(parser.parse_args([]))


def take(batches, count):
    iterator = iter(batches)
    return [next(iterator) for _ in range(count)]


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
