"""LPIPS: how different two pictures look, measured in the features of a classifier."""

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

# Stride and padding of each convolution, the max-pool kernel before it, and whether its output is compared.
ALEXNET = ((4, 2, 0, True), (1, 2, 3, True), (1, 1, 3, True), (1, 1, 0, True), (1, 1, 0, True))
VGG16 = tuple((1, 1, 2 * (i in (2, 4, 7, 10)), i in (1, 3, 6, 9, 12)) for i in range(13))


class LPIPS(nn.Module):
    """
    Learned perceptual image patch similarity, version 0.1, on AlexNet or VGG16.

    The network is recognised by its weights: five convolutions are AlexNet, thirteen are VGG16.

    Args:
        state_dict (`dict[str, torch.Tensor]`): `conv.N.weight` and `conv.N.bias` of the network's convolutions in
            order, and `head.N` `[channels]`, the weights of the compared layers' channels.

    Raises:
        ValueError: If `state_dict` does not hold one of the two networks.

    Formula: Zhang et al., "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric"
    (arXiv 1801.03924), equation 1.
    """

    def __init__(self, state_dict: dict[str, torch.Tensor]):
        super().__init__()
        num_convs = sum(name.startswith("conv.") and name.endswith(".weight") for name in state_dict)
        expected = {f"conv.{i}.{kind}" for i in range(num_convs) for kind in ("weight", "bias")}
        expected |= {f"head.{i}" for i in range(5)}
        if num_convs not in (5, 13) or set(state_dict) != expected:
            raise ValueError(
                "`state_dict` must hold `conv.N.weight`, `conv.N.bias` (N to 4 for AlexNet, to 12 for VGG16) and "
                f"`head.0` to `head.4`, but holds {sorted(state_dict)}."
            )
        self.layers = ALEXNET if num_convs == 5 else VGG16
        for name, value in state_dict.items():
            self.register_buffer(name.replace(".", "_"), value.float())
        # ImageNet's mean and deviation, carried over from [0, 1] to [-1, 1].
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188])[:, None, None])
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450])[:, None, None])

    @classmethod
    def from_pretrained(cls, path: str | Path | None = None) -> "LPIPS":
        """
        Loads the weights from a safetensors file or, without one, from the `lpips` package (AlexNet).

        Args:
            path (`str` or `Path`, *optional*): Safetensors file with the names that [`LPIPS`] takes.

        Returns:
            [`LPIPS`] in eval mode, without trainable parameters.

        Raises:
            ValueError: If `path` is no file.
            ImportError: If `path` is not given and the `lpips` package is not installed.
        """
        if path is not None:
            if not Path(path).is_file():
                raise ValueError(f"`lpips_weights` must be a safetensors file, but {str(path)!r} is none.")
            return cls(load_file(path)).eval()
        try:
            import lpips
        except ImportError as error:
            raise ImportError(
                "LPIPS needs weights: name a safetensors file with `lpips_weights`, or `pip install lpips`."
            ) from error
        net = lpips.LPIPS(net="alex", verbose=False)
        convs = [module for module in net.net.modules() if isinstance(module, nn.Conv2d)]
        weights = {
            f"conv.{i}.{name}": value for i, conv in enumerate(convs) for name, value in conv.named_parameters()
        }
        weights |= {f"head.{i}": head.model[-1].weight.flatten() for i, head in enumerate(net.lins)}
        return cls({name: value.detach() for name, value in weights.items()}).eval()

    def features(self, pixel_values: torch.Tensor) -> list[torch.Tensor]:
        """
        Runs the classifier and normalises the channels of five layers to unit length at each position.

        Args:
            pixel_values (`torch.Tensor` of shape `[B, 3, H, W]`): Pictures in [-1, 1].

        Returns:
            `list` of five `torch.Tensor` of shape `[B, channels, h, w]`.
        """
        hidden_states = (pixel_values - self.shift) / self.scale
        features = []
        for i, (stride, padding, pool, is_compared) in enumerate(self.layers):
            if pool:
                hidden_states = F.max_pool2d(hidden_states, pool, 2)
            weight, bias = getattr(self, f"conv_{i}_weight"), getattr(self, f"conv_{i}_bias")
            hidden_states = F.conv2d(hidden_states, weight, bias, stride, padding).relu()
            if is_compared:
                features.append(hidden_states)
        return [values / (values.square().sum(1, keepdim=True) + 1e-20).sqrt() for values in features]

    def distances(self, input: torch.Tensor, target: torch.Tensor) -> list[torch.Tensor]:
        """
        Compares pictures layer by layer, at each position.

        Args:
            input (`torch.Tensor` of shape `[B, 3, H, W]`): Pictures in [-1, 1].
            target (`torch.Tensor` of shape `[B, 3, H, W]`): Pictures in [-1, 1].

        Returns:
            `list` of five `torch.Tensor` of shape `[B, h, w]`.
        """
        if input.shape != target.shape:
            raise ValueError(f"`input` and `target` must have one shape, but have {input.shape} and {target.shape}.")
        heads = [getattr(self, f"head_{i}")[:, None, None] for i in range(5)]
        pairs = zip(self.features(input), self.features(target), heads)
        return [((a - b).square() * head).sum(1) for a, b, head in pairs]

    def forward(self, input: torch.Tensor, target: torch.Tensor, weight: torch.Tensor | None = None) -> torch.Tensor:
        """
        Measures how different pictures look.

        Args:
            input (`torch.Tensor` of shape `[B, 3, H, W]`): Pictures in [-1, 1].
            target (`torch.Tensor` of shape `[B, 3, H, W]`): Pictures in [-1, 1].
            weight (`torch.Tensor` of shape `[B, 1, H, W]`, *optional*): What each place counts, 1 on average; brought
                to the size of each layer.

        Returns:
            `torch.Tensor` of shape `[B]`: For each layer the mean over all positions, summed; 0 for equal pictures.
        """
        distances = self.distances(input, target)
        if weight is not None:
            distances = [d * F.interpolate(weight, d.shape[1:], mode="area")[:, 0] for d in distances]
        return sum(distance.mean((1, 2)) for distance in distances)


def distance_map(distances: list[torch.Tensor], size: tuple[int, int]) -> torch.Tensor:
    """
    Brings the distances of all layers to the size of the pictures by bilinear interpolation and sums them.

    Args:
        distances (`list` of `torch.Tensor` of shape `[B, h, w]`): What [`LPIPS.distances`] returns.
        size (`tuple[int, int]`): Height and width in pixels.

    Returns:
        `torch.Tensor` of shape `[B, height, width]`.
    """
    return sum(F.interpolate(layer[:, None], size=size, mode="bilinear")[:, 0] for layer in distances)
