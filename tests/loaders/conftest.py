"""A hub on loopback, and tiny pipelines: in both layouts, and for adapters."""

import huggingface_hub.constants
import huggingface_hub.hf_api
import pytest
import torch
from hub_server import HubServer

from diffusers_moebius.loaders.release_checkpoint import UNET_PREFIX
from diffusers_moebius.models.unet_2d_moebius import MoebiusUNet2DModel
from diffusers_moebius.models.unet_2d_pixelhacker import PixelHackerUNet2DModel

SIZES = {
    "sample_size": 8,
    "layers_per_block": 1,
    "num_attention_heads": 4,
    "cross_attention_dim": 16,
    "encoder_hid_dim": 24,
    "norm_num_groups": 8,
}


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """The only hub that the client knows during a test, with an empty cache."""
    server = HubServer()
    server.start()
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", server.url)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    yield server
    server.stop()


@pytest.fixture
def tiny_unet():
    """Smaller than that of the other tests, as it is written and read many times here."""
    torch.manual_seed(0)
    return MoebiusUNet2DModel(**SIZES, block_out_channels=(16, 32), local_window_size=3).eval()


@pytest.fixture
def release_state_dict(tiny_unet, tiny_lcg_embedder):
    """A checkpoint in the release's names; its config is `release_config`."""
    weights = {UNET_PREFIX + name: tensor for name, tensor in tiny_unet.state_dict().items()}
    return {**tiny_lcg_embedder.state_dict(), **weights}


@pytest.fixture
def release_config():
    """What the shapes of `release_state_dict` do not tell."""
    return {"norm_num_groups": 8}


@pytest.fixture
def release_hub(hub, release_state_dict, tiny_vae, tmp_path):
    """A hub with the release's layout: two checkpoints that differ in one bias, and the autoencoder as a pickle."""
    folder = tmp_path / "hub"
    for number, name in enumerate(("ft_places2", "ft_celebahq")):
        release_state_dict["diff_model.conv_norm_out.bias"] = torch.full((16,), float(number))
        (folder / name).mkdir(parents=True)
        torch.save(release_state_dict, folder / name / "diffusion_pytorch_model.bin")
    hub.add("hustvl/Moebius").add_folder(folder)
    tiny_vae.save_pretrained(tmp_path / "vae", safe_serialization=False)
    hub.add("hustvl/PixelHacker").add_folder(tmp_path / "vae", "vae/")
    return hub


@pytest.fixture
def pixelhacker_unet():
    torch.manual_seed(0)
    return PixelHackerUNet2DModel(**SIZES, block_out_channels=(16, 16)).eval()


@pytest.fixture(params=["moebius", "pixelhacker"])
def pipe(request, tiny_pipeline):
    if request.param == "pixelhacker":
        tiny_pipeline.register_modules(unet=request.getfixturevalue("pixelhacker_unet"))
    return tiny_pipeline


@pytest.fixture
def student(tiny_pipeline):
    """The pipeline with BatchNorm statistics as they are after training: not 0 and 1."""
    generator = torch.Generator().manual_seed(5)
    for name, buffer in tiny_pipeline.unet.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_(0, 0.1, generator=generator)
        elif name.endswith("running_var"):
            buffer.uniform_(0.5, 1.5, generator=generator)
    return tiny_pipeline
