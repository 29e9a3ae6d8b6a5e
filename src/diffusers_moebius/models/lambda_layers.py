"""The lambda layers of Moebius (arXiv 2606.19195, section 3.2), by their formulas and by faster orders of the sums."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from .linear_attention import ProcessedAttention


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


def to_tokens(hidden_states: torch.Tensor) -> torch.Tensor:
    return hidden_states.permute(0, 2, 3, 1).flatten(1, 2)  # [B, C, H, W] -> [B, n, C]


class LambdaLayer(ProcessedAttention):
    """What both lambda layers share: `h` heads of queries that read one linear map of `k` keys and `v` values."""

    def __init__(self, dim: int, num_heads: int, processor):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"`num_attention_heads` must divide every width, but is {num_heads} for {dim}.")
        self.num_heads = num_heads
        self.head_dim = dim // num_heads  # k = v
        self.set_processor(processor)


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

    processor_types = (LocalLambdaProcessor, FastLocalLambdaProcessor)

    def __init__(self, dim: int, num_heads: int, window_size: int, processor=None):
        super().__init__(dim, num_heads, processor or FastLocalLambdaProcessor())
        self.to_q = nn.Conv2d(dim, dim, 1, bias=False)
        self.to_k = nn.Conv2d(dim, self.head_dim, 1, bias=False)
        self.to_v = nn.Conv2d(dim, self.head_dim, 1, bias=False)
        self.norm_q = nn.BatchNorm2d(dim)
        self.norm_v = nn.BatchNorm2d(self.head_dim)
        self.pos_conv = LocalPositionConv(self.head_dim, window_size)

    def project(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        query = to_tokens(self.norm_q(self.to_q(hidden_states))).unflatten(2, (self.num_heads, -1))  # [B, n, h, k]
        key = to_tokens(self.to_k(hidden_states))  # [B, n, k]
        key = key.softmax(1, dtype=torch.float32).to(key.dtype)
        value = to_tokens(self.norm_v(self.to_v(hidden_states)))  # [B, n, v]
        return query, key, value

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.processor(self, hidden_states)  # [B, C, H, W]


class CachedContext(NamedTuple):
    """Context tokens `[B, m, cross_attention_dim]` and what each layer has computed from them in the same run."""

    tokens: torch.Tensor
    layers: dict[nn.Module, tuple]


class InteractiveLambdaProcessor:
    """Interactive-lambda by its formulas, one lambda matrix for every position (reference; slow and large)."""

    def __call__(
        self,
        attn: "InteractiveLambda",
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | CachedContext,
    ) -> torch.Tensor:
        batch, _, height, width = hidden_states.shape
        query = attn.project_query(hidden_states)  # [B, n, h, k]
        key, value, embedding = attn.read_context(encoder_hidden_states, height, width)
        content_lambda = torch.einsum("bmk,bmv->bkv", key, value)
        position_lambda = torch.einsum("nmk,bmv->bnkv", embedding, value)
        output = torch.einsum("bnhk,bkv->bhvn", query, content_lambda)
        output = output + torch.einsum("bnhk,bnkv->bhvn", query, position_lambda)
        return output.reshape(batch, -1, height, width)


class FastInteractiveLambdaProcessor:
    """
    Interactive-lambda without the lambda matrices: the same sums in another order (exact but for rounding).

    `sum_k Q[h,k,n] sum_m (K[m,k] + E[n,m,k]) V[m,v]` contracts the queries with keys and position embeddings first.
    """

    def __call__(
        self,
        attn: "InteractiveLambda",
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | CachedContext,
    ) -> torch.Tensor:
        batch, channels, height, width = hidden_states.shape
        query = attn.project_query(hidden_states)  # [B, n, h, k]
        key, value, embedding = attn.read_context(encoder_hidden_states, height, width)
        embedding = embedding.transpose(1, 2)  # [n, k, m]
        weights = (query.flatten(1, 2) @ key.transpose(1, 2)).unflatten(1, (-1, attn.num_heads))  # [B, n, h, m]
        weights = torch.stack([torch.baddbmm(w, q, embedding) for w, q in zip(weights, query)])
        output = (weights.flatten(1, 2) @ value).view(batch, height, width, channels)  # (h v) inside
        return output.permute(0, 3, 1, 2)


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

    processor_types = (InteractiveLambdaProcessor, FastInteractiveLambdaProcessor)

    def __init__(
        self,
        dim: int,
        num_heads: int,
        cross_attention_dim: int,
        context_length: int,
        grid_size: int,
        processor=None,
    ):
        super().__init__(dim, num_heads, processor or FastInteractiveLambdaProcessor())
        self.grid_size = grid_size
        self.rel_pos_emb = nn.Parameter(torch.empty(grid_size**2, context_length, self.head_dim, 1))
        nn.init.trunc_normal_(self.rel_pos_emb, std=0.02)
        self.to_q = nn.Conv2d(dim, dim, 1, bias=False)
        self.to_k = nn.Linear(cross_attention_dim, self.head_dim, bias=False)
        self.to_v = nn.Linear(cross_attention_dim, self.head_dim, bias=False)
        self.norm_q = nn.BatchNorm2d(dim)
        self.norm_v = nn.BatchNorm1d(self.head_dim)

    def project_query(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return to_tokens(self.norm_q(self.to_q(hidden_states))).unflatten(2, (self.num_heads, -1))  # [B, n, h, k]

    def project_context(self, encoder_hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        key = self.to_k(encoder_hidden_states)  # [B, m, k]
        key = key.softmax(1, dtype=torch.float32).to(key.dtype)
        value = self.norm_v(self.to_v(encoder_hidden_states).transpose(1, 2)).transpose(1, 2)  # [B, m, v]
        return key, value

    def read_context(
        self, context: torch.Tensor | CachedContext, height: int, width: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Key `[B, m, k]`, value `[B, m, v]` and position embeddings `[n, m, k]`."""
        is_native = (height, width) == (self.grid_size, self.grid_size)
        if isinstance(context, torch.Tensor):
            key, value, embedding = *self.project_context(context), None
        elif self in context.layers:
            key, value, embedding = context.layers[self]
        else:
            # Embeddings of the native size are the weights themselves, which a cache would keep from being offloaded.
            embedding = None if is_native else self.position_embedding(height, width)
            key, value = self.project_context(context.tokens)
            context.layers[self] = key, value, embedding
        return key, value, self.position_embedding(height, width) if embedding is None else embedding

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

    def forward(
        self, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor | CachedContext
    ) -> torch.Tensor:
        return self.processor(self, hidden_states, encoder_hidden_states)  # [B, C, H, W]
