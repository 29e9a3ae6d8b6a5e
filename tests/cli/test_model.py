"""The model of a command: schedulers, adapters, devices, the hub."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model_state_dict
from PIL import Image

from diffusers_moebius import loaders
from diffusers_moebius.loaders import hub
from diffusers_moebius.models.unet_2d_moebius import MoebiusUNet2DModel
from diffusers_moebius.pipelines.pipeline_moebius_inpaint import MoebiusInpaintPipeline


@pytest.mark.parametrize("scheduler", ["ddim", "dpm", "unipc", "euler", "euler-ancestral", "lcm"])
def test_schedulers(moebius, folder, model, scheduler, monkeypatch):
    used = []
    call = MoebiusInpaintPipeline.__call__

    def spy(self, **kwargs):
        used.append(type(self.scheduler).__name__.lower())
        return call(self, **kwargs)

    monkeypatch.setattr(MoebiusInpaintPipeline, "__call__", spy)
    arguments = ("--model", model, "--steps", 3, "--scheduler", scheduler)
    code, out, err = moebius("inpaint", "photo.png", "mask.png", "-o", "out.png", *arguments)
    assert (code, out, err) == (0, ["out.png"], [])
    assert used[0].startswith(scheduler.replace("-", ""))


@pytest.mark.parametrize(("options", "used"), [([], "UniPCMultistep"), (["--scheduler", "dpm"], "DPMSolverMultistep")])
def test_fast_takes_few_steps_with_prepared_weights(moebius, folder, model, monkeypatch, options, used):
    monkeypatch.setattr(loaders, "TINY_AUTOENCODER", str(folder))  # where none is
    calls = []

    def record(self, **kwargs):
        calls.append((type(self.scheduler).__name__, self.config.default_num_inference_steps, self.unet.is_fused))
        raise KeyboardInterrupt

    monkeypatch.setattr(MoebiusInpaintPipeline, "__call__", record)
    moebius("inpaint", "photo.png", "mask.png", "-o", "out.png", "--model", model, "--fast", *options)
    assert calls == [(f"{used}Scheduler", 5, True)]


@pytest.fixture
def adapter(folder, model) -> str:
    """A folder with a LoRA adapter that has a strong effect on the model."""
    torch.manual_seed(0)
    unet = MoebiusUNet2DModel.from_config(MoebiusUNet2DModel.load_config(f"{model}/unet"))
    unet.add_adapter(LoraConfig(r=2, lora_alpha=20, target_modules=["to_q", "to_v"], init_lora_weights=False))
    metadata = unet.peft_config["default"].to_dict()
    MoebiusInpaintPipeline.save_lora_weights(
        "adapter", get_peft_model_state_dict(unet), unet_lora_adapter_metadata=metadata
    )
    return "adapter"


def test_adapters_act_by_their_scale(moebius, folder, model, adapter):
    pictures = {}
    for name, loras in {
        "none": [],
        "one": [adapter],
        "zero": [f"{adapter}:0"],
        "half": [f"{adapter}/pytorch_lora_weights.safetensors:0.5"],
        "halves": [f"{adapter}:0.25", f"{adapter}:0.25"],
    }.items():
        options = [part for lora in loras for part in ("--lora", lora)]
        arguments = ("-o", f"{name}.png", "--model", model, "--steps", 2, *options)
        assert moebius("inpaint", "photo.png", "mask.png", *arguments) == (0, [f"{name}.png"], [])
        pictures[name] = np.asarray(Image.open(f"{name}.png")).astype(int)
    assert np.array_equal(pictures["zero"], pictures["none"])
    assert np.abs(pictures["half"] - pictures["halves"]).max() <= 1
    for name, other in (("none", "one"), ("none", "half"), ("half", "one")):
        assert np.abs(pictures[name] - pictures[other]).max() > 1


@pytest.mark.parametrize(
    "lora, named", [("adapter:much", "'adapter:much'"), (":2", "':2'"), ("nowhere", "nowhere cann")]
)
def test_adapters_that_are_none(moebius, folder, model, lora, named):
    code, out, err = moebius("inpaint", "photo.png", "mask.png", "-o", "out.png", "--model", model, "--lora", lora)
    assert (code, out, len(err)) == (2, [], 1) and "`--lora`" in err[0] and named in err[0]
    assert not Path("out.png").exists()


def test_default_model_is_named_with_the_way_to_full_quality(moebius, folder, model, monkeypatch):
    monkeypatch.setattr(hub, "bundled_checkpoints", lambda: {"nano": Path(model)})
    code, out, err = moebius("inpaint", "photo.png", "mask.png", "-o", "out.png", "--steps", 2)
    assert (code, out) == (0, ["out.png"])
    assert len(err) == 1 and "'nano'" in err[0] and "--model hustvl/Moebius" in err[0]
    Path("nano").symlink_to(model)
    code, _, err = moebius("inpaint", "photo.png", "mask.png", "-o", "out2.png", "--steps", 2)
    assert (code, err) == (0, [])  # a folder of that name is not the bundled model


def test_a_device_that_is_not_there_is_refused_before_torch_is_imported(folder):
    command = (
        "import sys; from diffusers_moebius.cli import main\ntry: main(sys.argv[1:])\nfinally: print(*sys.modules)"
    )
    for device, word in (("toaster", "toaster"), ("cuda", "build without CUDA"), ("mps", "Macs")):
        if (device == "cuda" and torch.version.cuda) or (device == "mps" and sys.platform == "darwin"):
            continue
        arguments = ["inpaint", "photo.png", "mask.png", "-o", "out.png", "--device", device]
        process = subprocess.run([sys.executable, "-c", command, *arguments], capture_output=True, text=True)
        assert process.returncode == 2 and word in process.stderr and len(process.stderr.splitlines()) == 1
        assert "torch" not in process.stdout.split()


def test_memory_that_does_not_suffice_is_one_line(moebius, folder, model, monkeypatch):
    import torch

    def exhausted(self, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")

    monkeypatch.setattr(MoebiusInpaintPipeline, "__call__", exhausted)
    code, _, err = moebius("inpaint", "photo.png", "mask.png", "-o", "out.png", "--model", model)
    assert code == 2 and len(err) == 1 and "photo.png" in err[0] and "memory" in err[0]


@pytest.mark.slow
def test_unreachable_hub_is_one_line(folder, tmp_path):
    environment = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path / "cache")}
    process = subprocess.run(
        [
            sys.executable,
            "-m",
            "diffusers_moebius",
            "inpaint",
            "photo.png",
            "mask.png",
            "-o",
            "o.png",
            "--model",
            "a/b",
        ],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert (process.returncode, process.stdout) == (2, "")
    assert len(process.stderr.splitlines()) == 1
    assert process.stderr.startswith("moebius: error: The model a/b cannot be loaded")
    assert sorted(os.listdir()) == ["mask.png", "photo.png"]
