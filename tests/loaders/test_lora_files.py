"""Files of LoRA adapters: saving and loading them, and what is wrong with some."""

import shutil
from pathlib import Path

import pytest
import torch
from adapters import FILE, LAYERS, equal, predict, relative_error, save_adapter, weights
from peft import get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from diffusers_moebius.pipelines.pipeline_moebius_inpaint import MoebiusInpaintPipeline


def test_saved_adapter_comes_back_exactly(pipe, tmp_path):
    folder = save_adapter(pipe, tmp_path / "a", rank_pattern={"proj_out": 2}, use_rslora=True)
    pipe.load_lora_weights(folder)
    expected, first = predict(pipe), load_file(folder / FILE)
    assert all(name.startswith("unet.") for name in first)
    pipe.save_lora_weights(
        tmp_path / "b",
        get_peft_model_state_dict(pipe.unet, adapter_name="default_0"),
        unet_lora_adapter_metadata=pipe.unet.peft_config["default_0"].to_dict(),
    )
    assert equal(load_file(tmp_path / "b" / FILE), first)
    pipe.unload_lora_weights()
    pipe.load_lora_weights(tmp_path / "b")
    assert torch.equal(predict(pipe), expected)
    config = pipe.unet.peft_config["default_0"]
    assert (config.r, config.lora_alpha, config.rank_pattern, config.use_rslora) == (3, 5, {"proj_out": 2}, True)
    assert config.target_modules == set(LAYERS)


def test_ways_to_name_an_adapter(pipe, tmp_path, hub):
    folder = save_adapter(pipe, tmp_path / "adapter")
    pipe.load_lora_weights(folder)
    expected = predict(pipe)
    hub.add("somebody/adapter").add_folder(folder)
    other = tmp_path / "other" / "inner"
    other.mkdir(parents=True)
    shutil.copy(folder / FILE, other / "style.safetensors")
    pipe.unet.save_lora_adapter(tmp_path / "model", adapter_name="default_0")  # without the prefix
    state_dict, metadata = pipe.lora_state_dict(folder, return_lora_metadata=True)
    for source, options in (
        (str(folder), {}),
        (folder / FILE, {}),
        ("somebody/adapter", {}),
        (other, {}),
        (other.parent, {"subfolder": "inner"}),
        (other, {"weight_name": "style.safetensors"}),
        (other.parent, {"subfolder": Path("inner"), "weight_name": Path("style.safetensors")}),
        (tmp_path / "model", {}),
        (state_dict, {"metadata": metadata}),
    ):
        pipe.unload_lora_weights()
        pipe.load_lora_weights(source, **options)
        assert torch.equal(predict(pipe), expected), source
    hub.stop()
    pipe.load_lora_weights("somebody/adapter", adapter_name="cached")


def test_alpha_is_the_rank_without_metadata(student, tmp_path):
    state_dict = load_file(save_adapter(student, tmp_path / "a", rank_pattern={"proj_out": 2}) / FILE)
    student.load_lora_weights(state_dict, adapter_name="bare")
    scalings = {layer.scaling["bare"] for layer in student.unet.modules() if hasattr(layer, "scaling")}
    assert scalings == {1.0}


def test_default_names_are_new_ones(student, tmp_path):
    first = save_adapter(student, tmp_path / "a", target_modules=["attn1.to_q"])
    second = save_adapter(student, tmp_path / "b", target_modules=["attn2.to_q"])
    for folder in (first, second, first):
        student.load_lora_weights(folder)
    assert student.get_list_adapters() == {"unet": ["default_0", "default_1", "default_2"]}


@pytest.mark.parametrize(
    "state_dict", [{}, {"lora_foo": torch.zeros(2)}, {"text_encoder.proj.weight": torch.zeros(2)}]
)
def test_a_file_without_adapters_is_a_warning(student, tmp_path, caplog, state_dict):
    before = weights(student)
    with caplog.at_level("WARNING"):
        student.load_lora_weights(state_dict)
    assert "no LoRA weights for MoebiusUNet2DModel" in caplog.text
    assert equal(weights(student), before) and student.get_list_adapters() == {}


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("has_metadata", [False, True])
def test_adapters_with_biases(pipe, tmp_path, low_cpu_mem_usage, has_metadata):
    folder = save_adapter(pipe, tmp_path / "a", target_modules=["to_q", "proj_out"], lora_bias=True, alpha=3)
    state_dict = load_file(folder / FILE)
    assert any(name.endswith("lora_B.bias") for name in state_dict)
    plain = predict(pipe)
    source = folder if has_metadata else state_dict
    pipe.load_lora_weights(source, adapter_name="style", low_cpu_mem_usage=low_cpu_mem_usage)
    assert not any(tensor.is_meta for tensor in pipe.unet.state_dict().values())
    whole = predict(pipe)
    assert pipe.unet.peft_config["style"].lora_bias
    loaded = get_peft_model_state_dict(pipe.unet, adapter_name="style")
    assert equal({f"unet.{name}": tensor for name, tensor in loaded.items()}, state_dict)
    pipe.unload_lora_weights()
    pipe.load_lora_weights({name: tensor * (not name.endswith("bias")) for name, tensor in state_dict.items()})
    assert relative_error(predict(pipe), whole) > 1e-4 and relative_error(whole, plain) > 1e-4


def test_pickles_hold_weights_only(student, tmp_path):
    folder = save_adapter(student, tmp_path / "safe", alpha=3)
    student.load_lora_weights(folder)
    expected, layers = predict(student), get_peft_model_state_dict(student.unet, adapter_name="default_0")
    student.save_lora_weights(tmp_path / "pickle", layers, safe_serialization=False)
    for source in (tmp_path / "pickle", tmp_path / "pickle" / "pytorch_lora_weights.bin"):
        student.unload_lora_weights()
        student.load_lora_weights(source)
        assert torch.equal(predict(student), expected)
    torch.save({"unet.proj_out.lora_A.weight": Dangerous()}, tmp_path / "pickle" / "pytorch_lora_weights.bin")
    with pytest.raises(ValueError, match=r"pytorch_lora_weights.bin cannot be read"):
        student.load_lora_weights(tmp_path / "pickle")


class Dangerous:
    def __reduce__(self):
        return (pytest.fail, ("ran",))


def test_hotswap(student, tmp_path):
    first, second = (save_adapter(student, tmp_path / str(seed), seed=seed) for seed in (1, 2))
    student.load_lora_weights(second, adapter_name="style")
    expected = predict(student)
    student.unload_lora_weights()
    with pytest.raises(ValueError, match="`adapter_name` must be one of none"):
        student.load_lora_weights(first, adapter_name="style", hotswap=True)
    student.load_lora_weights(first, adapter_name="style")
    student.load_lora_weights(second, adapter_name="style", hotswap=True)
    assert torch.equal(predict(student), expected)


def spoil(folder, change):
    """Changes the weights or the metadata of a saved adapter."""
    with safe_open(folder / FILE, "pt") as file:
        metadata = file.metadata()
    state_dict = load_file(folder / FILE)
    change(state_dict, metadata)
    save_file(state_dict, folder / FILE, metadata)


def rename(state_dict, old, new):
    state_dict[new] = state_dict.pop(old)


NAME = "unet.down_blocks.0.attentions.0.proj_out.lora_A.weight"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda weights, _: weights.update({NAME: torch.zeros(3, 5, 1, 1)}), r"proj_out.*\[3, 5, 1, 1\] instead of"),
        (lambda weights, _: weights.update({NAME: weights[NAME][:2]}), "proj_out.*instead of"),
        (lambda weights, _: weights.pop(NAME), "proj_out.lora_A.weight` is missing"),
        (lambda weights, _: rename(weights, NAME, "unet.nowhere.lora_A.weight"), "`nowhere.lora_A.weight` belongs"),
        (lambda weights, _: rename(weights, NAME, "text_encoder.proj.lora_A.weight"), "text_encoder"),
        (lambda weights, _: rename(weights, NAME, NAME.replace("lora_A", "lora_C")), "lora_C"),
        (lambda weights, _: weights.update(other=torch.zeros(1)), "`other`"),
        (lambda _, metadata: metadata.update(lora_adapter_metadata='{"unet.r": 4}'), "instead of"),
        (lambda _, metadata: metadata.update(lora_adapter_metadata='{"unet.r": -4}'), "cannot be added"),
        (lambda _, metadata: metadata.update(lora_adapter_metadata="{"), "cannot be read"),
    ],
)
def test_what_does_not_fit_changes_nothing(student, tmp_path, change, named):
    student.load_lora_weights(save_adapter(student, tmp_path / "good", seed=2), adapter_name="good")
    before, adapters, expected = weights(student), student.get_list_adapters(), predict(student)
    folder = save_adapter(student, tmp_path / "bad")
    spoil(folder, change)
    with pytest.raises(ValueError, match=named) as error:
        student.load_lora_weights(folder)
    assert "`pretrained_model_name_or_path_or_dict`" in str(error.value)
    assert equal(weights(student), before) and student.get_list_adapters() == adapters
    assert torch.equal(predict(student), expected)


def test_adapter_of_another_model(student, pixelhacker_unet, tmp_path):
    teacher = MoebiusInpaintPipeline(**{**student.components, "unet": pixelhacker_unet})
    folder = save_adapter(teacher, tmp_path)
    with pytest.raises(ValueError, match="for MoebiusUNet2DModel"):
        student.load_lora_weights(folder)


def test_position_filters_take_no_adapter(student):
    name = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.pos_conv"
    state_dict = {
        f"{name}.lora_A.weight": torch.zeros(2, 1, 1, 3, 3),
        f"{name}.lora_B.weight": torch.zeros(4, 2, 1, 1, 1),
    }
    with pytest.raises(ValueError, match="position filters"):
        student.load_lora_weights(state_dict)


@pytest.mark.parametrize(
    ("source", "options", "named"),
    [
        ("adapter", {"adapter_name": "taken"}, "`adapter_name` must be a new one"),
        ("adapter", {"adapter_name": "v1.5"}, "`adapter_name` must have no dot"),
        ("adapter", {"weight_name": "other.safetensors"}, "`weight_name`.*pytorch_lora_weights"),
        ("adapter", {"weight": "other"}, "`weight` is not an argument"),
        ("empty", {}, "`pretrained_model_name_or_path_or_dict` must hold pytorch_lora_weights"),
        ("two", {}, "`weight_name` must be one of.*a.safetensors, b.safetensors"),
        ("no/such/folder", {}, "`pretrained_model_name_or_path_or_dict` must be a folder or the id"),
        ("text.safetensors", {}, "text.safetensors cannot be read"),
    ],
)
def test_bad_arguments_are_named(student, tmp_path, monkeypatch, source, options, named):
    monkeypatch.chdir(tmp_path)
    student.load_lora_weights(save_adapter(student, tmp_path / "adapter"), adapter_name="taken")
    (tmp_path / "empty").mkdir()
    (tmp_path / "two").mkdir()
    for name in ("two/a.safetensors", "two/b.safetensors", "text.safetensors"):
        (tmp_path / name).write_text("no weights")
    with pytest.raises(ValueError, match=named):
        student.load_lora_weights(source, **options)
    assert student.get_list_adapters() == {"unet": ["taken"]}


def test_saving_names_bad_arguments(student, tmp_path):
    (tmp_path / "file").touch()
    layers = load_file(save_adapter(student, tmp_path / "adapter") / FILE)
    with pytest.raises(ValueError, match="`unet_lora_layers`"):
        student.save_lora_weights(tmp_path / "new")
    with pytest.raises(ValueError, match="`save_directory`"):
        student.save_lora_weights(tmp_path / "file", layers)
    with pytest.raises(ValueError, match="`unet_lora_adapter_metadata` needs `safe_serialization`"):
        student.save_lora_weights(
            tmp_path / "new", layers, safe_serialization=False, unet_lora_adapter_metadata={"r": 3}
        )
    assert not (tmp_path / "new").exists()
