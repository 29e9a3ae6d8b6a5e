"""Small made-up photos, as folders and as shards, and the arguments of small training runs."""

import io
import json
import tarfile

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import AutoencoderTiny
from lpips_weights import make_weights
from PIL import Image
from runs import UNET
from safetensors.torch import save_file


@pytest.fixture(autouse=True)
def own_accelerator():
    """Each test chooses its precision and device, though runs of several tests share a process."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def photo_dir(tmp_path):
    """A folder with twelve pictures of 48×40 px, one of them in a sub-folder, and a text file named .jpg."""
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    generator = np.random.default_rng(0)
    for number in range(12):
        pixels = generator.integers(0, 256, (5, 6, 3), dtype=np.uint8)
        picture = Image.fromarray(pixels).resize((48, 40), Image.Resampling.BICUBIC)
        picture.save(folder / ("more" if number == 11 else ".") / f"{number:02d}.png")
    (folder / "03-broken.jpg").write_text("no picture")
    return folder


@pytest.fixture
def shard(photo_dir, tmp_path):
    """The same pictures as a WebDataset tar shard, with JSON files and a mask beside them."""
    path = tmp_path / "photos-000000.tar"
    with tarfile.open(path, "w") as archive:
        for file in sorted(photo_dir.rglob("*.*")):
            archive.add(file, file.name)
        for name in ("00.json", "00.mask.png"):
            archive.addfile(tarfile.TarInfo(name), io.BytesIO())
    return path


@pytest.fixture
def vae_dir(tmp_path):
    torch.manual_seed(0)
    widths = (4, 4, 4, 4)
    vae = AutoencoderTiny(
        encoder_block_out_channels=widths,
        decoder_block_out_channels=widths,
        num_encoder_blocks=(1, 1, 1, 1),
        num_decoder_blocks=(1, 1, 1, 1),
    )
    vae.save_pretrained(tmp_path / "vae")
    return tmp_path / "vae"


@pytest.fixture
def command(tmp_path, vae_dir, photo_dir):
    """Arguments of a small run from scratch; more can be appended."""
    config = tmp_path / "unet.json"
    config.write_text(json.dumps(UNET))
    options = {
        "unet_config": config,
        "vae": vae_dir,
        "train_data_dir": photo_dir,
        "resolution": 32,
        "train_batch_size": 4,
        "lr_warmup_steps": 2,
        "learning_rate": 1e-2,
        "logging_steps": 2,
        "prediction_type": "v_prediction",
    }
    arguments = [f"--{name}={value}" for name, value in options.items()]
    return [*arguments, "--rescale_betas_zero_snr", "--use_ema"]


@pytest.fixture
def lpips_file(tmp_path):
    save_file(make_weights("alex"), tmp_path / "lpips.safetensors")
    return tmp_path / "lpips.safetensors"
