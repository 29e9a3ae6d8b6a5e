"""One exported pipeline for all tests that only read it."""

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from random_pipeline import make_pipeline

pytest.importorskip("onnx", reason="the extra `onnx` is not installed")
pytest.importorskip("onnxruntime", reason="the extra `onnx` is not installed")


@pytest.fixture(scope="session")
def kl_pipeline(parity_dir):
    return make_pipeline(AutoencoderKL.from_pretrained(parity_dir / "vae_tiny").eval())


@pytest.fixture
def tiny_autoencoder():
    """Without a distribution of latents."""
    torch.manual_seed(1)
    channels = {"encoder_block_out_channels": (8, 8, 8, 8), "decoder_block_out_channels": (8, 8, 8, 8)}
    return AutoencoderTiny(**channels, num_encoder_blocks=(1, 1, 1, 1), num_decoder_blocks=(1, 1, 1, 1)).eval()


@pytest.fixture(scope="session")
def exported(kl_pipeline, tmp_path_factory):
    """The folder of `kl_pipeline`'s graphs."""
    from diffusers_moebius.export import export_onnx

    return export_onnx(kl_pipeline, tmp_path_factory.mktemp("onnx") / "tiny")
