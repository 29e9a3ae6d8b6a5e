"""Adapters of random weights, and what a pipeline makes of them."""

import torch
from peft import LoraConfig, get_peft_model_state_dict

from diffusers_moebius.pipelines.pipeline_moebius_inpaint import MoebiusInpaintPipeline

FILE = "pytorch_lora_weights.safetensors"
LAMBDA_LAYERS = ["to_q", "to_k", "to_v"]
LAYERS = [*LAMBDA_LAYERS, "proj_out", "inverted_conv.conv", "point_conv.conv", "q_proj", "o_proj", "net.2"]


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
