"""Loading and saving of pipelines with the real hub client, against a hub on loopback."""

import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import safetensors.torch
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, DDIMScheduler, DiffusionPipeline, UniPCMultistepScheduler
from huggingface_hub.utils import logging as hub_logging
from PIL import Image

from diffusers_moebius import bundled_checkpoint
from diffusers_moebius.loaders.model_card import weight_facts
from diffusers_moebius.models.latent_categories import LatentCategoriesEmbedder
from diffusers_moebius.models.unet_2d_moebius import MoebiusUNet2DModel
from diffusers_moebius.models.unet_2d_pixelhacker import PixelHackerUNet2DModel
from diffusers_moebius.pipelines.pipeline_moebius_inpaint import MoebiusInpaintPipeline

RELEASE = "hustvl/Moebius"


@pytest.fixture
def saved(tiny_pipeline, tmp_path):
    """A folder in the layout of diffusers."""
    tiny_pipeline.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


@pytest.fixture
def saved_hub(hub, saved):
    """A hub with that folder as a repository."""
    hub.add("somebody/inpaint").add_folder(saved)
    return hub


def number_of(pipeline) -> float:
    """Which checkpoint of `release_hub` a pipeline is from."""
    return pipeline.unet.conv_norm_out.bias[0].item()


def run(pipeline) -> np.ndarray:
    pipeline.set_progress_bar_config(disable=True)
    rows, columns = np.mgrid[:64, :64].astype(np.uint8)
    photo = Image.fromarray(np.stack([rows * 3, columns * 3, rows + columns], -1))
    mask = Image.fromarray(
        np.uint8(255) * ((rows > 20) & (rows < 44) & (columns > 20) & (columns < 44)).astype(np.uint8)
    )
    generator = torch.Generator().manual_seed(0)
    result = pipeline(image=photo, mask_image=mask, num_inference_steps=2, generator=generator, height=64, width=64)
    return np.asarray(result.images[0])


# The layout of the release


def test_release_default_checkpoint(release_hub, release_config):
    pipeline = MoebiusInpaintPipeline.from_pretrained(RELEASE, config=release_config)
    assert number_of(pipeline) == 0
    assert pipeline.config.default_guidance_scale == 2.5
    assert pipeline.config._name_or_path == RELEASE
    assert isinstance(pipeline.vae, AutoencoderKL) and isinstance(pipeline.scheduler, DDIMScheduler)
    assert pipeline.dtype == torch.float32 and not pipeline.unet.training and not pipeline.vae.training
    assert sorted(release_hub.downloads()) == [
        "ft_places2/diffusion_pytorch_model.bin",
        "vae/config.json",
        "vae/diffusion_pytorch_model.bin",
    ]


def test_release_named_checkpoint(release_hub, release_config):
    pipeline = MoebiusInpaintPipeline.from_pretrained(RELEASE, checkpoint="ft_celebahq", config=release_config)
    assert number_of(pipeline) == 1
    assert pipeline.config.default_guidance_scale == 2.0
    assert not any(name.startswith("ft_places2") for name in release_hub.downloads())
    given = MoebiusInpaintPipeline.from_pretrained(
        RELEASE, checkpoint="ft_celebahq", config=release_config, default_guidance_scale=1.5
    )
    assert given.config.default_guidance_scale == 1.5


def test_release_loads_what_the_release_holds(release_hub, release_config, tiny_pipeline):
    loaded = MoebiusInpaintPipeline.from_pretrained(RELEASE, config=release_config)
    np.testing.assert_array_equal(run(loaded), run(tiny_pipeline))


@pytest.mark.parametrize("arguments", [{}, {"local_files_only": True}])
def test_release_second_load_needs_no_network(release_hub, release_config, arguments):
    MoebiusInpaintPipeline.from_pretrained(RELEASE, config=release_config)
    release_hub.stop()
    assert number_of(MoebiusInpaintPipeline.from_pretrained(RELEASE, config=release_config, **arguments)) == 0


def test_release_second_load_in_offline_mode(release_hub, release_config, monkeypatch):
    MoebiusInpaintPipeline.from_pretrained(RELEASE, config=release_config)
    release_hub.requests.clear()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert number_of(MoebiusInpaintPipeline.from_pretrained(RELEASE, config=release_config)) == 0
    assert release_hub.requests == []


def test_release_second_load_downloads_nothing(release_hub, release_config):
    MoebiusInpaintPipeline.from_pretrained(RELEASE, config=release_config)
    release_hub.requests.clear()
    MoebiusInpaintPipeline.from_pretrained(RELEASE, config=release_config)
    assert release_hub.downloads() == []
    MoebiusInpaintPipeline.from_pretrained(RELEASE, config=release_config, force_download=True)
    assert "ft_places2/diffusion_pytorch_model.bin" in release_hub.downloads()


def test_release_local_files_only_without_cache(release_hub, release_config):
    with pytest.raises(OSError, match="`local_files_only`"):
        MoebiusInpaintPipeline.from_pretrained(RELEASE, config=release_config, local_files_only=True)
    assert release_hub.requests == []


def test_release_without_network_nor_cache(release_hub, release_config):
    release_hub.stop()
    with pytest.raises(OSError, match=r"hustvl/Moebius is no folder, not in the cache"):
        MoebiusInpaintPipeline.from_pretrained(RELEASE, config=release_config)


def test_release_checkpoint_that_is_not_cached(release_hub, release_config):
    MoebiusInpaintPipeline.from_pretrained(RELEASE, config=release_config)
    release_hub.stop()
    with pytest.raises(OSError, match="not in the cache"):
        MoebiusInpaintPipeline.from_pretrained(RELEASE, checkpoint="ft_celebahq", config=release_config)


def test_release_cache_dir(release_hub, release_config, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    MoebiusInpaintPipeline.from_pretrained(RELEASE, config=release_config, cache_dir=elsewhere)
    assert {path.name for path in elsewhere.iterdir()} >= {"models--hustvl--Moebius", "models--hustvl--PixelHacker"}
    assert not (tmp_path / "cache").exists()
    release_hub.stop()
    MoebiusInpaintPipeline.from_pretrained(RELEASE, config=release_config, cache_dir=elsewhere, local_files_only=True)


def test_release_unknown_checkpoint(release_hub, release_config):
    with pytest.raises(ValueError, match=r"`checkpoint` must be one of ft_celebahq, ft_places2 .* 'ft_places3'"):
        MoebiusInpaintPipeline.from_pretrained(RELEASE, checkpoint="ft_places3", config=release_config)
    assert release_hub.downloads() == []


def test_release_revision(release_hub, release_config, release_state_dict, tmp_path):
    release_state_dict["diff_model.conv_norm_out.bias"] = torch.full((16,), 7.0)
    (tmp_path / "tag" / "ft_places2").mkdir(parents=True)
    torch.save(release_state_dict, tmp_path / "tag" / "ft_places2" / "diffusion_pytorch_model.bin")
    repository = release_hub.repositories[RELEASE]
    repository.add_folder(tmp_path / "tag", revision="v1")
    for revision in ("v1", repository.commit("v1")):
        pipeline = MoebiusInpaintPipeline.from_pretrained(RELEASE, revision=revision, config=release_config)
        assert number_of(pipeline) == 7
    with pytest.raises(OSError, match="v2"):
        MoebiusInpaintPipeline.from_pretrained(RELEASE, revision="v2", config=release_config)
    release_hub.stop()
    assert number_of(MoebiusInpaintPipeline.from_pretrained(RELEASE, revision="v1", config=release_config)) == 7


def test_private_repository(release_hub, release_config):
    release_hub.repositories[RELEASE].token = "hf_secret"
    for token in (None, "hf_wrong"):
        with pytest.raises(OSError, match="pass a `token`"):
            MoebiusInpaintPipeline.from_pretrained(RELEASE, config=release_config, token=token)
    assert number_of(MoebiusInpaintPipeline.from_pretrained(RELEASE, config=release_config, token="hf_secret")) == 0


def test_repository_that_does_not_exist(hub):
    with pytest.raises(OSError, match="nobody/nothing is no folder"):
        MoebiusInpaintPipeline.from_pretrained("nobody/nothing")


@pytest.mark.parametrize("location", ["a/b/c", "./no folder", "", "model.bin"])
def test_location_that_is_no_model(hub, location, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("model.bin").touch()
    with pytest.raises(ValueError, match="`pretrained_model_name_or_path` must be a folder or the id"):
        MoebiusInpaintPipeline.from_pretrained(location)
    assert hub.requests == []


def test_folder_without_a_model(hub, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"must hold model_index\.json or folders with checkpoints"):
        MoebiusInpaintPipeline.from_pretrained(tmp_path / "empty")


def test_release_in_a_folder(release_hub, release_config, release_state_dict, tmp_path):
    pipeline = MoebiusInpaintPipeline.from_pretrained(tmp_path / "hub", "ft_celebahq", config=release_config)
    assert number_of(pipeline) == 1
    with pytest.raises(ValueError, match="`checkpoint` must be one of ft_celebahq, ft_places2"):
        MoebiusInpaintPipeline.from_pretrained(tmp_path / "hub", "../hub/ft_celebahq", config=release_config)


@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
def test_release_dtype(release_hub, release_config, name):
    pipeline = MoebiusInpaintPipeline.from_pretrained(RELEASE, config=release_config, **{name: torch.bfloat16})
    assert {pipeline.vae.dtype, pipeline.lcg_embedder.dtype, pipeline.unet.conv_in.conv_pw.weight.dtype} == {
        torch.bfloat16
    }
    assert pipeline.unet.conv_in.bn1.running_mean.dtype == torch.float32


def test_release_dtype_of_each_component(release_hub, release_config):
    dtype = {"unet": torch.bfloat16, "default": torch.float16}
    pipeline = MoebiusInpaintPipeline.from_pretrained(RELEASE, config=release_config, dtype=dtype)
    assert pipeline.unet.encoder_hid_proj.weight.dtype == torch.bfloat16
    assert pipeline.vae.dtype == pipeline.lcg_embedder.dtype == torch.float16


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dtype": torch.float16, "torch_dtype": torch.float16}, "`dtype` and `torch_dtype`"),
        ({"dtype": "float16"}, "`dtype` must be a `torch.dtype`"),
        ({"device_map": "balanced"}, "`device_map` is not an argument"),
        ({"shceduler": None}, "`shceduler` is not an argument"),
        ({"variant": "fp16"}, "`variant`.*diffusion_pytorch_model.fp16.safetensors"),
        ({"use_safetensors": True}, "`use_safetensors`.*diffusion_pytorch_model.safetensors"),
    ],
)
def test_release_refuses_arguments(release_hub, release_config, arguments, message):
    with pytest.raises(ValueError, match=message):
        MoebiusInpaintPipeline.from_pretrained(RELEASE, config=release_config, **arguments)


def test_release_variant(release_hub, release_config, release_state_dict, tmp_path):
    release_state_dict["diff_model.conv_norm_out.bias"] = torch.full((16,), 5.0)
    path = tmp_path / "variant" / "ft_places2" / "diffusion_pytorch_model.fp16.bin"
    path.parent.mkdir(parents=True)
    torch.save(release_state_dict, path)
    release_hub.repositories[RELEASE].add_folder(tmp_path / "variant")
    pipeline = MoebiusInpaintPipeline.from_pretrained(RELEASE, config=release_config, variant="fp16")
    assert number_of(pipeline) == 5
    assert "ft_places2/diffusion_pytorch_model.bin" not in release_hub.downloads()


def test_release_components_given(release_hub, release_config, tiny_unet, tiny_lcg_embedder):
    scheduler = UniPCMultistepScheduler()
    pipeline = MoebiusInpaintPipeline.from_pretrained(
        RELEASE, unet=tiny_unet, scheduler=scheduler, config=release_config
    )
    assert pipeline.unet is tiny_unet and pipeline.scheduler is scheduler
    release_hub.requests.clear()
    pipeline = MoebiusInpaintPipeline.from_pretrained(RELEASE, unet=tiny_unet, lcg_embedder=tiny_lcg_embedder)
    assert pipeline.lcg_embedder is tiny_lcg_embedder
    assert release_hub.downloads() == []


def test_cut_download_leaves_nothing_in_the_cache(release_hub, release_config, monkeypatch, tmp_path):
    hub_logging.set_verbosity_error()
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)
    release_hub.cut_downloads = True
    with pytest.raises(OSError, match="The download of `pretrained_model_name_or_path` hustvl/Moebius failed"):
        MoebiusInpaintPipeline.from_pretrained(RELEASE, config=release_config)
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file() and path.stat().st_size > 1000]
    release_hub.cut_downloads = False
    assert number_of(MoebiusInpaintPipeline.from_pretrained(RELEASE, config=release_config)) == 0


def test_release_of_the_teacher(release_hub, parity_dir, tmp_path):
    folder = tmp_path / "teacher" / "ft_places2"
    folder.mkdir(parents=True)
    weights = safetensors.torch.load_file(parity_dir / "teacher_tiny.safetensors")
    torch.save(weights, folder / "diffusion_pytorch_model.bin")
    release_hub.repositories["hustvl/PixelHacker"].add_folder(folder.parent)
    pipeline = MoebiusInpaintPipeline.from_pretrained(
        "hustvl/PixelHacker", config={"norm_num_groups": 8, "sample_size": 16}
    )
    assert type(pipeline.unet) is PixelHackerUNet2DModel
    assert run(pipeline).shape == (64, 64, 3)
    with pytest.raises(ValueError, match=r"`checkpoint` must be one of ft_places2 for hustvl/PixelHacker"):
        MoebiusInpaintPipeline.from_pretrained("hustvl/PixelHacker", checkpoint="vae")


# The autoencoder


def test_vae_given(release_hub, release_config, tiny_vae, tmp_path):
    pipeline = MoebiusInpaintPipeline.from_pretrained(RELEASE, vae=tiny_vae, config=release_config)
    assert pipeline.vae is tiny_vae
    tiny = AutoencoderTiny(encoder_block_out_channels=(8, 8, 8, 8), decoder_block_out_channels=(8, 8, 8, 8))
    tiny.save_pretrained(tmp_path / "tiny")
    pipeline = MoebiusInpaintPipeline.from_pretrained(RELEASE, vae=tmp_path / "tiny", config=release_config)
    assert isinstance(pipeline.vae, AutoencoderTiny)
    release_hub.add("somebody/taesd").add_folder(tmp_path / "tiny")
    pipeline = MoebiusInpaintPipeline.from_pretrained(
        RELEASE, vae="somebody/taesd", config=release_config, revision="main", dtype=torch.float16
    )
    assert isinstance(pipeline.vae, AutoencoderTiny) and pipeline.vae.dtype == torch.float16
    assert not any("PixelHacker" in request for request in release_hub.requests)
    release_hub.stop()
    MoebiusInpaintPipeline.from_pretrained(RELEASE, vae="somebody/taesd", config=release_config)


def test_vae_of_a_pipeline_folder(release_hub, release_config, saved):
    pipeline = MoebiusInpaintPipeline.from_pretrained(RELEASE, vae=saved, config=release_config)
    assert isinstance(pipeline.vae, AutoencoderKL)


def test_vae_replaces_that_of_a_saved_pipeline(saved_hub, tmp_path):
    tiny = AutoencoderTiny(encoder_block_out_channels=(8, 8, 8, 8), decoder_block_out_channels=(8, 8, 8, 8))
    tiny.save_pretrained(tmp_path / "tiny")
    pipeline = MoebiusInpaintPipeline.from_pretrained("somebody/inpaint", vae=tmp_path / "tiny")
    assert isinstance(pipeline.vae, AutoencoderTiny)
    assert not any(name.startswith("vae/") for name in saved_hub.downloads())


def test_vae_that_is_none(release_hub, release_config, saved, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"`vae` must hold config.json"):
        MoebiusInpaintPipeline.from_pretrained(RELEASE, vae=tmp_path / "empty", config=release_config)
    with pytest.raises(ValueError, match=r"`vae` must hold an autoencoder .* 'MoebiusUNet2DModel'"):
        MoebiusInpaintPipeline.from_pretrained(RELEASE, vae=saved / "unet", config=release_config)
    with pytest.raises(OSError, match="`vae` nobody/nothing"):
        MoebiusInpaintPipeline.from_pretrained(RELEASE, vae="nobody/nothing", config=release_config)


# The layout of diffusers


def test_saved_folder(saved, tiny_pipeline):
    assert {path.name for path in saved.iterdir() if path.suffix != ".py"} == {
        "README.md",
        "guider",
        "lcg_embedder",
        "model_index.json",
        "modular_config.json",
        "modular_model_index.json",
        "scheduler",
        "unet",
        "vae",
    }
    code = [path.name for path in saved.rglob("*.py")]
    assert {"load_pipeline.py", "pipeline_moebius_inpaint.py", "load_unet.py", "unet_2d_moebius.py"} < set(code)
    assert len(code) == len(set(code))  # nothing is there twice
    assert not list(saved.rglob("*.bin"))
    loaded = MoebiusInpaintPipeline.from_pretrained(saved)
    assert type(loaded) is MoebiusInpaintPipeline
    assert type(loaded.unet) is MoebiusUNet2DModel and type(loaded.lcg_embedder) is LatentCategoriesEmbedder
    np.testing.assert_array_equal(run(loaded), run(tiny_pipeline))


def test_pipeline_with_the_teacher(tiny_pipeline, hub, tmp_path):
    unet = PixelHackerUNet2DModel(
        sample_size=16,
        block_out_channels=(16, 32, 32, 32),
        num_attention_heads=4,
        cross_attention_dim=16,
        encoder_hid_dim=24,
        norm_num_groups=8,
    ).eval()
    pipeline = MoebiusInpaintPipeline(**{**tiny_pipeline.components, "unet": unet})
    pipeline.push_to_hub("somebody/teacher")
    loaded = MoebiusInpaintPipeline.from_pretrained("somebody/teacher")
    assert type(loaded.unet) is PixelHackerUNet2DModel
    np.testing.assert_array_equal(run(loaded), run(pipeline))


def test_default_guidance_scale_is_saved(tiny_pipeline, tmp_path):
    pipeline = MoebiusInpaintPipeline(**tiny_pipeline.components, default_guidance_scale=2.0)
    pipeline.save_pretrained(tmp_path)
    assert MoebiusInpaintPipeline.from_pretrained(tmp_path).config.default_guidance_scale == 2.0


def test_own_class_never_runs_saved_code(saved_hub, saved):
    for path in (*saved.glob("*.py"), *saved.glob("*/*.py")):
        path.write_text("raise AssertionError('ran')\n")
    saved_hub.add("somebody/hostile").add_folder(saved)
    for location in (saved, "somebody/hostile"):
        for arguments in ({}, {"trust_remote_code": True}):
            assert type(MoebiusInpaintPipeline.from_pretrained(location, **arguments)) is MoebiusInpaintPipeline


def test_own_class_does_not_need_saved_code(saved):
    for path in (*saved.glob("*.py"), *saved.glob("*/*.py")):
        path.unlink()
    assert type(MoebiusInpaintPipeline.from_pretrained(saved).unet) is MoebiusUNet2DModel


def test_components_are_found_wherever_they_lay_when_saved(saved):
    index = json.loads((saved / "model_index.json").read_text())
    index["_class_name"] = "MoebiusInpaintPipeline"
    index["unet"] = ["diffusers_moebius.models.some_older_place", "MoebiusUNet2DModel"]
    (saved / "model_index.json").write_text(json.dumps(index))
    assert type(MoebiusInpaintPipeline.from_pretrained(saved).unet) is MoebiusUNet2DModel


def test_parts_load_by_themselves(saved, saved_hub):
    assert type(MoebiusUNet2DModel.from_pretrained(saved, subfolder="unet")) is MoebiusUNet2DModel
    unet = MoebiusUNet2DModel.from_pretrained("somebody/inpaint", subfolder="unet")
    assert unet.config.block_out_channels == [16, 32]
    assert type(LatentCategoriesEmbedder.from_pretrained(saved, subfolder="lcg_embedder")) is LatentCategoriesEmbedder


def test_saved_hub(saved_hub, tiny_pipeline):
    loaded = MoebiusInpaintPipeline.from_pretrained("somebody/inpaint")
    np.testing.assert_array_equal(run(loaded), run(tiny_pipeline))
    saved_hub.requests.clear()
    MoebiusInpaintPipeline.from_pretrained("somebody/inpaint")
    assert saved_hub.downloads() == []
    saved_hub.stop()
    MoebiusInpaintPipeline.from_pretrained("somebody/inpaint")
    MoebiusInpaintPipeline.from_pretrained("somebody/inpaint", local_files_only=True)


def test_saved_hub_arguments(saved_hub, tiny_pipeline, tmp_path):
    tiny_pipeline.save_pretrained(tmp_path / "half", variant="fp16")
    saved_hub.repositories["somebody/inpaint"].add_folder(tmp_path / "half", revision="half")
    saved_hub.repositories["somebody/inpaint"].token = "hf_secret"
    arguments = {"token": "hf_secret", "revision": "half", "variant": "fp16", "dtype": torch.float16}
    pipeline = MoebiusInpaintPipeline.from_pretrained("somebody/inpaint", **arguments)
    assert pipeline.vae.dtype == torch.float16
    assert "unet/diffusion_pytorch_model.fp16.safetensors" in saved_hub.downloads()
    with pytest.raises(ValueError, match="variant"):
        MoebiusInpaintPipeline.from_pretrained("somebody/inpaint", **(arguments | {"revision": "main"}))
    with pytest.raises(OSError, match="pass a `token`"):
        MoebiusInpaintPipeline.from_pretrained("somebody/inpaint", cache_dir=tmp_path / "other")


def test_saved_variant_in_a_folder(tiny_pipeline, tmp_path):
    tiny_pipeline.save_pretrained(tmp_path, variant="fp16")
    assert not list(tmp_path.rglob("diffusion_pytorch_model.safetensors"))
    assert {path.name for path in tmp_path.rglob("*.safetensors")} == {"diffusion_pytorch_model.fp16.safetensors"}
    loaded = MoebiusInpaintPipeline.from_pretrained(tmp_path, variant="fp16")
    np.testing.assert_array_equal(run(loaded), run(tiny_pipeline))


def test_saved_components_given(saved_hub, saved, tiny_unet):
    for location in (saved, "somebody/inpaint"):
        scheduler = UniPCMultistepScheduler()
        pipeline = MoebiusInpaintPipeline.from_pretrained(location, unet=tiny_unet, scheduler=scheduler)
        assert pipeline.unet is tiny_unet and pipeline.scheduler is scheduler
    assert not any(name.endswith("unet/diffusion_pytorch_model.safetensors") for name in saved_hub.downloads())


def test_config_is_not_for_saved_pipelines(saved):
    with pytest.raises(ValueError, match="`config` is for checkpoints of the release"):
        MoebiusInpaintPipeline.from_pretrained(saved, config={})


def test_checkpoint_is_not_for_a_single_pipeline(saved_hub, saved):
    for location in (saved, "somebody/inpaint"):
        with pytest.raises(ValueError, match="`checkpoint` must name a folder with a pipeline"):
            MoebiusInpaintPipeline.from_pretrained(location, checkpoint="ft_places2")


def test_checkpoint_names_one_of_several_pipelines(hub, saved, tmp_path):
    several = tmp_path / "several"
    several.mkdir()
    for name in ("ft_places2", "portraits"):
        saved.rename(several / name) if name == "portraits" else _copy(saved, several / name)
    hub.add("somebody/several").add_folder(several)
    for location in (several, "somebody/several"):
        assert type(MoebiusInpaintPipeline.from_pretrained(location, checkpoint="portraits")) is MoebiusInpaintPipeline
    assert hub.downloads() and all(name.startswith("portraits/") for name in hub.downloads())
    MoebiusInpaintPipeline.from_pretrained("somebody/several")
    hub.stop()
    MoebiusInpaintPipeline.from_pretrained("somebody/several", checkpoint="portraits")


def _copy(source: Path, target: Path) -> None:
    for path in source.rglob("*"):
        if path.is_file():
            (target / path.relative_to(source)).parent.mkdir(parents=True, exist_ok=True)
            (target / path.relative_to(source)).write_bytes(path.read_bytes())


# The model that is part of the package


def test_the_name_of_the_bundled_model(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    loaded = MoebiusInpaintPipeline.from_pretrained("nano")
    assert loaded.config._name_or_path == str(bundled_checkpoint("nano"))
    assert loaded.config.default_num_inference_steps == 1
    assert weight_facts(loaded) is not None
    assert hub.requests == []
    expected = MoebiusInpaintPipeline.from_pretrained(bundled_checkpoint("nano"))
    np.testing.assert_array_equal(run(loaded), run(expected))
    vae = MoebiusInpaintPipeline.from_pretrained("nano", vae="nano", dtype=torch.bfloat16).vae
    assert isinstance(vae, AutoencoderTiny) and vae.dtype == torch.bfloat16


def test_a_folder_of_that_name_wins(saved, tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    saved.rename("nano")
    with caplog.at_level("WARNING"):
        loaded = MoebiusInpaintPipeline.from_pretrained("nano")
    assert loaded.config.default_num_inference_steps == 20
    assert "nano is taken as the folder of that name" in caplog.text


# Saving


def test_save_pretrained_needs_a_folder(tiny_pipeline, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="`save_directory` must be a folder"):
        tiny_pipeline.save_pretrained(tmp_path / "file")


def test_model_card_is_written_once(tiny_pipeline, tmp_path):
    tiny_pipeline.save_pretrained(tmp_path)
    (tmp_path / "README.md").write_text("mine")
    tiny_pipeline.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"


def test_saved_index_holds_no_path_of_this_machine(saved, tmp_path):
    MoebiusInpaintPipeline.from_pretrained(saved).save_pretrained(tmp_path / "again")
    assert str(tmp_path) not in (tmp_path / "again" / "model_index.json").read_text()


def test_saved_index_keeps_the_repository(release_hub, release_config, tmp_path):
    pipeline = MoebiusInpaintPipeline.from_pretrained(RELEASE, config=release_config)
    pipeline.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "model_index.json").read_text())["_name_or_path"] == RELEASE
    assert f"base_model: {RELEASE}" in (tmp_path / "again" / "README.md").read_text()


def test_derived_class(tiny_pipeline, tmp_path):
    class Derived(MoebiusInpaintPipeline):
        pass

    Derived(**tiny_pipeline.components).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["_class_name"] == "Derived"
    assert type(Derived.from_pretrained(tmp_path)) is Derived


def test_component_that_is_none(tiny_pipeline, tmp_path):
    MoebiusInpaintPipeline(**{**tiny_pipeline.components, "unet": None}).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["unet"] == [None, None]


def test_push_to_hub(hub, tiny_pipeline):
    commit = tiny_pipeline.push_to_hub("somebody/pushed", token="hf_secret", private=True)
    repository = hub.repositories["somebody/pushed"]
    assert repository.token == "hf_secret"
    assert commit.oid == repository.commit("main")
    assert {"README.md", "model_index.json", "unet/unet_2d_moebius.py"} <= set(repository.files("main"))
    loaded = MoebiusInpaintPipeline.from_pretrained("somebody/pushed", token="hf_secret")
    np.testing.assert_array_equal(run(loaded), run(tiny_pipeline))


def test_push_to_hub_keeps_a_model_card(hub, tiny_pipeline, tmp_path):
    hub.add("somebody/pushed").files("main")["README.md"] = b"mine"
    tiny_pipeline.push_to_hub("somebody/pushed")
    tiny_pipeline.save_pretrained(tmp_path / "pushed", push_to_hub=True, variant="fp16")
    files = hub.repositories["somebody/pushed"].files("main")
    assert files["README.md"] == b"mine"
    assert "unet/diffusion_pytorch_model.fp16.safetensors" in files


def test_push_to_hub_subfolder(hub, tiny_pipeline):
    tiny_pipeline.push_to_hub("somebody/pushed", subfolder="portraits")
    assert "portraits/model_index.json" in hub.repositories["somebody/pushed"].files("main")
    assert type(MoebiusInpaintPipeline.from_pretrained("somebody/pushed", "portraits")) is MoebiusInpaintPipeline


# Machines without this package


def test_generic_class_asks_for_trust(saved_hub, saved):
    for location in (str(saved), "somebody/inpaint"):
        with pytest.raises(ValueError, match="trust_remote_code"):
            DiffusionPipeline.from_pretrained(location)


WITHOUT_PACKAGE = """
import sys
sys.modules["diffusers_moebius"] = None  # makes every import of it fail
import logging
import numpy as np
from diffusers import AutoModel, DiffusionPipeline
from diffusers.utils import logging as diffusers_logging

class Warnings(logging.Handler):
    def emit(self, record):
        message = record.getMessage()
        for text in ("Expected types", "might require", "not expected"):
            assert text not in message, message

diffusers_logging.get_logger("diffusers").addHandler(Warnings())
exec(open(sys.argv[1]).read())
folder, copy, output = sys.argv[2:]
first = DiffusionPipeline.from_pretrained("somebody/inpaint-1.5", trust_remote_code=True)
expected = run(first)
np.save(output, expected)
others = [DiffusionPipeline.from_pretrained(folder, trust_remote_code=True) for _ in range(2)]
for pipeline in (first, *others):  # the first one still works after diffusers has run the code anew
    np.testing.assert_array_equal(run(pipeline), expected)
    assert type(pipeline.unet) is type(first.unet)
    pipeline.prepare_for_inference()
    assert np.abs(run(pipeline).astype(int) - expected).max() <= 1
others[1] = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
others[1].save_pretrained(copy)  # without code: for machines with the package
for location in (folder, "somebody/inpaint-1.5"):
    unet = AutoModel.from_pretrained(location, subfolder="unet", trust_remote_code=True)
    assert type(unet).__name__ == "MoebiusUNet2DModel"
    assert all((a == b).all() for a, b in zip(unet.state_dict().values(), others[1].unet.state_dict().values()))
assert not [name for name in sys.modules if name.startswith("diffusers_moebius.")]
"""


@pytest.mark.slow
def test_without_this_package(saved_hub, saved, tiny_pipeline, tmp_path):
    saved_hub.add("somebody/inpaint-1.5").add_folder(saved)  # with a dot, which is none between modules
    script = tmp_path / "run.py"
    script.write_text("import numpy as np\nimport torch\nfrom PIL import Image\n" + inspect.getsource(run))
    subprocess.run(
        [sys.executable, "-c", WITHOUT_PACKAGE, script, saved, tmp_path / "copy", tmp_path / "result.npy"],
        env={**os.environ, "HF_ENDPOINT": saved_hub.url, "HF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"},
        check=True,
        timeout=240,
    )
    np.testing.assert_array_equal(np.load(tmp_path / "result.npy"), run(tiny_pipeline))
    np.testing.assert_array_equal(run(MoebiusInpaintPipeline.from_pretrained(tmp_path / "copy")), run(tiny_pipeline))


def test_tiny_decoder_decodes_and_is_saved(tiny_pipeline, tmp_path):
    torch.manual_seed(0)
    tiny = AutoencoderTiny(encoder_block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4)
    tiny.save_pretrained(tmp_path / "tiny")
    assert tiny_pipeline.use_tiny_decoder(tmp_path / "tiny") is tiny_pipeline
    photo, hole = np.full((64, 64, 3), 0.25, np.float32), np.ones((64, 64), bool)
    call = {"num_inference_steps": 2, "paste": None, "detail": None, "output_type": "np"}

    def run(pipeline, **options):
        return pipeline(photo, hole, generator=torch.Generator().manual_seed(0), **{**call, **options})[0]

    latents = run(tiny_pipeline, output_type="latent")
    picture = run(tiny_pipeline)
    with torch.no_grad():
        expected = (tiny.decode(latents).sample / 2 + 0.5).clamp(0, 1)[0].permute(1, 2, 0)
    assert np.abs(picture[0] - expected.numpy()).max() < 1e-5

    tiny_pipeline.save_pretrained(tmp_path / "saved")
    for loaded in (
        type(tiny_pipeline).from_pretrained(tmp_path / "saved"),
        type(tiny_pipeline).from_pipe(tiny_pipeline),
    ):
        loaded.set_progress_bar_config(disable=True)
        assert np.abs(run(loaded) - picture).max() < 1e-5


def test_tiny_decoder_of_other_latents_is_refused(tiny_pipeline):
    tiny = AutoencoderTiny(
        encoder_block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4, latent_channels=16
    )
    with pytest.raises(ValueError, match=r"`tiny_vae`.* 4 channels.* 16"):
        tiny_pipeline.use_tiny_decoder(tiny)
    assert tiny_pipeline.tiny_vae is None
