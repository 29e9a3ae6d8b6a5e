"""Layers that take the place of others for inference: the same functions, in less time or memory."""

import torch
import torch.nn.functional as F
from torch import nn


class PointwiseConv2d(nn.Module):
    """
    A 1x1 convolution as a matrix product, without a copy where the input is channels last in memory.

    Args:
        conv (`torch.nn.Conv2d`): The 1x1 convolution that it replaces.
    """

    def __init__(self, conv: nn.Conv2d):
        super().__init__()
        self.weight = nn.Parameter(conv.weight.detach().flatten(1), requires_grad=False)
        self.bias = conv.bias

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return F.linear(hidden_states.permute(0, 2, 3, 1), self.weight, self.bias).permute(0, 3, 1, 2)


class SlicedMixFeedForward(nn.Module):
    """
    The Mix-FFN a slice of its hidden channels after another, so that the widest tensors of the model never exist.

    Args:
        feed_forward (`MixFeedForward`): The layer that it replaces.
        max_elements (`int`, *optional*): Size up to which a slice may grow. By default 2**21 on the CPU, where it then
            stays in the cache and in memory that the allocator keeps, and 2**28 elsewhere.
    """

    def __init__(self, feed_forward: nn.Module, max_elements: int | None = None):
        super().__init__()
        self.max_elements = max_elements
        self.inverted_conv = PointwiseConv2d(feed_forward.inverted_conv.conv)
        self.depth_conv = feed_forward.depth_conv.conv
        self.point_conv = PointwiseConv2d(feed_forward.point_conv.conv)

    def expand(self, tokens: torch.Tensor, channels: slice) -> torch.Tensor:
        hidden_states = F.linear(tokens, self.inverted_conv.weight[channels], self.inverted_conv.bias[channels])
        hidden_states = F.silu(hidden_states, inplace=True).permute(0, 3, 1, 2)
        weight, bias = self.depth_conv.weight[channels], self.depth_conv.bias[channels]
        return F.conv2d(hidden_states, weight, bias, padding=1, groups=len(weight)).permute(0, 2, 3, 1)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        batch, _, height, width = hidden_states.shape
        tokens = hidden_states.permute(0, 2, 3, 1)
        dim, hidden = self.point_conv.weight.shape
        max_elements = self.max_elements or (2**21 if tokens.device.type == "cpu" else 2**28)
        count = min(hidden, max(1, -(-hidden * batch * height * width // max_elements)))
        output = None
        for i in range(count):
            start, stop = hidden * i // count, hidden * (i + 1) // count
            gate = F.silu(self.expand(tokens, slice(hidden + start, hidden + stop)), inplace=True)
            gated = gate.mul_(self.expand(tokens, slice(start, stop))).flatten(0, 2)
            weight = self.point_conv.weight[:, start:stop].t()
            output = gated @ weight if output is None else output.addmm_(gated, weight)
        return output.view(batch, height, width, dim).permute(0, 3, 1, 2)


class SmallGridUpsample2D(nn.Module):
    """
    Nearest-neighbour enlargement by 2 and a 3x3 convolution, as nine matrix products on the small grid.

    Along one axis a filter `(a, b, c)` sees two copies of a position `x[i]` and one of its neighbours. With the sum
    `s = a + b + c` the two outputs are `s x[i] + a (x[i - 1] - x[i])` and `s x[i] + c (x[i + 1] - x[i])`: three
    products. Along both axes there are nine of them for each channel and small position; the enlarged grid needs 36.

    Args:
        conv (`torch.nn.Conv2d`): The 3x3 convolution that follows the enlargement, with padding 1.
    """

    def __init__(self, conv: nn.Conv2d):
        super().__init__()
        # What multiplies x[i] - x[i - 1], x[i] and x[i + 1] - x[i].
        terms = torch.tensor([[-1.0, 0, 0], [1, 1, 1], [0, 0, 1]], device=conv.weight.device)
        weights = torch.einsum("ur,vc,oirc->uvoi", terms, terms, conv.weight.detach().float()).to(conv.weight)
        self.weight = nn.Parameter(weights, requires_grad=False)
        self.bias = conv.bias

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        tokens = hidden_states.permute(0, 2, 3, 1)  # [B, H, W, C]
        batch, height, width, _ = tokens.shape
        columns, rows = F.pad(tokens, (0, 0, 1, 1)).diff(dim=2), F.pad(tokens, (0, 0, 0, 0, 1, 1)).diff(dim=1)
        corners = F.pad(columns, (0, 0, 0, 0, 1, 1)).diff(dim=1)
        center = F.linear(tokens, self.weight[1, 1], self.bias)
        across = []
        for x in (0, 1):
            horizontal = F.linear(columns, self.weight[1, 2 * x])  # [B, H, W + 1, out]
            across.append(center + horizontal[:, :, x : x + width])
        output = center.new_empty(batch, height, 2, width, 2, center.shape[-1])
        for y in (0, 1):
            vertical = F.linear(rows, self.weight[2 * y, 1])[:, y : y + height]
            for x in (0, 1):
                diagonal = F.linear(corners, self.weight[2 * y, 2 * x])[:, y : y + height, x : x + width]
                output[:, :, y, :, x] = (vertical + diagonal).add_(across[x])
        return output.view(batch, 2 * height, 2 * width, -1).permute(0, 3, 1, 2)
