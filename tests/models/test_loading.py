"""Models loaded in the ways that diffusers and accelerate know: in half precision, in parts, quantized."""

import accelerate
import pytest
import torch
from diffusers.quantizers.quantization_config import QuantoConfig, SDNQConfig, TorchAoConfig
from numbers_of_models import random_inputs, randomize_statistics, relative_error
from tiny_unet import TINY
from torch import nn

from diffusers_moebius.models.unet_2d_moebius import MoebiusUNet2DModel


@pytest.fixture
def saved(tiny_unet, tmp_path):
    """A folder with a model whose BatchNorm layers do something, and the prediction of that model."""
    model = randomize_statistics(tiny_unet)
    model.save_pretrained(tmp_path / "model")
    with torch.no_grad():
        return tmp_path / "model", model(*random_inputs()).sample


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_cast_model_is_a_model_loaded_in_that_type(saved, dtype):
    folder, _ = saved
    loaded = MoebiusUNet2DModel.from_pretrained(folder, torch_dtype=dtype).eval()
    cast = MoebiusUNet2DModel.from_pretrained(folder).to(dtype).eval()
    for (name, ours), theirs in zip(cast.state_dict().items(), loaded.state_dict().values(), strict=True):
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs), name
    inputs = random_inputs(dtype=dtype)
    with torch.no_grad():
        assert (cast(*inputs).sample.float() - loaded(*inputs).sample.float()).abs().max() < 1e-4
    assert cast.to(torch.float64).conv_in.bn1.running_var.dtype == torch.float64


def half_on_disk(model):
    return {name: "disk" if name == "up_blocks" else "cpu" for name, _ in model.named_children()}


def test_layers_on_the_disk_keep_their_statistics(saved, tiny_unet, tmp_path):
    folder, expected = saved
    for device_map in ({"": "disk"}, half_on_disk(tiny_unet)):
        model = MoebiusUNet2DModel.from_pretrained(folder, device_map=device_map, offload_folder=tmp_path / "weights")
        with torch.no_grad():
            assert relative_error(model.eval()(*random_inputs()).sample, expected) < 1e-6


def test_loading_info_is_handed_on(saved, tmp_path):
    model, info = MoebiusUNet2DModel.from_pretrained(saved[0], output_loading_info=True)
    assert isinstance(model, MoebiusUNet2DModel) and info["missing_keys"] == []


@pytest.mark.parametrize("share", [0.3, 0.7])
def test_accelerate_splits_the_model_and_loads_the_parts(saved, tmp_path, share):
    folder, expected = saved
    with accelerate.init_empty_weights():
        model = MoebiusUNet2DModel(**TINY)
    size = sum(parameter.nbytes for parameter in model.parameters())
    device_map = accelerate.infer_auto_device_map(
        model,
        max_memory={"cpu": int(share * size), "disk": 10 * size},
        no_split_module_classes=model._no_split_modules,
    )
    assert set(device_map.values()) == {"cpu", "disk"}
    weights = folder / "diffusion_pytorch_model.safetensors"
    model = accelerate.load_checkpoint_and_dispatch(
        model,
        str(weights),
        device_map,
        offload_folder=tmp_path / "weights",
        offload_buffers=True,  # the statistics of BatchNorm are buffers, which accelerate would not load otherwise
        force_hooks=True,
    )
    with torch.no_grad():
        assert relative_error(model.eval()(*random_inputs()).sample, expected) < 1e-6


def quanto_config():
    pytest.importorskip("optimum.quanto")
    return QuantoConfig(weights_dtype="int8")


def sdnq_config():
    pytest.importorskip("sdnq")
    # Convolutions too, and layers as small as those of the test.
    return SDNQConfig(weights_dtype="int8", quant_conv=True, minimum_allowed_numel=1, minimum_allowed_channel_size=1)


def torchao_config():
    quantization = pytest.importorskip("torchao.quantization")
    return TorchAoConfig(quantization.Int8WeightOnlyConfig())


@pytest.mark.parametrize("config", [quanto_config, sdnq_config, torchao_config])
def test_quantized_model_stays_close_and_is_saved_and_loaded(saved, tmp_path, config):
    folder, expected = saved
    float32 = {"torch_dtype": torch.float32}  # torchao would choose bfloat16
    model = MoebiusUNet2DModel.from_pretrained(folder, quantization_config=config(), **float32).eval()
    for name, module in model.named_modules():
        if name.endswith("pos_conv") or isinstance(module, nn.modules.batchnorm._BatchNorm):
            assert type(module.weight) is nn.Parameter and module.weight.dtype == torch.float32, name
    with torch.no_grad():
        output = model(*random_inputs()).sample
        assert 0 < relative_error(output, expected) < 0.05
        model.save_pretrained(tmp_path / "quantized")
        loaded = MoebiusUNet2DModel.from_pretrained(tmp_path / "quantized", **float32).eval()
        assert relative_error(loaded(*random_inputs()).sample, output) < 1e-6
        with pytest.raises(ValueError, match="Quantized weights"):
            model.fuse_for_inference()
        assert torch.equal(model(*random_inputs()).sample, output)  # nothing has been touched


def test_what_quantizers_and_casting_leave_out_is_named(tiny_unet):
    for name, module in tiny_unet.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            assert name.rpartition(".")[2] in tiny_unet._keep_in_fp32_modules, name
        if isinstance(module, (nn.modules.batchnorm._BatchNorm, nn.Conv3d)):
            assert any(pattern in name for pattern in tiny_unet._skip_layerwise_casting_patterns), name
