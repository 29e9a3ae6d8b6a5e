"""A running demo on tiny random models, and photos to give it."""

import os
import shutil
import tempfile

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
# Apart from other test processes and the user's own demos: equal uploads lie at one place, and a server that ends
# deletes its own.
os.environ["GRADIO_TEMP_DIR"] = tempfile.mkdtemp(prefix="moebius-test-uploads-")

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_unet import TINY

gradio = pytest.importorskip("gradio", reason="the extra `demo` is not installed")


@pytest.fixture(scope="session", autouse=True)
def uploads_folder():
    yield
    shutil.rmtree(os.environ["GRADIO_TEMP_DIR"], ignore_errors=True)


@pytest.fixture(scope="session")
def pipeline_folder(tmp_path_factory, parity_dir) -> Path:
    """A saved pipeline of random weights; its native size is 128 px."""
    from diffusers import AutoencoderKL, DDIMScheduler

    from diffusers_moebius import LatentCategoriesEmbedder, MoebiusInpaintPipeline, MoebiusUNet2DModel

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models") / "secret-place" / "tiny"
    MoebiusInpaintPipeline(
        vae=AutoencoderKL.from_pretrained(parity_dir / "vae_tiny"),
        unet=MoebiusUNet2DModel(**TINY),
        lcg_embedder=LatentCategoriesEmbedder(num_embeddings=20, embedding_dim=24),
        scheduler=DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False),
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def demo_url(pipeline_folder, selector_folder):
    """Address of a running demo."""
    from diffusers_moebius.demo import launch_demo

    _, url, _ = launch_demo(
        str(pipeline_folder), str(selector_folder), host="127.0.0.1", prevent_thread_lock=True, quiet=True
    )
    yield url
    gradio.close_all()


@pytest.fixture
def photo(tmp_path) -> Path:
    """A photo-like PNG of 300×200 px."""
    coarse = np.random.default_rng(0).integers(0, 256, (10, 15, 3), dtype=np.uint8)
    path = tmp_path / "holiday.png"
    Image.fromarray(coarse).resize((300, 200), Image.Resampling.BICUBIC).save(path)
    return path


@pytest.fixture
def mask(tmp_path) -> Path:
    """A mask for it."""
    values = np.zeros((200, 300), np.uint8)
    values[80:120, 130:190] = 255
    path = tmp_path / "mask.png"
    Image.fromarray(values).save(path)
    return path


@pytest.fixture
def phone_photo(tmp_path) -> Path:
    """A 12-megapixel JPEG that lies on its side, with EXIF and an ICC profile."""
    from PIL import ImageCms

    ramp = np.linspace(0, 255, 4000, dtype=np.uint8)
    pixels = np.stack(np.broadcast_arrays(ramp[None], ramp[:3000, None], np.uint8(90)), axis=2)
    exif = Image.Exif()
    exif[274] = 6  # to be turned by a quarter clockwise
    exif[271] = "Camera maker"
    path = tmp_path / "IMG_0001.JPG"
    icc = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    Image.fromarray(np.ascontiguousarray(pixels)).save(path, "JPEG", quality=85, exif=exif, icc_profile=icc)
    return path
