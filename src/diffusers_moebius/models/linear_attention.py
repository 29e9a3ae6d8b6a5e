"""Gated linear attention, and what attention layers with exchangeable algorithms share."""

import torch
import torch.nn.functional as F
from diffusers.models.attention import AttentionModuleMixin
from torch import nn


class ProcessedAttention(nn.Module, AttentionModuleMixin):
    """A layer whose algorithm is a processor of one of its `_available_processors`."""

    _supports_qkv_fusion = False

    def set_processor(self, processor) -> None:
        if not isinstance(processor, tuple(self._available_processors)):
            allowed = ", ".join(cls.__name__ for cls in self._available_processors)
            raise ValueError(
                f"`processor` of {type(self).__name__} must be one of {allowed}, but is {type(processor).__name__}."
            )
        super().set_processor(processor)


class GatedLinearAttentionProcessor:
    """Gated linear attention as the literal recurrence over the positions in raster order (reference; slow)."""

    def __call__(self, attn: "GatedLinearAttention", hidden_states: torch.Tensor) -> torch.Tensor:
        query, key, value, log_decay = attn.project(hidden_states)  # [B, h, n, d_k] or [B, h, n, d_v]
        decay = log_decay.exp()
        state = value.new_zeros(*value.shape[:2], key.shape[-1], value.shape[-1])
        output = []
        for t in range(value.shape[2]):
            state = decay[:, :, t, :, None] * state + key[:, :, t, :, None] * value[:, :, t, None, :]
            output.append((query[:, :, t, None, :] @ state)[:, :, 0])
        return attn.gate_output(torch.stack(output, 2), hidden_states)


class ChunkedGatedLinearAttentionProcessor:
    """
    Gated linear attention by chunks: matrix products within a chunk, a recurrence from chunk to chunk.

    Within a chunk the decay from position s to t is split into `exp(G_t - G_mid) exp(G_mid - G_s)`, G being the sum of
    the logarithms. So that neither factor leaves the range of float32, one step decays to `exp(-max_log_decay)` at
    least; a step that forgets more than that, to below 2e-5, is not told from it.

    Args:
        chunk_size (`int`, defaults to 16): Positions in a chunk.
        max_log_decay (`float`, defaults to 11): Largest decay of a step; with half a chunk of such steps the factors
            must stay below `exp(88)`.
    """

    def __init__(self, chunk_size: int = 16, max_log_decay: float = 11.0):
        if chunk_size < 1 or chunk_size * max_log_decay > 2 * 88:
            raise ValueError(
                f"`chunk_size` times `max_log_decay` must be at most 176, but is {chunk_size} * {max_log_decay}."
            )
        self.chunk_size = chunk_size
        self.max_log_decay = max_log_decay

    def __call__(self, attn: "GatedLinearAttention", hidden_states: torch.Tensor) -> torch.Tensor:
        length, size = hidden_states.shape[1], self.chunk_size
        padding = (0, 0, 0, -length % size)
        query, key, value, log_decay = (
            (F.pad(tensor, padding) if padding[3] else tensor).unflatten(2, (-1, size))
            for tensor in attn.project(hidden_states)
        )  # [B, h, chunks, size, d_k] or [..., d_v]
        total = log_decay.clamp(min=-self.max_log_decay).cumsum(-2)
        middle, last = total[..., size // 2, None, :], total[..., -1:, :]
        factor = (total - middle).exp()
        query, key = query * factor, key / factor

        # What a chunk adds to the state, and what it leaves of the state that it finds.
        updates = (key.mT @ value) * (last - middle).exp().mT  # [B, h, chunks, d_k, d_v]
        state, states = torch.zeros_like(updates[:, :, 0]), []
        for decay, update in zip(last.exp().mT.unbind(2), updates.unbind(2), strict=True):
            states.append(state)
            state = torch.addcmul(update, decay, state)
        carried = query @ (torch.stack(states, 2) * middle.exp().mT)
        output = carried + (query @ key.mT).tril_() @ value
        return attn.gate_output(output.flatten(2, 3)[:, :, :length], hidden_states)


class FlashGatedLinearAttentionProcessor:
    """Gated linear attention by the Triton kernel of flash-linear-attention; needs that package and CUDA tensors."""

    def __init__(self):
        try:
            import fla.ops.gla as gla
        except ImportError as error:
            raise ImportError(
                "FlashGatedLinearAttentionProcessor needs the package flash-linear-attention"
                " (`pip install flash-linear-attention`)."
            ) from error
        self.chunk_gla = gla.chunk_gla

    def __call__(self, attn: "GatedLinearAttention", hidden_states: torch.Tensor) -> torch.Tensor:
        if hidden_states.device.type != "cuda":
            raise ValueError(f"`hidden_states` must be on CUDA for this processor, but is on {hidden_states.device}.")
        query, key, value, log_decay = (tensor.transpose(1, 2) for tensor in attn.project(hidden_states))
        output, _ = self.chunk_gla(query, key, value, log_decay, scale=1.0)  # [B, n, h, d_v]
        return attn.gate_output(output.transpose(1, 2), hidden_states)


class GatedLinearAttention(ProcessedAttention):
    """
    Gated linear attention, causal in raster order (arXiv 2312.06635), as PixelHacker uses it for self-attention.

    `S_t = diag(a_t) S_(t-1) + k_t v_t^T` and `o_t = S_t^T q_t / sqrt(d_k)` for each head, the state in float32, then
    RMSNorm per head and a swish gate. Key and query are half as wide as the value.

    Args:
        dim (`int`): Width `C` of input and output.
        num_heads (`int`): Number of heads.
        gate_low_rank_dim (`int`, defaults to 16): Rank of the decay's projection.
        gate_logit_normalizer (`float`, defaults to 16): Divides the decay's logarithm.
        processor: [`ChunkedGatedLinearAttentionProcessor`] (default), [`GatedLinearAttentionProcessor`] or
            [`FlashGatedLinearAttentionProcessor`].
    """

    _default_processor_cls = ChunkedGatedLinearAttentionProcessor
    _available_processors = [
        GatedLinearAttentionProcessor,
        ChunkedGatedLinearAttentionProcessor,
        FlashGatedLinearAttentionProcessor,
    ]

    def __init__(
        self, dim: int, num_heads: int, gate_low_rank_dim: int = 16, gate_logit_normalizer: float = 16, processor=None
    ):
        super().__init__()
        if dim % (2 * num_heads):
            raise ValueError(f"`num_attention_heads` must divide half of every width, but is {num_heads} for {dim}.")
        self.num_heads = num_heads
        self.gate_logit_normalizer = gate_logit_normalizer
        self.q_proj = nn.Linear(dim, dim // 2, bias=False)
        self.k_proj = nn.Linear(dim, dim // 2, bias=False)
        self.v_proj = nn.Linear(dim, dim, bias=False)
        self.g_proj = nn.Linear(dim, dim, bias=False)
        self.gk_proj = nn.Sequential(
            nn.Linear(dim, gate_low_rank_dim, bias=False), nn.Linear(gate_low_rank_dim, dim // 2)
        )
        self.g_norm_swish_gate = nn.RMSNorm(dim // num_heads, eps=1e-6)
        self.o_proj = nn.Linear(dim, dim, bias=False)
        self.set_processor(processor or self._default_processor_cls())

    def project(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Query (scaled), key, value and logarithm of the decay, each `[B, h, n, d]` in float32 or better."""
        dtype = torch.promote_types(hidden_states.dtype, torch.float32)

        def split(tensor):
            # In one piece for each head: products of many small matrices are twice as fast that way.
            return tensor.to(dtype).unflatten(-1, (self.num_heads, -1)).transpose(1, 2).contiguous()

        query = split(self.q_proj(hidden_states))
        log_decay = F.logsigmoid(split(self.gk_proj(hidden_states))) / self.gate_logit_normalizer
        key, value = split(self.k_proj(hidden_states)), split(self.v_proj(hidden_states))
        return query * query.shape[-1] ** -0.5, key, value, log_decay

    def gate_output(self, output: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        """Normalises `[B, h, n, d_v]` per head, applies the swish gate and projects to `[B, n, C]`."""
        output = self.g_norm_swish_gate(output.transpose(1, 2).to(hidden_states.dtype)).flatten(2)
        return self.o_proj(output * F.silu(self.g_proj(hidden_states)))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.processor(self, hidden_states)
