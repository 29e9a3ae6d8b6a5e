"""What the tests of models share."""

import torch
from safetensors.torch import load_file


def relative_error(actual, expected):
    return ((actual.double() - expected.double()).abs().max() / expected.double().abs().max()).item()


def load_release(model, folder, name):
    """Loads the weights of the release's tiny model, and returns it with its inputs and outputs and their context."""
    weights = load_file(folder / f"{name}_tiny.safetensors")
    prefix = "diff_model."
    model.load_state_dict({k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)})
    numbers = load_file(folder / "unet_io.safetensors")
    return model, numbers, weights["embedding_layer.weight"][numbers["input.input_ids"]]


def randomize_statistics(model):
    """Gives BatchNorm something to do: a new layer in eval mode is the identity."""
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.running_mean.copy_(torch.randn(module.num_features, generator=generator) * 0.1)
            module.running_var.copy_(torch.rand(module.num_features, generator=generator) + 0.5)
    return model


def random_inputs(height=16, width=16, batch=2, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    sample = torch.randn(batch, 9, height, width, generator=generator, dtype=torch.float32).to(dtype)
    context = torch.randn(batch, 10, 24, generator=generator, dtype=torch.float32).to(dtype)
    return sample, torch.tensor(321), context
