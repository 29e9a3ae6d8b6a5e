"""LoRA adapters on the pipeline, for the student and the teacher."""

import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from diffusers_moebius.models.unet_2d_pixelhacker import PixelHackerUNet2DModel
from diffusers_moebius.pipelines.pipeline_moebius_inpaint import MoebiusInpaintPipeline

FILE = "pytorch_lora_weights.safetensors"
LAMBDA_LAYERS = ["to_q", "to_k", "to_v"]
LAYERS = [*LAMBDA_LAYERS, "proj_out", "inverted_conv.conv", "point_conv.conv", "q_proj", "o_proj", "net.2"]


@pytest.fixture
def pixelhacker_unet():
    torch.manual_seed(0)
    return PixelHackerUNet2DModel(
        sample_size=8,
        block_out_channels=(16, 16),
        layers_per_block=1,
        num_attention_heads=4,
        cross_attention_dim=16,
        encoder_hid_dim=24,
        norm_num_groups=8,
    ).eval()


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


def save_adapter(pipe, folder, seed=1, rank=3, alpha=5, target_modules=LAYERS, **options):
    """Writes an adapter with random weights that was made for a copy of the pipeline's U-Net."""
    torch.manual_seed(seed)
    unet = type(pipe.unet).from_config(pipe.unet.config)
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=target_modules, init_lora_weights=False, **options)
    unet.add_adapter(config)
    metadata = unet.peft_config["default"].to_dict()
    layers = get_peft_model_state_dict(unet)
    MoebiusInpaintPipeline.save_lora_weights(folder, layers, unet_lora_adapter_metadata=metadata)
    return folder


@torch.no_grad()
def predict(pipe, **options):
    generator = torch.Generator().manual_seed(0)
    config = pipe.unet.config
    sample = torch.randn(2, 9, 8, 8, generator=generator)
    context = torch.randn(2, 10, config.encoder_hid_dim, generator=generator)
    return pipe.unet(sample, torch.tensor([10, 700]), context, **options).sample


def relative_error(actual, expected):
    return ((actual - expected).abs().max() / expected.abs().max()).item()


def weights(pipe):
    return {name: tensor.clone() for name, tensor in pipe.unet.state_dict().items()}


def equal(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


# Where adapters act


@pytest.mark.parametrize("algorithm", ["fast", "reference"])
@pytest.mark.parametrize("attention", ["attn1", "attn2"])
@pytest.mark.parametrize("projection", LAMBDA_LAYERS)
def test_acts_on_the_projections_of_the_lambda_layers(student, tmp_path, algorithm, attention, projection):
    student.unet.set_lambda_algorithm(algorithm)
    before = predict(student)
    student.load_lora_weights(save_adapter(student, tmp_path, target_modules=[f"{attention}.{projection}"]))
    after = predict(student)
    assert relative_error(after, before) > 1e-4
    # Fused, the effect is in the weights: a processor that reads them instead of calling the layer shows only then.
    student.fuse_lora()
    assert relative_error(predict(student), after) < 1e-5


@pytest.mark.parametrize(
    "target", ["inverted_conv.conv", "point_conv.conv", "proj_in", "conv1.conv_pw", "conv_shortcut"]
)
def test_acts_on_convolutions(student, tmp_path, target):
    before = predict(student)
    student.load_lora_weights(save_adapter(student, tmp_path, target_modules=[target]))
    assert relative_error(predict(student), before) > 1e-4


@pytest.mark.parametrize("processors", ["ChunkedGatedLinearAttentionProcessor", "GatedLinearAttentionProcessor"])
def test_acts_on_gated_linear_attention(tiny_pipeline, pixelhacker_unet, tmp_path, processors):
    from diffusers_moebius.models import linear_attention

    tiny_pipeline.register_modules(unet=pixelhacker_unet)
    for module in pixelhacker_unet.modules():
        if isinstance(module, linear_attention.GatedLinearAttention):
            module.set_processor(getattr(linear_attention, processors)())
    for target in ("q_proj", "k_proj", "v_proj", "g_proj", "gk_proj.1", "o_proj", "to_out.0"):
        before = predict(tiny_pipeline)
        tiny_pipeline.load_lora_weights(save_adapter(tiny_pipeline, tmp_path, target_modules=[target]))
        after = predict(tiny_pipeline)
        assert relative_error(after, before) > 1e-5, target
        tiny_pipeline.fuse_lora()
        assert relative_error(predict(tiny_pipeline), after) < 1e-5
        tiny_pipeline.unfuse_lora()
        tiny_pipeline.unload_lora_weights()


def test_fast_and_reference_processors_agree(student, tmp_path):
    student.load_lora_weights(save_adapter(student, tmp_path))
    fast = predict(student)
    student.unet.set_lambda_algorithm("reference")
    assert relative_error(predict(student), fast) < 1e-5


def test_dropout_of_training_is_off(student, tmp_path):
    student.load_lora_weights(save_adapter(student, tmp_path, lora_dropout=0.5))
    assert torch.equal(predict(student), predict(student))


def test_gradients_reach_the_adapter_alone_in_every_processor(student):
    student.unet.add_adapter(LoraConfig(r=2, target_modules=LAYERS))
    gradients = {}
    for algorithm in ("fast", "reference"):
        student.unet.set_lambda_algorithm(algorithm)
        student.unet.zero_grad()
        generator = torch.Generator().manual_seed(0)
        sample, context = torch.randn(1, 9, 8, 8, generator=generator), torch.randn(1, 10, 24, generator=generator)
        student.unet(sample, 10, context).sample.square().mean().backward()
        gradients[algorithm] = {n: p.grad for n, p in student.unet.named_parameters() if p.grad is not None}
    assert all(".lora_" in name for name in gradients["fast"])
    for name, gradient in gradients["fast"].items():
        if ".lora_B." in name:  # A has no gradient while B is zero
            assert gradient.abs().max() > 0, name
            torch.testing.assert_close(gradient, gradients["reference"][name], rtol=1e-3, atol=1e-7)


# Weights, several adapters, fusing


def test_weight_of_zero_gives_the_same_bits(pipe, tmp_path):
    before = predict(pipe)
    pipe.load_lora_weights(save_adapter(pipe, tmp_path), adapter_name="style")
    assert not torch.equal(predict(pipe), before)
    pipe.set_adapters("style", 0.0)
    assert torch.equal(predict(pipe), before)
    pipe.set_adapters("style")
    pipe.disable_lora()
    assert torch.equal(predict(pipe), before)
    pipe.enable_lora()
    assert not torch.equal(predict(pipe), before)
    assert torch.equal(predict(pipe, attention_kwargs={"scale": 0.0}), before)


def test_weights_of_two_adapters_add_up(pipe, tmp_path):
    plain = weights(pipe)
    deltas = {}
    for seed, name in ((1, "first"), (2, "second")):
        pipe.load_lora_weights(save_adapter(pipe, tmp_path / name, seed=seed, rank=2 * seed), adapter_name=name)
        assert pipe.get_active_adapters() == [name]  # the last one loaded
        pipe.fuse_lora()
        deltas[name] = {
            key.replace(".base_layer", ""): tensor - plain[key.replace(".base_layer", "")]
            for key, tensor in weights(pipe).items()
            if ".lora_" not in key
        }
        pipe.unfuse_lora()
    assert pipe.get_list_adapters() == {"unet": ["first", "second"]}

    pipe.set_adapters(["first", "second"], [0.7, -0.4])
    actual = predict(pipe)
    assert pipe.get_active_adapters() == ["first", "second"]
    pipe.unload_lora_weights()
    pipe.unet.load_state_dict(
        {key: tensor + 0.7 * deltas["first"][key] - 0.4 * deltas["second"][key] for key, tensor in plain.items()}
    )
    assert relative_error(actual, predict(pipe)) < 1e-5


@pytest.mark.parametrize("lora_scale", [1.0, 0.3])
def test_fusing_changes_nothing_and_unfusing_restores(pipe, tmp_path, lora_scale):
    before = predict(pipe)
    pipe.load_lora_weights(save_adapter(pipe, tmp_path), adapter_name="style")
    pipe.set_adapters("style", 0.7 * lora_scale)
    expected = predict(pipe)
    pipe.set_adapters("style", 0.7)
    unfused = predict(pipe)
    pipe.fuse_lora(lora_scale=lora_scale)
    assert pipe.num_fused_loras == 1 and pipe.fused_loras == {"style"}
    assert relative_error(predict(pipe), expected) < 1e-5
    pipe.unfuse_lora()
    assert pipe.num_fused_loras == 0
    assert relative_error(predict(pipe), unfused) < 1e-5
    pipe.disable_lora()
    assert relative_error(predict(pipe), before) < 1e-5


def test_disabling_fused_adapters_unfuses_them(pipe, tmp_path):
    before = predict(pipe)
    pipe.load_lora_weights(save_adapter(pipe, tmp_path))
    unfused = predict(pipe)
    pipe.fuse_lora()
    pipe.disable_lora()
    assert pipe.num_fused_loras == 0
    assert relative_error(predict(pipe), before) < 1e-5
    pipe.enable_lora()
    assert relative_error(predict(pipe), unfused) < 1e-5


def test_fused_adapters_are_in_the_way_of_others(pipe, tmp_path):
    folder = save_adapter(pipe, tmp_path)
    pipe.load_lora_weights(folder, adapter_name="style")
    pipe.fuse_lora()
    fused = predict(pipe)
    for method, arguments in (
        ("load_lora_weights", [folder]),
        ("set_adapters", ["style"]),
        ("delete_adapters", ["style"]),
        ("fuse_lora", []),
    ):
        with pytest.raises(ValueError, match=f"`{method}`.*unfuse_lora"):
            getattr(pipe, method)(*arguments)
    assert torch.equal(predict(pipe), fused)
    pipe.unload_lora_weights()  # for good
    assert torch.equal(predict(pipe), fused)
    pipe.load_lora_weights(folder)
    assert not torch.equal(predict(pipe), fused)


def test_weights_by_blocks(pipe, tmp_path):
    pipe.load_lora_weights(save_adapter(pipe, tmp_path), adapter_name="style")
    whole = predict(pipe)

    def scales(weights):
        pipe.set_adapters("style", 1.0)
        full = {name: layer.scaling["style"] for name, layer in pipe.unet.named_modules() if hasattr(layer, "scaling")}
        pipe.set_adapters("style", {"unet": weights})
        return {name: pipe.unet.get_submodule(name).scaling["style"] / scale for name, scale in full.items()}

    for name, scale in scales({"down": 0.5}).items():
        assert scale == (0.5 if name.startswith("down_blocks.") else 1), name
    for name, scale in scales({"down": {"block_0": 0.25}, "up": {"block_1": [0.0, 2]}}).items():
        expected = {"down_blocks.0": 0.25, "up_blocks.1.attentions.0": 0, "up_blocks.1.attentions.1": 2}
        assert scale == next((value for part, value in expected.items() if name.startswith(f"{part}.")), 1), name
    assert all(scale == 0.5 for name, scale in scales({"proj_out": 0.5}).items() if "proj_out" in name)
    scales({"down": 1, "up": {"block_0": 1.0}})
    assert torch.equal(predict(pipe), whole)
    for wrong in ({"middle": 1}, {"down": {"block_9": 1}}, {"up": {"block_0": [1] * 9}}):
        with pytest.raises(ValueError, match="`adapter_weights`"):
            scales(wrong)


def test_fusing_some_of_the_adapters(pipe, tmp_path):
    for seed, name in ((1, "first"), (2, "second"), (3, "third")):
        pipe.load_lora_weights(save_adapter(pipe, tmp_path / name, seed=seed), adapter_name=name)
    expected = {}
    for names in (["first"], ["third", "first"]):
        pipe.set_adapters(names)
        expected[len(names)] = predict(pipe)
    pipe.set_adapters(["second"])
    active = predict(pipe)
    for names in (["first"], ["third", "first"], ["first", "third"]):
        pipe.fuse_lora(adapter_names=names)
        assert pipe.fused_loras == set(names)
        assert relative_error(predict(pipe), expected[len(names)]) < 1e-5
        pipe.unfuse_lora()
        assert relative_error(predict(pipe), active) < 1e-5


def test_scale_of_one_call(student, tmp_path):
    image, mask = torch.full((1, 3, 64, 64), 0.5), torch.zeros(1, 64, 64)
    mask[:, 20:40, 20:40] = 1

    def run(**options):
        generator = torch.Generator().manual_seed(0)
        options |= {"num_inference_steps": 2, "generator": generator, "output_type": "latent"}
        return student(image, mask, **options).images

    before = run()
    student.load_lora_weights(save_adapter(student, tmp_path), adapter_name="style")
    student.set_adapters("style", 0.5)
    half = run()
    student.set_adapters("style")
    assert student.unet_name == "unet"
    assert torch.equal(run(attention_kwargs={"scale": 0.0}), before)
    assert relative_error(run(attention_kwargs={"scale": 0.5}), half) < 1e-5
    assert not torch.equal(run(), half)


def test_fusing_that_fails_leaves_nothing_half_fused(student, tmp_path):
    folder = save_adapter(student, tmp_path)
    student.load_lora_weights(folder, adapter_name="style")
    last = [layer for name, layer in student.unet.named_modules() if hasattr(layer, "lora_A")][-1]
    weight = last.lora_B["style"].weight
    finite = weight.detach().clone()
    expected = predict(student)
    weight.data.fill_(float("inf"))
    with pytest.raises(ValueError):
        student.fuse_lora(lora_scale=0.5, safe_fusing=True)
    weight.data.copy_(finite)
    assert not any(getattr(layer, "merged", False) for layer in student.unet.modules())
    assert relative_error(predict(student), expected) < 1e-5


@pytest.mark.parametrize(
    ("prepare", "options", "named"),
    [
        (lambda pipe: pipe.unload_lora_weights(), {}, "load_lora_weights"),
        (lambda pipe: pipe.disable_lora(), {}, "enable_lora"),
        (lambda pipe: None, {"adapter_names": ["default_0", "other"]}, "`adapter_names`.*default_0.*'other'"),
    ],
)
def test_fusing_what_does_not_act_is_refused(student, tmp_path, prepare, options, named):
    student.load_lora_weights(save_adapter(student, tmp_path))
    prepare(student)
    with pytest.raises(ValueError, match=named):
        student.fuse_lora(**options)


def test_deleting_and_unloading(pipe, tmp_path):
    before, plain = predict(pipe), weights(pipe)
    for seed, name in ((1, "first"), (2, "second")):
        pipe.load_lora_weights(save_adapter(pipe, tmp_path / name, seed=seed), adapter_name=name)
    second = predict(pipe)
    with pytest.raises(ValueError, match="`adapter_names` must be among first, second"):
        pipe.delete_adapters(["first", "third"])
    pipe.delete_adapters("first")
    assert pipe.get_list_adapters() == {"unet": ["second"]} and pipe.get_active_adapters() == ["second"]
    assert torch.equal(predict(pipe), second)
    pipe.delete_adapters(["second"])
    assert pipe.get_list_adapters() == {} and pipe.get_active_adapters() == []
    assert torch.equal(predict(pipe), before) and equal(weights(pipe), plain)
    pipe.unload_lora_weights()  # with nothing to unload
    with pytest.raises(ValueError, match="second"):
        pipe.set_adapters("second")


def test_threads_with_adapters_do_not_disturb_each_other(student, tmp_path):
    for seed, name in ((1, "first"), (2, "second")):
        student.load_lora_weights(save_adapter(student, tmp_path / name, seed=seed), adapter_name=name)
    student.set_adapters(["first", "second"], [0.5, 0.5])
    image, mask = torch.full((3, 64, 64), 0.5), torch.zeros(64, 64)
    mask[20:40, 20:40] = 1
    results = {}

    def work(seed):
        generator = torch.Generator().manual_seed(seed)
        options = {"num_inference_steps": 3, "guidance_scale": seed, "output_type": "latent", "generator": generator}
        results.setdefault(seed, []).append(student(image[None], mask[None], **options).images)

    for seed in (1, 2, 3):
        work(seed)
    threads = [threading.Thread(target=work, args=(seed,)) for seed in (1, 2, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(len(pair) == 2 and torch.equal(*pair) for pair in results.values())


# Files


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


# The pipeline around it


def test_fused_adapters_are_saved_with_the_pipeline(pipe, tmp_path):
    plain = weights(pipe)
    pipe.load_lora_weights(save_adapter(pipe, tmp_path / "adapter"))
    with pytest.raises(ValueError, match="not fused"):
        pipe.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
    pipe.fuse_lora()
    expected = predict(pipe)
    pipe.save_pretrained(tmp_path / "saved")
    loaded = MoebiusInpaintPipeline.from_pretrained(tmp_path / "saved")
    assert weights(loaded).keys() == plain.keys()
    assert torch.equal(predict(loaded), expected)
    assert torch.equal(predict(pipe), expected) and pipe.num_fused_loras == 1  # as it was
    pipe.disable_lora()
    pipe.save_pretrained(tmp_path / "plain")
    again = weights(MoebiusInpaintPipeline.from_pretrained(tmp_path / "plain"))
    assert all(torch.allclose(again[name], plain[name], atol=1e-6) for name in plain)


def test_preparing_for_inference(pipe, tmp_path):
    folder = save_adapter(pipe, tmp_path / "adapter")
    pipe.save_pretrained(tmp_path / "saved")
    pipe.load_lora_weights(folder)
    expected = predict(pipe)
    with pytest.raises(ValueError, match=r"active.*not fused"):
        pipe.prepare_for_inference()
    assert torch.equal(predict(pipe), expected)
    pipe.fuse_lora()
    pipe.prepare_for_inference()
    assert relative_error(predict(pipe), expected) < 1e-5
    assert pipe.get_list_adapters() == {} and not any("lora" in name for name in pipe.unet.state_dict())

    # Undone by loading the pipeline again.
    pipe = MoebiusInpaintPipeline.from_pretrained(tmp_path / "saved")
    pipe.load_lora_weights(folder)
    assert torch.equal(predict(pipe), expected)


def test_prepared_pipeline_takes_no_adapter(student, tmp_path):
    folder = save_adapter(student, tmp_path)
    student.prepare_for_inference()
    expected = predict(student)
    with pytest.raises(ValueError, match=r"`load_lora_weights`.*prepared for inference"):
        student.load_lora_weights(folder)
    with pytest.raises(ValueError, match=r"`set_adapters`.*prepared for inference"):
        student.set_adapters("default_0")
    assert torch.equal(predict(student), expected)


def test_half_precision(student, tmp_path):
    student.load_lora_weights(save_adapter(student, tmp_path))
    expected = predict(student)
    student.unload_lora_weights()
    student.unet.to(torch.bfloat16)
    student.load_lora_weights(tmp_path)
    generator = torch.Generator().manual_seed(0)
    sample, context = torch.randn(2, 9, 8, 8, generator=generator), torch.randn(2, 10, 24, generator=generator)
    with torch.no_grad():
        actual = student.unet(sample.bfloat16(), torch.tensor([10, 700]), context.bfloat16()).sample
    assert actual.dtype == torch.bfloat16
    assert relative_error(actual.float(), expected) < 0.1


WITHOUT_PEFT = """
import sys
sys.modules["peft"] = None  # makes every import of it fail
from diffusers_moebius import MoebiusInpaintPipeline

pipe = MoebiusInpaintPipeline.from_pretrained(sys.argv[1])
pipe.save_pretrained(sys.argv[2])
pipe.prepare_for_inference()
pipe.unload_lora_weights()
try:
    pipe.load_lora_weights(sys.argv[1])
except ImportError as error:
    assert "pip install" in str(error) and "peft" in str(error), error
else:
    raise AssertionError("loaded")
"""

WITHOUT_PACKAGE = """
import sys
sys.modules["diffusers_moebius"] = None
import torch
from diffusers import DiffusionPipeline

folder, adapter, output = sys.argv[1:]
pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
pipe.unet.load_lora_adapter(adapter, prefix="unet", use_safetensors=True)
pipe.unet.fuse_lora()
pipe.prepare_for_inference()
generator = torch.Generator().manual_seed(0)
sample, context = torch.randn(2, 9, 8, 8, generator=generator), torch.randn(2, 10, 24, generator=generator)
with torch.no_grad():
    torch.save(pipe.unet(sample, torch.tensor([10, 700]), context).sample, output)
"""


def run_elsewhere(source, *arguments, home):
    environment = {**os.environ, "HF_HOME": str(home), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", source, *map(str, arguments)], env=environment, check=True, timeout=240)


@pytest.mark.slow
def test_without_peft(student, tmp_path):
    student.save_pretrained(tmp_path / "saved")
    run_elsewhere(WITHOUT_PEFT, tmp_path / "saved", tmp_path / "copy", home=tmp_path / "home")


@pytest.mark.slow
def test_adapters_of_a_saved_pipeline_without_this_package(student, tmp_path):
    student.save_pretrained(tmp_path / "saved")
    folder = save_adapter(student, tmp_path / "adapter")
    output = tmp_path / "output.pt"
    run_elsewhere(WITHOUT_PACKAGE, tmp_path / "saved", folder, output, home=tmp_path / "home")
    student.load_lora_weights(folder)
    expected = predict(student)
    assert relative_error(torch.load(output), expected) < 1e-5
