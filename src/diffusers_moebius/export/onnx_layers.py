"""Forms of the U-Net's layers for ONNX graphs: four dimensions at most, convolutions and matrix products, any size."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from ..models.unet_2d_moebius import (
    InteractiveLambda,
    InteractiveLambdaProcessor,
    LambdaLayer,
    LocalLambda,
    LocalLambdaProcessor,
    SeparableConv2d,
)

TILE = 8  # positions of a row that one matrix product of Local-lambda is for


class OnnxLocalLambdaProcessor(LocalLambdaProcessor):
    """
    Local-lambda as two matrix products for each tile of a row, as in the fast processor.

    The first product applies all filters to a query. Filters are padded by zeros to the width of a tile's
    neighbourhood, so that reading the product with one element less a position moves those of the `x`-th position `x`
    columns to the right. The second product is with the neighbourhood's values.
    """

    def __call__(self, attn: LocalLambda, hidden_states: torch.Tensor) -> torch.Tensor:
        batch, _, height, width = hidden_states.shape
        heads, dim = attn.num_heads, attn.head_dim
        filters, bias = attn.pos_conv()  # [k, r, r], [k]
        window = filters.shape[-1]
        radius, span = window // 2, TILE + window - 1
        row = window * span
        filters = F.pad(F.pad(filters, (0, span - window)).flatten(1), (0, 1))  # [k, row + 1]
        tiles = (width + TILE - 1) // TILE
        right = tiles * TILE - width

        key = attn.to_k(hidden_states).flatten(2).softmax(2)  # [B, k, n]
        value = attn.norm_v(attn.to_v(hidden_states))  # [B, v, H, W]
        # The bias of the position filters is the same for every value channel: it belongs to the content lambda.
        content = key @ value.flatten(2).transpose(1, 2) + bias[:, None]  # [B, k, v]

        query = F.pad(attn.norm_q(attn.to_q(hidden_states)), (0, right)).permute(0, 2, 3, 1)
        query = query.reshape(-1, TILE, heads, dim).transpose(1, 2)  # [B H tiles, h, tile, k]
        weights = (query @ filters).flatten(2)[:, :, : TILE * row]
        weights = weights.reshape(-1, heads * TILE, row)  # [B H tiles, h tile, row]

        device = hidden_states.device
        rows = (torch.arange(height, device=device)[:, None] + torch.arange(window, device=device)).flatten()
        columns = (TILE * torch.arange(tiles, device=device)[:, None] + torch.arange(span, device=device)).flatten()
        value = F.pad(value, (radius, radius + right, radius, radius)).permute(0, 2, 3, 1)
        value = value.index_select(1, rows).index_select(2, columns)  # [B, H r, tiles span, v]
        value = value.reshape(batch * height, window, tiles, span * dim).transpose(1, 2).reshape(-1, row, dim)

        content = query.reshape(batch, -1, dim) @ content  # [B, H tiles h tile, v]
        output = (weights @ value).reshape(-1, heads, TILE, dim) + content.reshape(-1, heads, TILE, dim)
        output = output.transpose(1, 2).reshape(batch, height, tiles * TILE, heads * dim)[:, :, :width]
        return output.permute(0, 3, 1, 2)


class OnnxInteractiveLambdaProcessor(InteractiveLambdaProcessor):
    """
    Interactive-lambda between positions and a context that is known beforehand.

    Args:
        key (`torch.Tensor` of shape `[2, m, k]`): Keys of the background and of the foreground.
        value (`torch.Tensor` of shape `[2, m, v]`): Values of both.
    """

    def __init__(self, key: torch.Tensor, value: torch.Tensor):
        self.key, self.value = key, value

    def __call__(
        self, attn: InteractiveLambda, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor
    ) -> torch.Tensor:
        batch, _, height, width = hidden_states.shape
        heads, dim, length = attn.num_heads, attn.head_dim, self.key.shape[1]
        key, value = (
            choose_category(self.key, encoder_hidden_states),
            choose_category(self.value, encoder_hidden_states),
        )
        # At the native size the resampling of the position embeddings changes nothing.
        embedding = attn.rel_pos_emb.reshape(1, attn.grid_size, attn.grid_size, -1).permute(0, 3, 1, 2)
        embedding = F.interpolate(embedding, (height, width), mode="bilinear", align_corners=False)
        embedding = embedding.permute(0, 2, 3, 1).reshape(-1, length, dim).transpose(1, 2)  # [n, k, m]

        query = attn.norm_q(attn.to_q(hidden_states)).permute(0, 2, 3, 1).reshape(batch, -1, heads, dim)
        weights = query @ key.transpose(1, 2)[:, None] + query @ embedding  # [B, n, h, m]
        output = weights.reshape(batch, -1, length) @ value  # [B, n h, v]
        return output.reshape(batch, height, width, heads * dim).permute(0, 3, 1, 2)


def choose_category(pair: torch.Tensor, category: torch.Tensor) -> torch.Tensor:
    """The first of two for a category `[B, 1, 1]` of 0, the second for 1."""
    return pair[:1] * (1 - category) + pair[1:] * category


class PositionFilters(nn.Module):
    """
    The filters of Local-lambda in the shape in which they are used, in place of a 3-D convolution's.

    Args:
        filters (`torch.Tensor` of shape `[k, r, r]`): Filters.
        bias (`torch.Tensor` of shape `[k]`): Biases.
    """

    def __init__(self, filters: torch.Tensor, bias: torch.Tensor):
        super().__init__()
        self.filters, self.bias = nn.Parameter(filters), nn.Parameter(bias)

    def forward(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.filters, self.bias


class CategoryTokens(nn.Module):
    """
    Context tokens of a category, in place of the projection that they come from.

    Args:
        tokens (`torch.Tensor` of shape `[2, m, dim]`): Projected tokens of the background and of the foreground.
    """

    def __init__(self, tokens: torch.Tensor):
        super().__init__()
        self.register_buffer("tokens", tokens)

    def forward(self, category: torch.Tensor) -> torch.Tensor:
        return choose_category(self.tokens, category)


class SmallGridUpsample2D(nn.Module):
    """
    Nearest-neighbour enlargement by 2 and a 3x3 convolution, as four 2x2 convolutions on the small grid.

    Args:
        conv (`torch.nn.Conv2d`): The 3x3 convolution that follows the enlargement, with padding 1.
    """

    def __init__(self, conv: nn.Conv2d):
        super().__init__()
        self.conv = conv

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        # The graph stores the 3x3 filters, which are smaller; the others are made of them once, when it is loaded.
        phases = []
        for y in (0, 1):
            rows = self.merge_taps(self.conv.weight, 2, y)
            for x in (0, 1):
                padded = F.pad(hidden_states, (1 - x, x, 1 - y, y))
                phases.append(F.conv2d(padded, self.merge_taps(rows, 3, x), self.conv.bias))
        batch, _, height, width = hidden_states.shape
        stacked = torch.cat(phases, 1).reshape(batch, 4, -1, height * width).transpose(1, 2)
        return F.pixel_shuffle(stacked.reshape(batch, -1, height, width), 2)

    @staticmethod
    def merge_taps(weight: torch.Tensor, dim: int, phase: int) -> torch.Tensor:
        """Of three taps along an axis two fall on the same small position: the last two for even outputs."""
        first, second, third = weight.split(1, dim)
        return torch.cat([first + second, third] if phase else [first, second + third], dim)


@torch.no_grad()
def prepare_unet(unet: nn.Module, tokens: torch.Tensor) -> None:
    """
    Changes a U-Net into what its ONNX graph computes: for a category instead of tokens, with every BatchNorm folded.

    Args:
        unet ([`MoebiusUNet2DModel`]): The model, in eval mode and float32; it is changed.
        tokens (`torch.Tensor` of shape `[2, context_length, encoder_hid_dim]`): LCG tokens of the background and of
            the foreground.
    """
    tokens = unet.encoder_hid_proj(tokens)
    for module in unet.modules():
        if isinstance(module, InteractiveLambda):
            module.set_processor(OnnxInteractiveLambdaProcessor(*module.project_context(tokens)))
        elif isinstance(module, LocalLambda):
            module.set_processor(OnnxLocalLambdaProcessor())
            module.pos_conv = PositionFilters(*module.pos_conv())
            module.to_v, module.norm_v = fuse_conv_bn_eval(module.to_v, module.norm_v), nn.Identity()
        elif isinstance(module, SeparableConv2d):
            module.conv_dw, module.bn1 = fuse_conv_bn_eval(module.conv_dw, module.bn1), nn.Identity()
            module.conv_pw, module.bn2 = fuse_conv_bn_eval(module.conv_pw, module.bn2), nn.Identity()
        if isinstance(module, LambdaLayer):
            module.to_q, module.norm_q = fuse_conv_bn_eval(module.to_q, module.norm_q), nn.Identity()
    for block in unet.up_blocks:
        if block.upsamplers is not None:
            block.upsamplers[0] = SmallGridUpsample2D(block.upsamplers[0].conv)
    is_lambda = unet.config.cross_attention_type == "interactive_lambda"
    unet.encoder_hid_proj = nn.Identity() if is_lambda else CategoryTokens(tokens)
    unet.register_to_config(context_length=1, encoder_hid_dim=1)
