"""LoRA adapters on the pipeline, for the student and the teacher."""

import os
import subprocess
import sys
import threading

import pytest
import torch
from adapters import LAMBDA_LAYERS, LAYERS, equal, predict, relative_error, save_adapter, weights
from peft import LoraConfig

from diffusers_moebius.pipelines.pipeline_moebius_inpaint import MoebiusInpaintPipeline

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
