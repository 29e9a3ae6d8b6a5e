"""Conversion of a release checkpoint: the whole folder, or nothing."""

import json

import pytest
import safetensors.torch
import torch
from diffusers import AutoencoderKL

from diffusers_moebius import conversion
from diffusers_moebius.conversion import convert_release_checkpoint
from diffusers_moebius.pipelines.pipeline_moebius_inpaint import MoebiusInpaintPipeline


@pytest.fixture
def source(release_state_dict, tmp_path):
    path = tmp_path / "ft_ffhq" / "diffusion_pytorch_model.bin"
    path.parent.mkdir()
    torch.save(release_state_dict, path)
    return path


@pytest.fixture
def vae(parity_dir):
    return parity_dir / "vae_tiny"


def entries(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("as_folder", [False, True])
def test_convert(source, vae, release_config, release_state_dict, tmp_path, as_folder):
    target = tmp_path / "new" / "target"
    written = convert_release_checkpoint(source.parent if as_folder else source, str(target), release_config, vae)
    assert written == target
    assert {"unet", "lcg_embedder", "scheduler", "vae", "model_index.json", "README.md"} <= set(entries(target))
    assert entries(target.parent) == ["target"]
    assert "# target\n" in (target / "README.md").read_text()
    weights = safetensors.torch.load_file(target / "unet" / "diffusion_pytorch_model.safetensors")
    assert {f"diff_model.{name}" for name in weights} == set(release_state_dict) - {"embedding_layer.weight"}
    for name, tensor in weights.items():
        torch.testing.assert_close(tensor, release_state_dict[f"diff_model.{name}"], rtol=0, atol=0)
    pipeline = MoebiusInpaintPipeline.from_pretrained(target)
    assert pipeline.config.default_guidance_scale == 2.0  # by the folder's name
    assert isinstance(pipeline.vae, AutoencoderKL)


def test_files_can_be_read_by_others(source, vae, release_config, tmp_path):
    (tmp_path / "ordinary").mkdir()
    target = convert_release_checkpoint(source, tmp_path / "target", release_config, vae)
    assert target.stat().st_mode == (tmp_path / "ordinary").stat().st_mode


def test_convert_safetensors_with_a_config_file(parity_dir, vae, tmp_path):
    config = parity_dir / "student_tiny.json"
    target = convert_release_checkpoint(parity_dir / "student_tiny.safetensors", tmp_path / "target", config, vae)
    assert json.loads((target / "unet" / "config.json").read_text())["norm_num_groups"] == 8
    assert MoebiusInpaintPipeline.from_pretrained(target).config.default_guidance_scale == 2.5


def test_convert_keeps_the_type_of_the_weights(release_state_dict, vae, release_config, tmp_path):
    for name, tensor in release_state_dict.items():
        if tensor.is_floating_point():
            release_state_dict[name] = tensor.half()
    torch.save(release_state_dict, tmp_path / "half.bin")
    target = convert_release_checkpoint(tmp_path / "half.bin", tmp_path / "target", release_config, vae)
    weights = safetensors.torch.load_file(target / "unet" / "diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float16, torch.int64}


def test_convert_fetches_the_autoencoder(release_hub, source, release_config, tmp_path):
    target = convert_release_checkpoint(source, tmp_path / "target", release_config)
    assert (target / "vae" / "diffusion_pytorch_model.safetensors").is_file()
    assert release_hub.downloads() == ["vae/config.json", "vae/diffusion_pytorch_model.bin"]


def test_overwrite(source, vae, release_config, release_state_dict, tmp_path):
    target = convert_release_checkpoint(source, tmp_path / "target", release_config, vae)
    (target / "stale").touch()
    with pytest.raises(ValueError, match="`target` must not exist"):
        convert_release_checkpoint(source, target, release_config, vae)
    assert (target / "stale").exists()
    convert_release_checkpoint(source, target, release_config, vae, overwrite=True)
    assert not (target / "stale").exists()
    assert entries(tmp_path) == ["ft_ffhq", "target"]


def test_overwrite_only_pipelines(source, vae, release_config, tmp_path):
    (tmp_path / "photos").mkdir()
    convert_release_checkpoint(source, tmp_path / "photos", release_config, vae, overwrite=True)  # empty
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "photo.png").touch()
    (tmp_path / "file").touch()
    for name in ("other", "file"):
        with pytest.raises(ValueError, match="`target` is only overwritten if it is a pipeline folder"):
            convert_release_checkpoint(source, tmp_path / name, release_config, vae, overwrite=True)
    assert (tmp_path / "other" / "photo.png").exists()


def test_source_inside_target(source, vae, release_config):
    with pytest.raises(ValueError, match="`target` must not contain `source`"):
        convert_release_checkpoint(source, source.parent, release_config, vae, overwrite=True)
    assert source.exists()


def test_source_that_is_not_there(vae, tmp_path):
    with pytest.raises(ValueError, match="`source` must be a checkpoint file"):
        convert_release_checkpoint(tmp_path / "nothing.bin", tmp_path / "target", None, vae)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"`source` must hold one of diffusion_pytorch_model\.safetensors"):
        convert_release_checkpoint(tmp_path / "empty", tmp_path / "target", None, vae)


def test_truncated_source(source, vae, release_config, tmp_path):
    source.write_bytes(source.read_bytes()[:-1000])
    with pytest.raises(ValueError, match="truncated"):
        convert_release_checkpoint(source, tmp_path / "target", release_config, vae)
    assert entries(tmp_path) == ["ft_ffhq"]


@pytest.mark.parametrize(
    ("step", "error"),
    [
        ("before", KeyboardInterrupt()),
        ("while saving", OSError("disk full")),
        ("while saving", KeyboardInterrupt()),
        ("while renaming", KeyboardInterrupt()),
    ],
)
def test_failure_leaves_everything_as_it_was(source, vae, release_config, tmp_path, monkeypatch, step, error):
    existing = convert_release_checkpoint(source, tmp_path / "existing", release_config, vae)
    before = {path: path.read_bytes() for path in existing.rglob("*") if path.is_file()}
    if step == "before":

        def fail(*args, **kwargs):
            raise error

        monkeypatch.setattr(conversion, "load_release_components", fail)
    elif step == "while saving":
        save_config = MoebiusInpaintPipeline.save_config

        def fail(self, folder, *args, **kwargs):
            save_config(self, folder)
            raise error

        monkeypatch.setattr(MoebiusInpaintPipeline, "save_config", fail)
    else:
        rename = type(tmp_path).rename

        def fail(self, target):
            if self.parent.name.startswith(".") and self.name == target.name:
                raise error
            return rename(self, target)

        monkeypatch.setattr(type(tmp_path), "rename", fail)
    for name in ("existing", "fresh"):
        with pytest.raises(type(error)):
            convert_release_checkpoint(source, tmp_path / name, release_config, vae, overwrite=True)
    assert entries(tmp_path) == ["existing", "ft_ffhq"]
    assert {path: path.read_bytes() for path in existing.rglob("*") if path.is_file()} == before
