"""The release's checkpoint files: what is read, inferred, and refused."""

import inspect
import json
import os
import pickle
from pathlib import Path

import pytest
import safetensors.torch
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusers_moebius.loaders.release_checkpoint import (
    UNET_PREFIX,
    default_guidance_scale,
    infer_config,
    load_release_components,
    make_release_scheduler,
    read_release_config,
    read_state_dict,
    weight_names,
)
from diffusers_moebius.models.latent_categories import LatentCategoriesEmbedder
from diffusers_moebius.models.unet_2d_moebius import MoebiusUNet2DModel
from diffusers_moebius.models.unet_2d_pixelhacker import PixelHackerUNet2DModel

DEFAULTS = {
    name: parameter.default
    for name, parameter in inspect.signature(MoebiusUNet2DModel.__init__).parameters.items()
    if name != "self"
}


@pytest.fixture
def checkpoint(release_state_dict, tmp_path):
    path = tmp_path / "diffusion_pytorch_model.bin"
    torch.save(release_state_dict, path)
    return path


def relative_error(components, parity_dir, name):
    """How far the U-Net's prediction is from that of the release."""
    numbers = safetensors.torch.load_file(parity_dir / "unet_io.safetensors")
    with torch.no_grad():
        tokens = components["lcg_embedder"](numbers["input.input_ids"]).embeds
        sample = components["unet"](numbers["input.latent_model_input"], numbers["input.timestep"], tokens).sample
    expected = numbers[f"{name}.sample"]
    return (sample - expected).abs().max() / expected.abs().max()


def test_loads_the_numbers_of_the_release(parity_dir):
    components = load_release_components(parity_dir / "student_tiny.safetensors", parity_dir / "student_tiny.json")
    assert relative_error(components, parity_dir, "student") <= 1e-5


def test_loads_the_numbers_of_the_teacher(parity_dir):
    config = {
        "attention_head_dim": 4,
        "norm_num_groups": 8,
        "sample_size": 16,
        "mid_block_type": "UNetMidBlock2DCrossAttn",
    }
    components = load_release_components(parity_dir / "teacher_tiny.safetensors", config)
    assert type(components["unet"]) is PixelHackerUNet2DModel and components["unet"].config.sample_size == 16
    assert relative_error(components, parity_dir, "teacher") <= 1e-4
    with pytest.raises(ValueError, match=r"`config` has mix_ffn_ratio, but .* holds a PixelHackerUNet2DModel"):
        load_release_components(parity_dir / "teacher_tiny.safetensors", {**config, "mix_mlp_ratio": 2.5})


def test_scheduler_runs_the_timesteps_of_the_release(parity_dir):
    expected = safetensors.torch.load_file(parity_dir / "pipeline_io.safetensors")["timesteps"]
    scheduler = make_release_scheduler()
    scheduler.set_timesteps(20)
    assert scheduler.timesteps[1:].tolist() == expected.tolist() == list(range(900, -1, -50))


def test_guidance_scales():
    names = ("pretrained", "ft_places2", "ft_celebahq", "ft_ffhq")
    assert [default_guidance_scale(name) for name in names] == [2.5, 2.5, 2.0, 2.0]


def test_weight_names():
    assert weight_names() == ["diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin"]
    assert weight_names("fp16", False) == ["diffusion_pytorch_model.fp16.bin"]
    assert weight_names(use_safetensors=True) == ["diffusion_pytorch_model.safetensors"]


# Configs


def test_published_shapes_give_the_defaults(parity_dir):
    shapes = json.loads((parity_dir / "student_full_keys.json").read_text())
    model_class, inferred = infer_config({name: tuple(shape) for name, shape in shapes.items()})
    assert model_class is MoebiusUNet2DModel
    assert inferred.pop("num_embeddings") == 20
    assert inferred == {name: DEFAULTS[name] for name in inferred}
    assert set(DEFAULTS) - set(inferred) == {
        "conv_type",
        "cross_attention_type",
        "dropout",
        "feed_forward_type",
        "norm_eps",
        "norm_num_groups",
        "self_attention_type",
    }


def test_published_shapes_of_the_teacher_give_the_defaults(parity_dir):
    shapes = json.loads((parity_dir / "teacher_full_keys.json").read_text())
    model_class, inferred = infer_config({name: tuple(shape) for name, shape in shapes.items()})
    assert model_class is PixelHackerUNet2DModel
    assert inferred.pop("num_embeddings") == 20
    defaults = inspect.signature(PixelHackerUNet2DModel.__init__).parameters
    assert inferred == {name: defaults[name].default for name in inferred}
    assert set(defaults) - set(inferred) == {"self", "sample_size", "norm_num_groups", "norm_eps", "dropout"}


@settings(max_examples=15, deadline=None)
@given(
    widths=st.lists(st.sampled_from([8, 16, 24]), min_size=1, max_size=3),
    layers_per_block=st.integers(1, 3),
    heads=st.sampled_from([1, 2, 4, 8]),
    tokens=st.integers(1, 6),
    window=st.sampled_from([1, 3, 7]),
    ratio=st.floats(0.3, 4.0),
)
def test_shapes_tell_the_config(widths, layers_per_block, heads, tokens, window, ratio):
    arguments = {
        "sample_size": 8,
        "in_channels": 5,
        "out_channels": 3,
        "block_out_channels": tuple(widths),
        "layers_per_block": layers_per_block,
        "num_attention_heads": heads,
        "cross_attention_dim": 6,
        "encoder_hid_dim": 10,
        "context_length": tokens,
        "local_window_size": window,
        "norm_num_groups": 4,
    }
    with torch.device("meta"):
        unet = MoebiusUNet2DModel(**arguments, mix_ffn_ratio=ratio)
    shapes = {UNET_PREFIX + name: tuple(tensor.shape) for name, tensor in unet.state_dict().items()}
    _, inferred = infer_config({**shapes, "embedding_layer.weight": (2 * tokens, 10)})
    assert inferred.pop("num_embeddings") == 2 * tokens
    # Of the ratios that give the width of the first level, any may be inferred.
    assert int(inferred.pop("mix_ffn_ratio") * widths[0]) == int(ratio * widths[0])
    assert inferred == {name: value for name, value in arguments.items() if name != "norm_num_groups"}


@pytest.mark.parametrize("suffix", [".json", ".yaml"])
def test_config_file(parity_dir, tmp_path, suffix):
    content = json.loads((parity_dir / "student_tiny.json").read_text())
    path = tmp_path / f"config{suffix}"
    path.write_text(json.dumps(content) if suffix == ".json" else yaml.safe_dump(content))
    assert read_release_config(path) == {
        "in_channels": 9,
        "out_channels": 4,
        "num_attention_heads": 4,
        "cross_attention_dim": 16,
        "encoder_hid_dim": 24,
        "block_out_channels": (16, 32, 32),
        "mix_ffn_ratio": 2.5,
        "norm_num_groups": 8,
        "sample_size": 16,
        "layers_per_block": 2,
        "num_embeddings": 20,
    }


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"no_such_name": 1}, "`config` has the unknown name 'no_such_name'"),
        ({"act_fn": "gelu"}, "`config` must have act_fn = 'silu'"),
        ({"encoder_hid_dim_type": "image_proj"}, "`config` must have encoder_hid_dim_type = 'text_proj'"),
        ({"num_attention_heads": 8}, "`config` must have num_attention_heads = None"),
        ({"norm_num_groups": "8"}, "`config` must have a value like 32 for norm_num_groups, but has '8'"),
        ({"norm_num_groups": True}, "`config` must have a value like 32 for norm_num_groups"),
        ({"block_out_channels": [320, "640"]}, "`config` must have a value like 320 for block_out_channels"),
        ("no such file", "`config` must be a mapping or a JSON or YAML file"),
    ],
)
def test_config_that_is_refused(config, message):
    with pytest.raises(ValueError, match=message):
        read_release_config(config)


@pytest.mark.parametrize(("name", "text"), [("a.json", "{"), ("a.yaml", "a: ["), ("a.yaml", "- 1"), ("a.json", "[1]")])
def test_config_file_that_is_refused(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match="`config` must"):
        read_release_config(tmp_path / name)


def test_config_that_contradicts_the_weights(checkpoint, release_config):
    with pytest.raises(ValueError, match=r"`config` has cross_attention_dim = 32, but the weights .* have 16"):
        load_release_components(checkpoint, {**release_config, "cross_attention_dim": 32})


def test_groups_are_not_guessed(checkpoint):
    with pytest.raises(ValueError, match="`config` must give norm_num_groups"):
        load_release_components(checkpoint)
    with pytest.raises(ValueError, match="`norm_num_groups` must divide"):
        load_release_components(checkpoint, {"norm_num_groups": 7})


def test_config_is_not_needed_for_the_usual_groups(tmp_path):
    unet = MoebiusUNet2DModel(
        sample_size=8, block_out_channels=(32, 64), cross_attention_dim=8, encoder_hid_dim=8, local_window_size=3
    )
    embedder = LatentCategoriesEmbedder(num_embeddings=20, embedding_dim=8)
    state_dict = {UNET_PREFIX + name: tensor for name, tensor in unet.state_dict().items()} | embedder.state_dict()
    torch.save(state_dict, tmp_path / "model.bin")
    loaded = load_release_components(tmp_path / "model.bin")
    names = ("_class_name", "_use_default_values")
    assert {k: v for k, v in loaded["unet"].config.items() if k not in names} == {
        k: v for k, v in unet.config.items() if k not in names
    }
    assert loaded["lcg_embedder"].config.embedding_dim == 8


# Files


@pytest.mark.parametrize("kind", ["bin", "legacy bin", "safetensors"])
def test_file_kinds(release_state_dict, release_config, tmp_path, kind):
    path = tmp_path / f"model.{kind.split()[-1]}"
    if kind == "safetensors":
        safetensors.torch.save_file(release_state_dict, path)
    else:
        torch.save(release_state_dict, path, _use_new_zipfile_serialization=kind == "bin")
    components = load_release_components(path, release_config)
    for component, prefix in (("unet", UNET_PREFIX), ("lcg_embedder", "")):
        assert not components[component].training
        for name, tensor in components[component].state_dict().items():
            torch.testing.assert_close(tensor, release_state_dict[prefix + name], rtol=0, atol=0)
    assert all(weight.requires_grad for weight in components["unet"].parameters())


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="the system does not tell what is mapped")
def test_weights_are_mapped_and_not_copied(checkpoint, release_config):
    unet = load_release_components(checkpoint, release_config)["unet"]
    lines = [line for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(str(checkpoint))]
    bounds = [[int(bound, 16) for bound in line.split()[0].split("-")] for line in lines]
    for name, tensor in unet.state_dict().items():
        assert any(start <= tensor.data_ptr() < end for start, end in bounds), name
    before = checkpoint.read_bytes()
    with torch.no_grad():
        unet.conv_norm_out.bias.add_(1)
    assert checkpoint.read_bytes() == before


def test_dtype(checkpoint, release_config, release_state_dict, tmp_path):
    components = load_release_components(checkpoint, release_config, torch.float16)
    for name, tensor in components["unet"].state_dict().items():
        keeps = set(name.split(".")) & set(MoebiusUNet2DModel._keep_in_fp32_modules)
        expected = torch.float32 if keeps else torch.float16
        assert tensor.dtype == (torch.int64 if name.endswith("num_batches_tracked") else expected)
    assert components["lcg_embedder"].dtype == torch.float16
    half = {
        name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in release_state_dict.items()
    }
    torch.save(half, tmp_path / "half.bin")
    assert load_release_components(tmp_path / "half.bin", release_config)["unet"].dtype == torch.float16
    assert load_release_components(tmp_path / "half.bin", release_config, torch.float32)["unet"].dtype == torch.float32


@pytest.mark.parametrize("suffix", [".bin", ".safetensors"])
@pytest.mark.parametrize("kept", [0, 100, 0.5, 0.999])
def test_truncated_file(release_state_dict, tmp_path, suffix, kept):
    path = tmp_path / f"model{suffix}"
    save = torch.save if suffix == ".bin" else safetensors.torch.save_file
    save(release_state_dict, path)
    data = path.read_bytes()
    path.write_bytes(data[: kept if isinstance(kept, int) else int(kept * len(data))])
    with pytest.raises(ValueError, match=f"model{suffix} is no "):
        read_state_dict(path)


@pytest.mark.parametrize("suffix", [".bin", ".safetensors"])
def test_text_file(tmp_path, suffix):
    (tmp_path / f"model{suffix}").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(ValueError, match="is no "):
        read_state_dict(tmp_path / f"model{suffix}")


class Hostile:
    def __reduce__(self):
        return os.mkdir, (os.environ["HOSTILE_FOLDER"],)


def test_pickle_runs_no_code(tmp_path, monkeypatch, release_state_dict):
    monkeypatch.setenv("HOSTILE_FOLDER", str(tmp_path / "ran"))
    torch.save({**release_state_dict, "hostile": Hostile()}, tmp_path / "a.bin")
    (tmp_path / "b.bin").write_bytes(pickle.dumps(Hostile()))
    for name in ("a.bin", "b.bin"):
        with pytest.raises(ValueError, match="holds more than tensors") as error:
            read_state_dict(tmp_path / name)
        assert "weights_only=False" not in str(error.value)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "content", [[torch.zeros(2)], {"a": 1}, {"state_dict": {"a": torch.zeros(2)}}, {1: torch.zeros(2)}]
)
def test_pickle_of_something_else(tmp_path, content):
    torch.save(content, tmp_path / "model.bin")
    with pytest.raises(ValueError, match="does not hold a dict of tensors"):
        read_state_dict(tmp_path / "model.bin")


def test_file_that_does_not_exist(tmp_path):
    for suffix in (".bin", ".safetensors"):
        with pytest.raises(FileNotFoundError):
            read_state_dict(tmp_path / f"model{suffix}")


# Names and shapes


def test_missing_unexpected_and_misshapen_names(release_state_dict, release_config, tmp_path):
    names = [name for name in release_state_dict if "up_blocks.1" in name]
    for name in names[:5]:
        del release_state_dict[name]
    release_state_dict["diff_model.mid_block.weight"] = torch.zeros(1)
    release_state_dict["diff_model.conv_norm_out.bias"] = torch.zeros(17)
    torch.save(release_state_dict, tmp_path / "model.bin")
    with pytest.raises(ValueError) as error:
        load_release_components(tmp_path / "model.bin", release_config)
    message = str(error.value)
    assert f"5 missing ({names[0]}, {names[1]}, {names[2]}, …)" in message
    assert "1 unexpected (diff_model.mid_block.weight)" in message
    assert "1 misshapen (diff_model.conv_norm_out.bias [17] instead of [16])" in message


@pytest.mark.parametrize("name", ["embedding_layer.weight", "diff_model.conv_out.conv_pw.weight"])
def test_missing_name_that_the_config_needs(release_state_dict, release_config, tmp_path, name):
    del release_state_dict[name]
    torch.save(release_state_dict, tmp_path / "model.bin")
    with pytest.raises(ValueError, match=f"truncated: {name} is missing"):
        load_release_components(tmp_path / "model.bin", release_config)


def test_shape_of_another_network(release_state_dict, release_config, tmp_path):
    release_state_dict["diff_model.conv_in.conv_dw.weight"] = torch.zeros(9)
    torch.save(release_state_dict, tmp_path / "model.bin")
    with pytest.raises(ValueError, match=r"conv_in\.conv_dw\.weight has the shape \[9\]"):
        load_release_components(tmp_path / "model.bin", release_config)


def test_empty_checkpoint(tmp_path):
    torch.save({}, tmp_path / "model.bin")
    with pytest.raises(ValueError, match="not one of Moebius"):
        load_release_components(tmp_path / "model.bin")
