"""The Moebius denoiser (arXiv 2606.19195, section 3), bottom-up: lambda layers, convolutions, blocks, model."""

from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import wraps

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.attention import AttentionMixin, FeedForward
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import BaseOutput, apply_lora_scale
from torch import nn
from torch.utils.checkpoint import checkpoint, noop_context_fn

from .linear_attention import GatedLinearAttention, ProcessedAttention

SELF_ATTENTION_TYPES = ("local_lambda", "gla")
CROSS_ATTENTION_TYPES = ("interactive_lambda", "softmax")
FEED_FORWARD_TYPES = ("mix_ffn", "geglu")
CONV_TYPES = ("separable", "full")


@dataclass
class MoebiusUNet2DOutput(BaseOutput):
    """
    The output of [`MoebiusUNet2DModel`].

    Args:
        sample (`torch.Tensor` of shape `[B, out_channels, H, W]`): The prediction, as the scheduler's
            `prediction_type` defines it.
        hidden_states (`tuple[torch.Tensor, ...]`, *optional*): The output of every down block, then of every up block,
            for `output_hidden_states=True`.
    """

    sample: torch.Tensor
    hidden_states: tuple[torch.Tensor, ...] | None = None


def to_tokens(hidden_states: torch.Tensor) -> torch.Tensor:
    return hidden_states.permute(0, 2, 3, 1).flatten(1, 2)  # [B, C, H, W] -> [B, n, C]


def to_grid(tokens: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return tokens.transpose(1, 2).reshape(like.shape)  # [B, n, C] -> [B, C, H, W], channels last in memory


class LocalPositionConv(nn.Conv3d):
    """
    The `r x r` position filters of Local-lambda, one for each of the `k` query channels.

    The published weights come from a 3-D convolution over the value channels. Calling the module returns its filters
    `[k, r, r]` and biases `[k]`, so that the processors share them and offloading hooks see the access.
    """

    def __init__(self, key_dim: int, window_size: int):
        padding = window_size // 2
        super().__init__(1, key_dim, (1, window_size, window_size), padding=(0, padding, padding))

    def forward(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.weight[:, 0, 0], self.bias.view(-1)


class LambdaLayer(ProcessedAttention):
    """What both lambda layers share: `h` heads of queries that read one linear map of `k` keys and `v` values."""

    def __init__(self, dim: int, num_heads: int, processor=None):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"`num_attention_heads` must divide every width, but is {num_heads} for {dim}.")
        self.num_heads = num_heads
        self.head_dim = dim // num_heads  # k = v
        self.set_processor(processor or self._default_processor_cls())
        self.to_q = nn.Conv2d(dim, dim, 1, bias=False)
        self.norm_q = nn.BatchNorm2d(dim)

    def project_query(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return to_tokens(self.norm_q(self.to_q(hidden_states))).unflatten(2, (self.num_heads, -1))  # [B, n, h, k]


class LocalLambdaProcessor:
    """Local-lambda by its formulas, one lambda matrix for every position (reference; slow and large)."""

    def __call__(self, attn: "LocalLambda", hidden_states: torch.Tensor) -> torch.Tensor:
        batch, _, height, width = hidden_states.shape
        query, key, value = attn.project(hidden_states)  # [B, n, h, k], [B, n, k], [B, n, v]
        content_lambda = torch.einsum("bnk,bnv->bkv", key, value)

        filters, bias = attn.pos_conv()
        value = value.transpose(1, 2).reshape(-1, 1, height, width)  # [B v, 1, H, W]
        position_lambda = F.conv2d(value, filters[:, None], bias, padding=filters.shape[-1] // 2)
        position_lambda = position_lambda.view(batch, attn.head_dim, attn.head_dim, -1)  # [B, v, k, n]

        output = torch.einsum("bnhk,bkv->bhvn", query, content_lambda)
        output = output + torch.einsum("bnhk,bvkn->bhvn", query, position_lambda)
        return output.reshape(batch, -1, height, width)


class FastLocalLambdaProcessor:
    """
    Local-lambda without the lambda matrices: the same sums in another order (exact but for rounding).

    `sum_k Q[h,k,n] sum_d W[k,d] V[v,n+d]` is evaluated as `sum_d (sum_k Q[h,k,n] W[k,d]) V[v,n+d]`. A row of the
    picture is cut into tiles of positions. The inner sum is one matrix product; the filters are zero-padded to the
    width of a tile's neighbourhood, so that reading the product with one element less a position moves the filters of
    the `x`-th position `x` columns to the right. The outer sum is then one matrix product with the neighbourhood's
    values.

    Args:
        tile_width (`int`, defaults to 8): Positions in a tile; rows up to twice as wide are one tile. Narrow tiles
            compute fewer zeros, wide ones make larger products.
        max_elements (`int`, *optional*): Rows are worked on in groups that keep the product below so many elements. By
            default 2**19 on the CPU, where it then stays in the cache, 2**22 there in a graph that is compiled or
            exported, which holds each group by itself, and 2**26 elsewhere.
    """

    def __init__(self, tile_width: int = 8, max_elements: int | None = None):
        self.tile_width = tile_width
        self.max_elements = max_elements

    def choose_max_elements(self, device_type: str) -> int:
        if self.max_elements is not None:
            return self.max_elements
        if device_type != "cpu":
            return 2**26
        return 2**22 if torch.compiler.is_compiling() else 2**19

    def __call__(self, attn: "LocalLambda", hidden_states: torch.Tensor) -> torch.Tensor:
        batch, _, height, width = hidden_states.shape
        heads, dim = attn.num_heads, attn.head_dim
        query, key, value = attn.project(hidden_states)  # [B, n, h, k], [B, n, k], [B, n, v]
        filters, bias = attn.pos_conv()
        window = filters.shape[-1]
        radius = window // 2

        single = width <= 2 * self.tile_width
        tile = width if single else self.tile_width
        tiles = -(-width // tile)
        right = tiles * tile - width
        span = tile + 2 * radius  # columns that a tile's positions see
        row = window * span
        filters = F.pad(F.pad(filters, (0, span - window)).flatten(1), (0, 1))  # [k, row + 1]

        query = query.unflatten(1, (height, width))
        if right:
            query = F.pad(query, (0, 0, 0, 0, 0, right))
        query = query.reshape(batch, height, tiles, tile * heads, dim)

        # The bias of the position filters is the same for every value channel: it belongs to the content lambda.
        content = key.transpose(1, 2) @ value + bias[:, None]  # [B, k, v]

        # A single tile sees the whole row: the columns outside of the picture are zero and are left out.
        columns = (0, 0) if single else (radius, radius + right)
        value = F.pad(value.unflatten(1, (height, width)), (0, 0, *columns, radius, radius))
        rows = max(1, self.choose_max_elements(query.device.type) // (batch * tiles * heads * tile * row))
        output = []
        for top in range(0, height, rows):
            query_rows = query[:, top : top + rows]
            count = query_rows.shape[1]
            weights = query_rows.reshape(-1, dim) @ filters  # [B rows tiles tile h, row + 1]
            weights = weights.view(batch * count * tiles, -1)[:, : tile * (heads * (row + 1) - 1)]
            weights = weights.unflatten(1, (tile, -1)).unfold(2, row, row + 1)  # [B rows tiles, tile, h, row]
            values = value[:, top : top + count + 2 * radius].unfold(1, window, 1)  # [B, rows, columns, v, r]
            if single:
                weights = weights.unflatten(-1, (window, span))[..., radius : radius + width]
                values = values.permute(0, 1, 4, 2, 3).reshape(batch * count, window * width, dim)
            else:
                values = values.unfold(2, span, tile)  # [B, rows, tiles, v, r, span]
                values = values.permute(0, 1, 2, 4, 5, 3).reshape(batch * count * tiles, row, dim)
            weights = weights.reshape(batch * count * tiles, tile * heads, -1)
            sums = torch.bmm(weights, values).view(batch, -1, dim)
            output.append(torch.baddbmm(sums, query_rows.reshape(batch, -1, dim), content))
        output = torch.cat(output, 1) if len(output) > 1 else output[0]  # [B, H tiles tile h, v]
        output = output.view(batch, height, tiles * tile, heads * dim)[:, :, :width]
        return output.permute(0, 3, 1, 2)  # [B, h v, H, W], channels last in memory


class LocalLambda(LambdaLayer):
    """
    Local-lambda self-attention: a global content lambda and a local position lambda (paper, section 3.2).

    Args:
        dim (`int`): Width `C = h k` of input and output.
        num_heads (`int`): Number of query heads `h`.
        window_size (`int`): Side `r` of the local window, odd.
        processor: [`FastLocalLambdaProcessor`] (default) or [`LocalLambdaProcessor`].
    """

    _default_processor_cls = FastLocalLambdaProcessor
    _available_processors = [LocalLambdaProcessor, FastLocalLambdaProcessor]

    def __init__(self, dim: int, num_heads: int, window_size: int, processor=None):
        super().__init__(dim, num_heads, processor)
        self.to_k = nn.Conv2d(dim, self.head_dim, 1, bias=False)
        self.to_v = nn.Conv2d(dim, self.head_dim, 1, bias=False)
        self.norm_v = nn.BatchNorm2d(self.head_dim)
        self.pos_conv = LocalPositionConv(self.head_dim, window_size)

    def project(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        key = to_tokens(self.to_k(hidden_states))  # [B, n, k]
        key = key.softmax(1, dtype=torch.float32).to(key.dtype)
        value = to_tokens(self.norm_v(self.to_v(hidden_states)))  # [B, n, v]
        return self.project_query(hidden_states), key, value

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.processor(self, hidden_states)  # [B, C, H, W]


class InteractiveLambdaProcessor:
    """Interactive-lambda by its formulas, one lambda matrix for every position (reference; slow and large)."""

    def __call__(
        self, attn: "InteractiveLambda", hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor
    ) -> torch.Tensor:
        query, key, value, embedding = attn.project(hidden_states, encoder_hidden_states)
        content_lambda = torch.einsum("bmk,bmv->bkv", key, value)
        position_lambda = torch.einsum("nmk,bmv->bnkv", embedding, value)
        output = torch.einsum("bnhk,bkv->bhvn", query, content_lambda)
        output = output + torch.einsum("bnhk,bnkv->bhvn", query, position_lambda)
        return output.reshape(hidden_states.shape)


class FastInteractiveLambdaProcessor:
    """
    Interactive-lambda without the lambda matrices: the same sums in another order (exact but for rounding).

    `sum_k Q[h,k,n] sum_m (K[m,k] + E[n,m,k]) V[m,v]` contracts the queries with keys and position embeddings first.
    """

    def __call__(
        self, attn: "InteractiveLambda", hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor
    ) -> torch.Tensor:
        query, key, value, embedding = attn.project(hidden_states, encoder_hidden_states)
        embedding = embedding.transpose(1, 2)  # [n, k, m]
        weights = (query.flatten(1, 2) @ key.transpose(1, 2)).unflatten(1, (-1, attn.num_heads))  # [B, n, h, m]
        weights = torch.stack([torch.baddbmm(w, q, embedding) for w, q in zip(weights, query)])
        return to_grid((weights.flatten(1, 2) @ value).view(*query.shape[:2], -1), hidden_states)  # (h v) inside


class InteractiveLambda(LambdaLayer):
    """
    Interactive-lambda cross-attention between positions and context tokens (paper, section 3.2).

    Args:
        dim (`int`): Width `C = h k` of input and output.
        num_heads (`int`): Number of query heads `h`.
        cross_attention_dim (`int`): Width of the context tokens.
        context_length (`int`): Number of context tokens `m`.
        grid_size (`int`): Side of the square grid for which the position embeddings are stored. Other sizes are
            resampled from it.
        processor: [`FastInteractiveLambdaProcessor`] (default) or [`InteractiveLambdaProcessor`].
    """

    _default_processor_cls = FastInteractiveLambdaProcessor
    _available_processors = [InteractiveLambdaProcessor, FastInteractiveLambdaProcessor]

    def __init__(
        self, dim: int, num_heads: int, cross_attention_dim: int, context_length: int, grid_size: int, processor=None
    ):
        super().__init__(dim, num_heads, processor)
        self.grid_size = grid_size
        self.rel_pos_emb = nn.Parameter(torch.empty(grid_size**2, context_length, self.head_dim, 1))
        nn.init.trunc_normal_(self.rel_pos_emb, std=0.02)
        self.to_k = nn.Linear(cross_attention_dim, self.head_dim, bias=False)
        self.to_v = nn.Linear(cross_attention_dim, self.head_dim, bias=False)
        self.norm_v = nn.BatchNorm1d(self.head_dim)

    def project_context(self, encoder_hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        key = self.to_k(encoder_hidden_states)  # [B, m, k]
        key = key.softmax(1, dtype=torch.float32).to(key.dtype)
        value = self.norm_v(self.to_v(encoder_hidden_states).transpose(1, 2)).transpose(1, 2)  # [B, m, v]
        return key, value

    def project(
        self, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Query `[B, n, h, k]`, key `[B, m, k]`, value `[B, m, v]` and position embeddings `[n, m, k]`."""
        key, value = self.project_context(encoder_hidden_states)
        return self.project_query(hidden_states), key, value, self.position_embedding(*hidden_states.shape[2:])

    def position_embedding(self, height: int, width: int) -> torch.Tensor:
        """The position embeddings `[n, m, k]` of a grid: as stored at the native size, else bilinearly resampled."""
        embedding = self.rel_pos_emb.squeeze(-1)
        grid = self.grid_size
        if (height, width) == (grid, grid):
            return embedding
        length, dim = embedding.shape[1:]
        embedding = embedding.reshape(1, grid, grid, -1).permute(0, 3, 1, 2)
        embedding = F.interpolate(embedding, (height, width), mode="bilinear", align_corners=False)
        return embedding.permute(0, 2, 3, 1).reshape(-1, length, dim)

    def forward(self, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor) -> torch.Tensor:
        return self.processor(self, hidden_states, encoder_hidden_states)  # [B, C, H, W]


class OnGrid:
    """A layer of tokens `[B, n, C]`, in raster order, as one that takes and gives `[B, C, H, W]`."""

    def forward(self, hidden_states: torch.Tensor, *args) -> torch.Tensor:
        return to_grid(super().forward(to_tokens(hidden_states), *args), hidden_states)


class GridGatedLinearAttention(OnGrid, GatedLinearAttention):
    """[`GatedLinearAttention`] on the grid."""


class GridAttention(OnGrid, Attention):
    """Softmax attention of diffusers on the grid."""


class GridFeedForward(OnGrid, FeedForward):
    """Feed-forward of diffusers, with GEGLU, on the grid."""


class SeparableConv2d(nn.Module):
    """Depthwise 3x3 convolution, BatchNorm, ReLU, pointwise convolution, BatchNorm; adds its input if widths agree."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.has_skip = in_channels == out_channels
        self.conv_dw = nn.Conv2d(in_channels, in_channels, 3, padding=1, groups=in_channels, bias=False)
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv_pw = nn.Conv2d(in_channels, out_channels, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        output = F.relu(self.bn1(self.conv_dw(hidden_states)))
        output = self.bn2(self.conv_pw(output))
        return output + hidden_states if self.has_skip else output


def make_conv(conv_type: str, in_channels: int, out_channels: int) -> nn.Module:
    if conv_type == "separable":
        return SeparableConv2d(in_channels, out_channels)
    return nn.Conv2d(in_channels, out_channels, 3, padding=1)


class MoebiusBlock(nn.Module):
    """What the blocks do between their layers, as functions that can be exchanged: `fusion.py` does it in place."""

    silu = staticmethod(F.silu)
    add = staticmethod(torch.add)


class MoebiusResnetBlock2D(MoebiusBlock):
    """Two normalised convolutions with the time embedding added between them, and a shortcut."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        time_embed_dim: int,
        norm_num_groups: int,
        norm_eps: float,
        dropout: float,
        conv_type: str,
    ):
        super().__init__()
        self.norm1 = nn.GroupNorm(norm_num_groups, in_channels, eps=norm_eps)
        self.conv1 = make_conv(conv_type, in_channels, out_channels)
        self.time_emb_proj = nn.Linear(time_embed_dim, out_channels)
        self.norm2 = nn.GroupNorm(norm_num_groups, out_channels, eps=norm_eps)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = make_conv(conv_type, out_channels, out_channels)
        self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, hidden_states: torch.Tensor, temb: torch.Tensor) -> torch.Tensor:
        residual = hidden_states
        hidden_states = self.conv1(self.silu(self.norm1(hidden_states)))
        hidden_states = self.add(hidden_states, self.time_emb_proj(F.silu(temb))[:, :, None, None])
        hidden_states = self.conv2(self.dropout(self.silu(self.norm2(hidden_states))))
        # The shortcut comes last, so that its output does not exist beside the widest tensors of the block.
        return self.add(hidden_states, residual if self.conv_shortcut is None else self.conv_shortcut(residual))


class ConvLayer(nn.Module):
    """A convolution with an optional SiLU; the level of nesting is that of the published names."""

    def __init__(self, conv: nn.Conv2d, activation: bool):
        super().__init__()
        self.conv = conv
        self.activation = activation

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        hidden_states = self.conv(hidden_states)
        return F.silu(hidden_states) if self.activation else hidden_states


class MixFeedForward(nn.Module):
    """Gated feed-forward with a depthwise 3x3 convolution between its two projections (paper, section 3.3)."""

    def __init__(self, dim: int, ratio: float):
        super().__init__()
        hidden = int(ratio * dim)
        self.inverted_conv = ConvLayer(nn.Conv2d(dim, 2 * hidden, 1), activation=True)
        depth_conv = nn.Conv2d(2 * hidden, 2 * hidden, 3, padding=1, groups=2 * hidden)
        self.depth_conv = ConvLayer(depth_conv, activation=False)
        self.point_conv = ConvLayer(nn.Conv2d(hidden, dim, 1, bias=False), activation=False)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        hidden_states, gate = self.depth_conv(self.inverted_conv(hidden_states)).chunk(2, 1)
        return self.point_conv(hidden_states * F.silu(gate))


class MoebiusTransformerBlock(MoebiusBlock):
    """Self-attention, cross-attention and feed-forward, each normalised before and added to its input."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        cross_attention_dim: int,
        context_length: int,
        grid_size: int,
        window_size: int,
        mix_ffn_ratio: float,
        self_attention_type: str,
        cross_attention_type: str,
        feed_forward_type: str,
    ):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        if self_attention_type == "local_lambda":
            self.attn1 = LocalLambda(dim, num_heads, window_size)
        else:
            self.attn1 = GridGatedLinearAttention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim)
        if cross_attention_type == "interactive_lambda":
            self.attn2 = InteractiveLambda(dim, num_heads, cross_attention_dim, context_length, grid_size)
        else:
            self.attn2 = GridAttention(dim, cross_attention_dim, heads=num_heads, dim_head=dim // num_heads)
        self.norm3 = nn.LayerNorm(dim)
        self.ff = MixFeedForward(dim, mix_ffn_ratio) if feed_forward_type == "mix_ffn" else GridFeedForward(dim)

    @staticmethod
    def normalize(norm: nn.LayerNorm, hidden_states: torch.Tensor) -> torch.Tensor:
        return norm(hidden_states.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)  # over the channels of [B, C, H, W]

    def forward(self, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor) -> torch.Tensor:
        hidden_states = self.add(self.attn1(self.normalize(self.norm1, hidden_states)), hidden_states)
        normed = self.normalize(self.norm2, hidden_states)
        hidden_states = self.add(self.attn2(normed, encoder_hidden_states), hidden_states)
        return self.add(self.ff(self.normalize(self.norm3, hidden_states)), hidden_states)


class MoebiusTransformer2DModel(MoebiusBlock):
    """One transformer block between two projections, added to its input."""

    def __init__(self, dim: int, norm_num_groups: int, **block_kwargs):
        super().__init__()
        self.norm = nn.GroupNorm(norm_num_groups, dim, eps=1e-6)
        self.proj_in = nn.Conv2d(dim, dim, 1)
        self.transformer_blocks = nn.ModuleList([MoebiusTransformerBlock(dim, **block_kwargs)])
        self.proj_out = nn.Conv2d(dim, dim, 1)

    def forward(self, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor) -> torch.Tensor:
        residual = hidden_states
        hidden_states = self.proj_in(self.norm(hidden_states))
        for block in self.transformer_blocks:
            hidden_states = block(hidden_states, encoder_hidden_states)
        return self.add(self.proj_out(hidden_states), residual)


class MoebiusDownsample2D(nn.Module):
    """A full 3x3 convolution of stride 2."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.conv(hidden_states)


class MoebiusUpsample2D(nn.Module):
    """Nearest-neighbour enlargement by 2 and a full 3x3 convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.conv(F.interpolate(hidden_states, scale_factor=2.0, mode="nearest"))


class MoebiusDownBlock2D(nn.Module):
    """Residual blocks, each followed by a transformer, then an optional downsampling."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        num_layers: int,
        add_downsample: bool,
        resnet: dict,
        transformer: dict,
    ):
        super().__init__()
        self.resnets = nn.ModuleList(
            MoebiusResnetBlock2D(in_channels if i == 0 else out_channels, out_channels, **resnet)
            for i in range(num_layers)
        )
        self.attentions = nn.ModuleList(
            MoebiusTransformer2DModel(out_channels, **transformer) for _ in range(num_layers)
        )
        self.downsamplers = nn.ModuleList([MoebiusDownsample2D(out_channels)]) if add_downsample else None

    def forward(
        self, hidden_states: torch.Tensor, temb: torch.Tensor, encoder_hidden_states: torch.Tensor
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        skips = ()
        for resnet, attention in zip(self.resnets, self.attentions, strict=True):
            hidden_states = attention(resnet(hidden_states, temb), encoder_hidden_states)
            skips += (hidden_states,)
        if self.downsamplers is not None:
            hidden_states = self.downsamplers[0](hidden_states)
            skips += (hidden_states,)
        return hidden_states, skips


class MoebiusUpBlock2D(nn.Module):
    """Residual blocks on the concatenated skips, each followed by a transformer, then an optional upsampling."""

    def __init__(self, in_channels: list[int], out_channels: int, add_upsample: bool, resnet: dict, transformer: dict):
        super().__init__()
        self.resnets = nn.ModuleList(MoebiusResnetBlock2D(width, out_channels, **resnet) for width in in_channels)
        self.attentions = nn.ModuleList(MoebiusTransformer2DModel(out_channels, **transformer) for _ in in_channels)
        self.upsamplers = nn.ModuleList([MoebiusUpsample2D(out_channels)]) if add_upsample else None

    def forward(
        self,
        hidden_states: torch.Tensor,
        skips: tuple[torch.Tensor, ...],
        temb: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
    ) -> torch.Tensor:
        for resnet, attention, skip in zip(self.resnets, self.attentions, reversed(skips), strict=True):
            hidden_states = resnet(torch.cat([hidden_states, skip], 1), temb)  # no name keeps the wide tensor longer
            hidden_states = attention(hidden_states, encoder_hidden_states)
        return hidden_states if self.upsamplers is None else self.upsamplers[0](hidden_states)


def batch_norms(module: nn.Module) -> list[nn.Module]:
    return [layer for layer in module.modules() if isinstance(layer, nn.modules.batchnorm._BatchNorm)]


@contextmanager
def frozen_batch_statistics(module: nn.Module):
    """Keeps the running statistics of BatchNorm as they are while the batch's own statistics normalise."""
    layers = batch_norms(module)
    saved = [(layer.momentum, layer.num_batches_tracked.clone()) for layer in layers]
    for layer in layers:
        layer.momentum = 0.0
    try:
        yield
    finally:
        for layer, (momentum, count) in zip(layers, saved, strict=True):
            layer.momentum = momentum
            layer.num_batches_tracked.copy_(count)


def checkpoint_block(block: nn.Module, *args):
    # The recomputation in the backward pass would count the batch twice in BatchNorm's running statistics.
    contexts = (lambda: (nullcontext(), frozen_batch_statistics(block))) if block.training else noop_context_fn
    return checkpoint(block, *args, use_reentrant=False, context_fn=contexts)


def embed_inputs(
    unet: ModelMixin, sample: torch.Tensor, timestep: torch.Tensor | float | int, encoder_hidden_states: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Checks the inputs of a U-Net, and embeds the time as `[B, 4 C]` and the context as `[B, m, C_context]`."""
    config, shape = unet.config, list(encoder_hidden_states.shape)
    factor = 2 ** (len(config.block_out_channels) - 1)
    if sample.ndim != 4 or sample.shape[1] != config.in_channels:
        raise ValueError(
            f"`sample` must have the shape [B, {config.in_channels}, H, W], but has {list(sample.shape)}."
        )
    if min(sample.shape[2:]) < factor or sample.shape[2] % factor or sample.shape[3] % factor:
        raise ValueError(
            f"`sample` must have a height and width that are positive multiples of {factor}, but has"
            f" {list(sample.shape[2:])}."
        )
    # Position embeddings are made for a number of tokens; a model without them takes any.
    length = config.get("context_length", shape[1] if len(shape) == 3 else "tokens")
    if shape != [len(sample), length, config.encoder_hid_dim]:
        raise ValueError(
            f"`encoder_hidden_states` must have the shape [{len(sample)}, {length}, {config.encoder_hid_dim}], but"
            f" has {shape}."
        )
    if not torch.is_tensor(timestep):
        timestep = torch.tensor([timestep], device=sample.device)
    # `shape[0]` and not `len`, which would be a constant in an exported graph.
    timestep = timestep.reshape(-1).to(sample.device).expand(sample.shape[0])
    temb = unet.time_embedding(unet.time_proj(timestep).to(sample.dtype))
    return temb, unet.encoder_hid_proj(encoder_hidden_states)


class MoebiusUNet2DModel(ModelMixin, AttentionMixin, ConfigMixin, PeftAdapterMixin):
    r"""
    The U-Net of Moebius that predicts the noise of inpainted latents (arXiv 2606.19195, section 3).

    The defaults are the published model. In half precision the softmaxes, the sinusoidal time embedding and the state
    of gated linear attention are computed in float32, and the BatchNorm layers keep float32 weights and statistics.

    Args:
        sample_size (`int`, defaults to 64): Native side of the latents; other sizes resample the position embeddings.
        in_channels (`int`, defaults to 9): Channels of the input: noisy latents (4), mask (1), masked-image
            latents (4).
        out_channels (`int`, defaults to 4): Channels of the prediction.
        block_out_channels (`tuple[int, ...]`, defaults to `(320, 640, 1280)`): Width of each level.
        layers_per_block (`int`, defaults to 2): Residual blocks in a down block; an up block has one more.
        num_attention_heads (`int`, defaults to 8): Heads at every level.
        cross_attention_dim (`int`, defaults to 768): Width to which the context tokens are projected.
        encoder_hid_dim (`int`, defaults to 3072): Width of the context tokens as given.
        context_length (`int`, defaults to 10): Number of context tokens.
        local_window_size (`int`, defaults to 15): Side of Local-lambda's window in positions, odd.
        mix_ffn_ratio (`float`, defaults to 2.5): Width of the Mix-FFN in relation to its input.
        norm_num_groups (`int`, defaults to 32): Groups of the group normalisations.
        norm_eps (`float`, defaults to 1e-5): Epsilon of the group normalisations of the residual blocks and the head.
        dropout (`float`, defaults to 0.0): Dropout in the residual blocks.
        self_attention_type (`str`, defaults to `"local_lambda"`): Or `"gla"`, as in the paper's Table 2.
        cross_attention_type (`str`, defaults to `"interactive_lambda"`): Or `"softmax"`.
        feed_forward_type (`str`, defaults to `"mix_ffn"`): Or `"geglu"`.
        conv_type (`str`, defaults to `"separable"`): Or `"full"`, for the residual blocks.

    Raises:
        ValueError: If an argument is not one of its allowed values, or widths do not divide.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["MoebiusTransformer2DModel", "MoebiusResnetBlock2D"]
    _repeated_blocks = ["MoebiusTransformerBlock"]
    _skip_layerwise_casting_patterns = ["norm", "bn1", "bn2", "pos_conv", "time_embedding"]
    _keep_in_fp32_modules = ["bn1", "bn2", "norm_q", "norm_v"]

    @register_to_config
    def __init__(
        self,
        sample_size: int = 64,
        in_channels: int = 9,
        out_channels: int = 4,
        block_out_channels: tuple[int, ...] = (320, 640, 1280),
        layers_per_block: int = 2,
        num_attention_heads: int = 8,
        cross_attention_dim: int = 768,
        encoder_hid_dim: int = 3072,
        context_length: int = 10,
        local_window_size: int = 15,
        mix_ffn_ratio: float = 2.5,
        norm_num_groups: int = 32,
        norm_eps: float = 1e-5,
        dropout: float = 0.0,
        self_attention_type: str = "local_lambda",
        cross_attention_type: str = "interactive_lambda",
        feed_forward_type: str = "mix_ffn",
        conv_type: str = "separable",
    ):
        super().__init__()
        for name, given, allowed in (
            ("self_attention_type", self_attention_type, SELF_ATTENTION_TYPES),
            ("cross_attention_type", cross_attention_type, CROSS_ATTENTION_TYPES),
            ("feed_forward_type", feed_forward_type, FEED_FORWARD_TYPES),
            ("conv_type", conv_type, CONV_TYPES),
        ):
            if given not in allowed:
                raise ValueError(f"`{name}` must be one of {', '.join(allowed)}, but is {given!r}.")
        if not block_out_channels:
            raise ValueError("`block_out_channels` must name the width of at least one level, but is empty.")
        if local_window_size < 1 or local_window_size % 2 == 0:
            raise ValueError(f"`local_window_size` must be odd and positive, but is {local_window_size}.")
        for width in block_out_channels:
            if width % norm_num_groups:
                raise ValueError(f"`norm_num_groups` must divide every width, but is {norm_num_groups} for {width}.")
        factor = 2 ** (len(block_out_channels) - 1)
        if sample_size < factor or sample_size % factor:
            raise ValueError(f"`sample_size` must be a positive multiple of {factor}, but is {sample_size}.")

        time_embed_dim = 4 * block_out_channels[0]
        self.time_proj = Timesteps(block_out_channels[0], flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embedding = TimestepEmbedding(block_out_channels[0], time_embed_dim)
        self.encoder_hid_proj = nn.Linear(encoder_hid_dim, cross_attention_dim)

        resnet = {
            "time_embed_dim": time_embed_dim,
            "norm_num_groups": norm_num_groups,
            "norm_eps": norm_eps,
            "dropout": dropout,
            "conv_type": conv_type,
        }
        transformer = {
            "norm_num_groups": norm_num_groups,
            "num_heads": num_attention_heads,
            "cross_attention_dim": cross_attention_dim,
            "context_length": context_length,
            "window_size": local_window_size,
            "mix_ffn_ratio": mix_ffn_ratio,
            "self_attention_type": self_attention_type,
            "cross_attention_type": cross_attention_type,
            "feed_forward_type": feed_forward_type,
        }
        self.conv_in = make_conv(conv_type, in_channels, block_out_channels[0])
        levels = len(block_out_channels)
        self.down_blocks = nn.ModuleList()
        skip_channels = [block_out_channels[0]]
        channels = block_out_channels[0]
        for level, width in enumerate(block_out_channels):
            has_sampler = level < levels - 1
            grid = {"grid_size": sample_size // 2**level}
            block = MoebiusDownBlock2D(channels, width, layers_per_block, has_sampler, resnet, transformer | grid)
            self.down_blocks.append(block)
            skip_channels += [width] * (layers_per_block + has_sampler)
            channels = width
        self.up_blocks = nn.ModuleList()
        for level in reversed(range(levels)):
            width = block_out_channels[level]
            has_sampler = level > 0
            in_widths = []
            for _ in range(layers_per_block + 1):
                in_widths.append(channels + skip_channels.pop())
                channels = width
            grid = {"grid_size": sample_size // 2**level}
            self.up_blocks.append(MoebiusUpBlock2D(in_widths, width, has_sampler, resnet, transformer | grid))

        self.conv_norm_out = nn.GroupNorm(norm_num_groups, block_out_channels[0], eps=norm_eps)
        self.conv_out = make_conv(conv_type, block_out_channels[0], out_channels)
        self.gradient_checkpointing = False
        self.is_fused = False

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        """As [`~ModelMixin.from_pretrained`]; statistics of layers that are offloaded to the disk are loaded too."""
        result = super().from_pretrained(*args, **kwargs)
        for layer in batch_norms(result[0] if isinstance(result, tuple) else result):
            hook = getattr(layer, "_hf_hook", None)
            if getattr(hook, "offload", False):  # accelerate offloads weights and leaves buffers as they were made
                for name, buffer in layer.named_buffers():
                    buffer.copy_(hook.weights_map[name])
        return result

    def to(self, *args, **kwargs):
        """
        As [`~ModelMixin.to`]; BatchNorm stays in float32 when the rest is cast to half precision, as in
        `from_pretrained`, and a `memory_format` applies to the convolutions, whatever the rank of other weights.
        """
        memory_format = kwargs.pop("memory_format", None)
        statistics = [(layer, layer.state_dict()) for layer in batch_norms(self)]
        model = super().to(*args, **kwargs) if args or kwargs else self
        for layer, state in statistics:
            if layer.running_var.dtype in (torch.float16, torch.bfloat16):
                layer.float().load_state_dict(state)
        if memory_format is not None:
            for module in self.modules():
                if isinstance(module, nn.Conv2d):
                    nn.Module.to(module, memory_format=memory_format)
        return model

    @wraps(ModelMixin.save_pretrained, assigned=())  # pipelines look in its signature for `variant`
    def save_pretrained(self, *args, **kwargs) -> None:
        """As [`~ModelMixin.save_pretrained`]; refused once `fuse_for_inference` has changed the weights."""
        if self.is_fused:
            raise ValueError("This model has been fused for inference and cannot be saved; load it again to save it.")
        super().save_pretrained(*args, **kwargs)

    def enable_gradient_checkpointing(self, gradient_checkpointing_func=None) -> None:
        """As [`~ModelMixin.enable_gradient_checkpointing`]; BatchNorm statistics are still updated once a step."""
        super().enable_gradient_checkpointing(gradient_checkpointing_func or checkpoint_block)

    def fuse_for_inference(self) -> None:
        """
        Folds every BatchNorm into the layer before it, and puts faster layers in the place of others (`fusion.py`).

        The function of the model stays the same but for rounding. It can no longer be trained or saved; to undo it,
        load the model again. LoRA adapters that have been fused become part of the weights.

        Raises:
            ValueError: If the model is in train mode or quantized, or LoRA adapters are active and not fused.
        """
        from .fusion import fuse_for_inference

        fuse_for_inference(self)

    def set_lambda_algorithm(self, algorithm: str) -> None:
        """
        Chooses how the lambda layers are evaluated; both give the same numbers but for rounding.

        Args:
            algorithm (`str`): `"fast"` (the default of a new model) or `"reference"`, the formulas taken literally.
        """
        processors = {
            "fast": (FastLocalLambdaProcessor, FastInteractiveLambdaProcessor),
            "reference": (LocalLambdaProcessor, InteractiveLambdaProcessor),
        }
        if algorithm not in processors:
            raise ValueError(f"`algorithm` must be one of {', '.join(processors)}, but is {algorithm!r}.")
        local, interactive = processors[algorithm]
        for module in self.modules():
            if isinstance(module, LambdaLayer):
                module.set_processor(local() if isinstance(module, LocalLambda) else interactive())

    def run_block(self, block: nn.Module, *args):
        if torch.is_grad_enabled() and self.gradient_checkpointing:
            return self._gradient_checkpointing_func(block, *args)
        return block(*args)

    @apply_lora_scale("attention_kwargs")
    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | float | int,
        encoder_hidden_states: torch.Tensor,
        return_dict: bool = True,
        output_hidden_states: bool = False,
        attention_kwargs: dict | None = None,
    ) -> MoebiusUNet2DOutput | tuple:
        """
        Args:
            sample (`torch.Tensor` of shape `[B, in_channels, H, W]`): Noisy latents, mask and masked-image latents; H
                and W multiples of 4 (of 2 to the number of levels less one).
            timestep (`torch.Tensor`, `float` or `int`): One for all, or one for each sample of the batch.
            encoder_hidden_states (`torch.Tensor` of shape `[B, context_length, encoder_hid_dim]`): LCG tokens.
            return_dict (`bool`, defaults to `True`): Return a [`MoebiusUNet2DOutput`] instead of a tuple.
            output_hidden_states (`bool`, defaults to `False`): Also return the output of every block.
            attention_kwargs (`dict`, *optional*): `{"scale": s}` sets the weight of the active LoRA adapters.

        Returns:
            [`MoebiusUNet2DOutput`], or a tuple of the prediction and, if asked for, the tuple of block outputs.
        """
        temb, encoder_hidden_states = embed_inputs(self, sample, timestep, encoder_hidden_states)
        # Each layer keeps the memory format of its input, so that the first decides it for all.
        hidden_states = self.conv_in(sample.contiguous(memory_format=torch.channels_last))
        skips = (hidden_states,)
        block_outputs = ()
        for block in self.down_blocks:
            hidden_states, block_skips = self.run_block(block, hidden_states, temb, encoder_hidden_states)
            skips += block_skips
            block_outputs += (hidden_states,)
        for block in self.up_blocks:
            count = len(block.resnets)
            skips, block_skips = skips[:-count], skips[-count:]
            hidden_states = self.run_block(block, hidden_states, block_skips, temb, encoder_hidden_states)
            block_outputs += (hidden_states,)
        sample = self.conv_out(F.silu(self.conv_norm_out(hidden_states)))

        if not return_dict:
            return (sample, block_outputs) if output_hidden_states else (sample,)
        return MoebiusUNet2DOutput(sample=sample, hidden_states=block_outputs if output_hidden_states else None)
