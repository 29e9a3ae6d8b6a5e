"""What the tests of models share."""

import torch

TINY = {
    "sample_size": 16,
    "block_out_channels": (16, 32, 32),
    "num_attention_heads": 4,
    "cross_attention_dim": 16,
    "encoder_hid_dim": 24,
    "norm_num_groups": 8,
}


def relative_error(actual, expected):
    return ((actual.double() - expected.double()).abs().max() / expected.double().abs().max()).item()


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
