"""Weights of narrow stand-ins for the networks of LPIPS."""

import torch

# (channels, kernel) of each convolution and the ones whose outputs are compared, narrow stand-ins for the networks.
NETWORKS = {
    "alex": ([(4, 11), (5, 5), (6, 3), (4, 3), (3, 3)], (0, 1, 2, 3, 4)),
    "vgg": ([(2, 3), (3, 3)] + [(4, 3)] * 11, (1, 3, 6, 9, 12)),
}


def make_weights(name: str) -> dict[str, torch.Tensor]:
    convs, compared = NETWORKS[name]
    generator = torch.Generator().manual_seed(list(NETWORKS).index(name))
    weights, channels = {}, 3
    for i, (width, kernel) in enumerate(convs):
        kernels = torch.randn(width, channels, kernel, kernel, generator=generator)
        weights[f"conv.{i}.weight"] = kernels / (channels * kernel**2) ** 0.5
        weights[f"conv.{i}.bias"] = torch.randn(width, generator=generator) / 10
        channels = width
    for i, index in enumerate(compared):
        weights[f"head.{i}"] = torch.rand(convs[index][0], generator=generator)
    return weights
