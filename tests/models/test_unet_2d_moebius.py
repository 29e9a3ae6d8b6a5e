import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numbers_of_models import load_release, random_inputs, randomize_statistics, relative_error
from tiny_unet import TINY

from diffusers_moebius.models.unet_2d_moebius import LocalLambdaProcessor, MoebiusUNet2DModel


@pytest.fixture(scope="module")
def release(parity_dir):
    """The release's tiny student, and inputs and outputs of its U-Net."""
    return load_release(MoebiusUNet2DModel(**TINY).eval(), parity_dir, "student")


@pytest.mark.parametrize("algorithm", ["reference", "fast"])
def test_outputs_match_the_release(release, algorithm):
    model, numbers, context = release
    model.set_lambda_algorithm(algorithm)
    with torch.no_grad():
        output = model(
            numbers["input.latent_model_input"], numbers["input.timestep"], context, output_hidden_states=True
        )
    assert relative_error(output.sample, numbers["student.sample"]) < 1e-5
    assert len(output.hidden_states) == 6
    for i, hidden_states in enumerate(output.hidden_states):
        assert relative_error(hidden_states, numbers[f"student.block_outputs.{i}"]) < 1e-5


def test_names_and_shapes_of_the_full_model_are_the_published_ones(parity_dir):
    published = json.loads((parity_dir / "student_full_keys.json").read_text())
    with torch.device("meta"):
        model = MoebiusUNet2DModel()
    ours = {f"diff_model.{name}": list(value.shape) for name, value in model.state_dict().items()}
    ours["embedding_layer.weight"] = [20, 3072]
    assert ours == published


@pytest.mark.parametrize(
    ("self_attention", "cross_attention", "feed_forward", "conv", "millions"),
    [
        ("gla", "softmax", "geglu", "full", 525.9),
        ("local_lambda", "softmax", "geglu", "full", 496.4),
        ("gla", "interactive_lambda", "geglu", "full", 514.5),
        ("gla", "softmax", "mix_ffn", "full", 478.0),
        ("gla", "softmax", "geglu", "separable", 314.9),
        ("local_lambda", "interactive_lambda", "geglu", "full", 485.0),
        ("local_lambda", "interactive_lambda", "geglu", "separable", 273.9),
        ("local_lambda", "interactive_lambda", "mix_ffn", "separable", 226.0),
    ],
)
def test_parameter_counts_of_the_papers_variants(self_attention, cross_attention, feed_forward, conv, millions):
    with torch.device("meta"):
        model = MoebiusUNet2DModel(
            self_attention_type=self_attention,
            cross_attention_type=cross_attention,
            feed_forward_type=feed_forward,
            conv_type=conv,
        )
    embedding = 20 * 3072
    assert abs(model.num_parameters() + embedding - millions * 1e6) < 0.1e6


@pytest.mark.parametrize("self_attention", ["local_lambda", "gla"])
@pytest.mark.parametrize("cross_attention", ["interactive_lambda", "softmax"])
@pytest.mark.parametrize("feed_forward", ["mix_ffn", "geglu"])
@pytest.mark.parametrize("conv", ["separable", "full"])
def test_every_variant_runs_and_learns(self_attention, cross_attention, feed_forward, conv):
    model = MoebiusUNet2DModel(
        **TINY,
        self_attention_type=self_attention,
        cross_attention_type=cross_attention,
        feed_forward_type=feed_forward,
        conv_type=conv,
    )
    sample, timestep, context = random_inputs(8, 12)
    output = model(sample, timestep, context).sample
    assert output.shape == (2, 4, 8, 12)
    output.square().mean().backward()
    without_gradient = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert without_gradient == []


@settings(max_examples=12, deadline=None)
@given(
    height=st.integers(1, 20).map(lambda n: 4 * n),
    width=st.integers(1, 20).map(lambda n: 4 * n),
    batch=st.integers(1, 3),
)
def test_fast_and_reference_processors_agree_at_every_size(height, width, batch):
    torch.manual_seed(height * 100 + width)
    model = randomize_statistics(MoebiusUNet2DModel(**TINY | {"layers_per_block": 1}).eval())
    inputs = random_inputs(height, width, batch)
    with torch.no_grad():
        fast = model(*inputs).sample
        model.set_lambda_algorithm("reference")
        reference = model(*inputs).sample
    assert relative_error(fast, reference) < 1e-5


def test_gradients_of_fast_and_reference_processors_agree():
    torch.manual_seed(0)
    model = MoebiusUNet2DModel(**TINY)
    sample, timestep, context = random_inputs(16, 20)
    gradients = {}
    for algorithm in ("fast", "reference"):
        model.set_lambda_algorithm(algorithm)
        model.zero_grad()
        model(sample, timestep, context).sample.square().mean().backward()
        gradients[algorithm] = {name: p.grad.clone() for name, p in model.named_parameters()}
    largest = max(gradient.abs().max() for gradient in gradients["reference"].values())
    for name, gradient in gradients["reference"].items():
        assert (gradients["fast"][name] - gradient).abs().max() < 1e-4 * largest, name


def test_a_sample_does_not_depend_on_its_batch(tiny_unet):
    sample, timestep, context = random_inputs(batch=3)
    with torch.no_grad():
        together = tiny_unet(sample, timestep, context).sample
        alone = tiny_unet(sample[1:2], timestep, context[1:2]).sample
    assert relative_error(together[1:2], alone) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("way", ["from_pretrained", "to"])
def test_half_precision_has_no_nan_and_stays_close(tmp_path, tiny_unet, dtype, way):
    model = randomize_statistics(tiny_unet)
    with torch.no_grad():
        expected = model(*random_inputs()).sample
    if way == "to":
        model = model.to(dtype)
    else:
        model.save_pretrained(tmp_path)
        model = MoebiusUNet2DModel.from_pretrained(tmp_path, torch_dtype=dtype).eval()
        assert model.conv_in.bn1.running_var.dtype == torch.float32
    assert model.dtype == dtype
    with torch.no_grad():
        output = model(*random_inputs(dtype=dtype)).sample
    assert output.dtype == dtype
    assert relative_error(output, expected) < (0.1 if dtype == torch.bfloat16 else 0.02)


def test_saved_model_loads_with_equal_weights_and_config(tmp_path, tiny_unet):
    tiny_unet.save_pretrained(tmp_path)
    loaded = MoebiusUNet2DModel.from_pretrained(tmp_path)
    assert json.loads(loaded.to_json_string()) | {"_name_or_path": ""} == json.loads(tiny_unet.to_json_string()) | {
        "_name_or_path": ""
    }
    with torch.no_grad():
        assert torch.equal(loaded(*random_inputs()).sample, tiny_unet(*random_inputs()).sample)


def test_gradient_checkpointing_changes_neither_gradients_nor_statistics(tiny_unet):
    state = {name: value.clone() for name, value in tiny_unet.state_dict().items()}
    results = []
    for enabled in (False, True):
        tiny_unet.load_state_dict(state)
        tiny_unet.train()
        tiny_unet.zero_grad()
        if enabled:
            tiny_unet.enable_gradient_checkpointing()
            assert tiny_unet.is_gradient_checkpointing
        tiny_unet(*random_inputs()).sample.square().mean().backward()
        gradients = {name: p.grad.clone() for name, p in tiny_unet.named_parameters()}
        buffers = {name: b.clone() for name, b in tiny_unet.named_buffers()}
        results.append((gradients, buffers))
    for plain, checkpointed in zip(*results, strict=True):
        for name, value in plain.items():
            assert torch.equal(value, checkpointed[name]), name


def test_train_mode_updates_statistics_and_eval_mode_does_not(tiny_unet):
    before = tiny_unet.conv_in.bn2.running_mean.clone()
    tiny_unet(*random_inputs())
    assert torch.equal(tiny_unet.conv_in.bn2.running_mean, before)
    tiny_unet.train()(*random_inputs())
    assert not torch.equal(tiny_unet.conv_in.bn2.running_mean, before)


def test_compiles_to_one_graph_without_recompilation():
    model = MoebiusUNet2DModel(**TINY | {"block_out_channels": (16, 32), "layers_per_block": 1}).eval()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        for seed, timestep in ((0, 999), (1, 5), (2, 0)):
            sample, _, context = random_inputs(seed=seed)
            inputs = (sample, torch.tensor(timestep), context)
            assert relative_error(compiled(*inputs).sample, model(*inputs).sample) < 1e-5
    torch._dynamo.reset()


def test_channels_last_gives_the_same_numbers(tiny_unet):
    sample, timestep, context = random_inputs()
    with torch.no_grad():
        expected = tiny_unet(sample, timestep, context).sample
        model = tiny_unet.to(memory_format=torch.channels_last)
        assert model.down_blocks[0].downsamplers[0].conv.weight.is_contiguous(memory_format=torch.channels_last)
        output = model(sample.to(memory_format=torch.channels_last), timestep, context).sample
    assert relative_error(output, expected) < 1e-5


@pytest.mark.parametrize("timestep", [7, 7.0, torch.tensor(7), torch.tensor([7]), torch.tensor([7, 7])])
def test_timestep_may_be_a_number_or_a_tensor(tiny_unet, timestep):
    sample, _, context = random_inputs()
    with torch.no_grad():
        assert torch.equal(
            tiny_unet(sample, timestep, context).sample, tiny_unet(sample, torch.tensor(7), context).sample
        )


def test_tuple_output(tiny_unet):
    with torch.no_grad():
        assert len(tiny_unet(*random_inputs(), return_dict=False)) == 1
        sample, hidden_states = tiny_unet(*random_inputs(), return_dict=False, output_hidden_states=True)
    assert [list(h.shape[1:]) for h in hidden_states] == [
        [16, 8, 8],
        [32, 4, 4],
        [32, 4, 4],
        [32, 8, 8],
        [32, 16, 16],
        [16, 16, 16],
    ]
    assert sample.shape == (2, 4, 16, 16)


def test_processors_can_be_read_and_set(tiny_unet):
    processors = tiny_unet.attn_processors
    assert len(processors) == 2 * 15  # two lambda layers in each of 3 x 2 + 3 x 3 transformers
    processors = {
        name: LocalLambdaProcessor() if "attn1" in name else processor for name, processor in processors.items()
    }
    tiny_unet.set_attn_processor(dict(processors))
    assert tiny_unet.attn_processors == processors
    with pytest.raises(ValueError, match="`processor` of InteractiveLambda"):
        tiny_unet.set_attn_processor(LocalLambdaProcessor())


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"self_attention_type": "flash"}, "self_attention_type"),
        ({"cross_attention_type": "none"}, "cross_attention_type"),
        ({"feed_forward_type": "mlp"}, "feed_forward_type"),
        ({"conv_type": "depthwise"}, "conv_type"),
        ({"block_out_channels": ()}, "block_out_channels"),
        ({"local_window_size": 4}, "local_window_size"),
        ({"norm_num_groups": 5}, "norm_num_groups"),
        ({"num_attention_heads": 5}, "num_attention_heads"),
        ({"sample_size": 10}, "sample_size"),
    ],
)
def test_wrong_config_is_named(changes, name):
    with pytest.raises(ValueError, match=f"`{name}`"):
        MoebiusUNet2DModel(**TINY | changes)


@pytest.mark.parametrize(
    ("sample", "context", "name"),
    [
        ((2, 4, 16, 16), (2, 10, 24), "sample"),
        ((2, 9, 16), (2, 10, 24), "sample"),
        ((2, 9, 18, 16), (2, 10, 24), "sample"),
        ((2, 9, 0, 16), (2, 10, 24), "sample"),
        ((2, 9, 16, 16), (1, 10, 24), "encoder_hidden_states"),
        ((2, 9, 16, 16), (2, 9, 24), "encoder_hidden_states"),
        ((2, 9, 16, 16), (2, 10, 25), "encoder_hidden_states"),
    ],
)
def test_wrong_shapes_are_named(tiny_unet, sample, context, name):
    with pytest.raises(ValueError, match=f"`{name}`"):
        tiny_unet(torch.zeros(sample), 1, torch.zeros(context))


def test_unknown_lambda_algorithm_is_named(tiny_unet):
    with pytest.raises(ValueError, match="`algorithm`"):
        tiny_unet.set_lambda_algorithm("quick")


@pytest.mark.parametrize("variant", [{}, {"self_attention_type": "gla", "cross_attention_type": "softmax"}])
def test_hooks_see_outputs_that_nobody_changes_later(variant):
    """Whoever keeps the output of a layer in a hook, as for features or attribution, keeps what it was."""
    model = randomize_statistics(MoebiusUNet2DModel(**TINY, **variant, feed_forward_type="mix_ffn").eval())
    seen = []

    def keep(module, inputs, output):
        tensors = output if isinstance(output, tuple) else (output,)
        seen.extend((type(module).__name__, tensor, tensor.clone()) for tensor in tensors if torch.is_tensor(tensor))

    for module in model.modules():
        module.register_forward_hook(keep)
    with torch.no_grad():
        model(*random_inputs())
    assert [name for name, output, before in seen if not torch.equal(output, before)] == []
    assert {"LocalLambda", "SeparableConv2d", "GroupNorm", "BatchNorm2d"} - {name for name, *_ in seen} <= (
        {"LocalLambda"} if variant else set()
    )
