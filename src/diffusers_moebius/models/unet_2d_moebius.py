"""The Moebius denoiser (arXiv 2606.19195, section 3), bottom-up: convolutions, lambda layers, blocks, model."""

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
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval
from torch.utils.checkpoint import checkpoint, noop_context_fn

from .adapter_layers import remove_fused_adapters
from .fused_layers import PointwiseConv2d, SlicedMixFeedForward, SmallGridUpsample2D
from .lambda_layers import (
    CachedContext,
    FastInteractiveLambdaProcessor,
    FastLocalLambdaProcessor,
    InteractiveLambda,
    InteractiveLambdaProcessor,
    LambdaLayer,
    LocalLambda,
    LocalLambdaProcessor,
    to_tokens,
)
from .linear_attention import GatedLinearAttention

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


# Both change their first argument, which must be nobody else's, unless a gradient needs it: to be given new memory by
# the system costs more time than the arithmetic.
def silu_of(hidden_states: torch.Tensor) -> torch.Tensor:
    return F.silu(hidden_states, inplace=not torch.is_grad_enabled())


def sum_of(hidden_states: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    if torch.is_grad_enabled() or hidden_states.dtype != other.dtype:  # autocast mixes types
        return hidden_states + other
    return hidden_states.add_(other)


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
        if isinstance(self.conv_pw, PointwiseConv2d):
            output = self.convolve_in_slices(hidden_states)
        else:
            output = F.relu(self.bn1(self.conv_dw(hidden_states)), inplace=True)
            output = self.bn2(self.conv_pw(output))
        return sum_of(output, hidden_states) if self.has_skip else output

    def convolve_in_slices(self, hidden_states: torch.Tensor, max_elements: int = 3 * 2**19) -> torch.Tensor:
        """Both convolutions, once folded: a slice of wide inputs after another, for the memory's sake."""
        batch, channels, height, width = hidden_states.shape
        count = max(1, -(-hidden_states.numel() // max_elements)) if hidden_states.device.type == "cpu" else 1
        count = min(count, channels)
        output = None
        for i in range(count):
            part = slice(channels * i // count, channels * (i + 1) // count)
            weight, bias = self.conv_dw.weight[part], self.conv_dw.bias[part]
            depthwise = F.conv2d(hidden_states[:, part], weight, bias, padding=1, groups=len(weight))
            depthwise = F.relu(depthwise, inplace=True).permute(0, 2, 3, 1).flatten(0, 2)
            weight = self.conv_pw.weight[:, part].t()
            if output is None:
                output = torch.addmm(self.conv_pw.bias, depthwise, weight)
            else:
                output.addmm_(depthwise, weight)
        return output.view(batch, height, width, -1).permute(0, 3, 1, 2)


def make_conv(conv_type: str, in_channels: int, out_channels: int) -> nn.Module:
    if conv_type == "separable":
        return SeparableConv2d(in_channels, out_channels)
    return nn.Conv2d(in_channels, out_channels, 3, padding=1)


class MoebiusResnetBlock2D(nn.Module):
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
        hidden_states = self.conv1(silu_of(self.norm1(hidden_states)))
        hidden_states = sum_of(hidden_states, self.time_emb_proj(F.silu(temb))[:, :, None, None])
        hidden_states = self.conv2(self.dropout(silu_of(self.norm2(hidden_states))))
        # The shortcut comes last, so that its output does not exist beside the widest tensors of the block.
        return sum_of(hidden_states, residual if self.conv_shortcut is None else self.conv_shortcut(residual))


class ConvLayer(nn.Module):
    """A convolution with an optional SiLU; the level of nesting is that of the published names."""

    def __init__(self, conv: nn.Conv2d, activation: bool):
        super().__init__()
        self.conv = conv
        self.activation = activation

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        hidden_states = self.conv(hidden_states)
        return silu_of(hidden_states) if self.activation else hidden_states


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
        return self.point_conv(hidden_states * silu_of(gate))


def to_grid(tokens: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return tokens.transpose(1, 2).reshape(like.shape)


class MoebiusTransformerBlock(nn.Module):
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
        # Asked by name and not by class: diffusers runs saved code anew at each load, which makes new classes.
        self.self_attention_type = self_attention_type
        self.cross_attention_type = cross_attention_type
        self.feed_forward_type = feed_forward_type
        self.norm1 = nn.LayerNorm(dim)
        if self_attention_type == "local_lambda":
            self.attn1 = LocalLambda(dim, num_heads, window_size)
        else:
            self.attn1 = GatedLinearAttention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim)
        if cross_attention_type == "interactive_lambda":
            self.attn2 = InteractiveLambda(dim, num_heads, cross_attention_dim, context_length, grid_size)
        else:
            self.attn2 = Attention(dim, cross_attention_dim, heads=num_heads, dim_head=dim // num_heads)
        self.norm3 = nn.LayerNorm(dim)
        self.ff = MixFeedForward(dim, mix_ffn_ratio) if feed_forward_type == "mix_ffn" else FeedForward(dim)

    @staticmethod
    def normalize(norm: nn.LayerNorm, hidden_states: torch.Tensor) -> torch.Tensor:
        return norm(hidden_states.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)  # over the channels of [B, C, H, W]

    def forward(self, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor) -> torch.Tensor:
        normed = self.normalize(self.norm1, hidden_states)
        if self.self_attention_type == "local_lambda":
            hidden_states = sum_of(self.attn1(normed), hidden_states)
        else:
            hidden_states = hidden_states + to_grid(self.attn1(to_tokens(normed)), hidden_states)

        normed = self.normalize(self.norm2, hidden_states)
        if self.cross_attention_type == "interactive_lambda":
            hidden_states = sum_of(self.attn2(normed, encoder_hidden_states), hidden_states)
        else:
            tokens = self.attn2(to_tokens(normed), encoder_hidden_states=encoder_hidden_states)
            hidden_states = hidden_states + to_grid(tokens, hidden_states)

        normed = self.normalize(self.norm3, hidden_states)
        if self.feed_forward_type == "mix_ffn":
            return sum_of(self.ff(normed), hidden_states)
        return hidden_states + to_grid(self.ff(to_tokens(normed)), hidden_states)


class MoebiusTransformer2DModel(nn.Module):
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
        return sum_of(self.proj_out(hidden_states), residual)


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


@contextmanager
def frozen_batch_statistics(module: nn.Module):
    """Keeps the running statistics of BatchNorm as they are while the batch's own statistics normalise."""
    layers = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
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


class MoebiusUNet2DModel(ModelMixin, AttentionMixin, ConfigMixin, PeftAdapterMixin):
    r"""
    The U-Net of Moebius that predicts the noise of inpainted latents (arXiv 2606.19195, section 3).

    The defaults are the published model. In half precision the softmaxes, the sinusoidal time embedding and the state
    of gated linear attention are computed in float32, and the BatchNorm layers keep float32 weights and statistics
    when the model is loaded with `dtype`.

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

    def to(self, *args, **kwargs):
        """As [`~ModelMixin.to`]; a `memory_format` applies to the convolutions, whatever the rank of other weights."""
        memory_format = kwargs.pop("memory_format", None)
        model = super().to(*args, **kwargs) if args or kwargs else self
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
        Folds every BatchNorm into the layer before it and moves the upsampling convolutions to the small grid.

        The function of the model stays the same but for rounding. It can no longer be trained or saved; to undo it,
        load the model again. LoRA adapters that have been fused become part of the weights.

        Raises:
            ValueError: If the model is in train mode, or LoRA adapters are active and not fused.
        """
        if self.is_fused:
            return
        if self.training:
            raise ValueError("In train mode BatchNorm follows the batch and cannot be folded: call `eval()` first.")
        remove_fused_adapters(self)
        for module in self.modules():
            if isinstance(module, SeparableConv2d):
                module.conv_dw, module.bn1 = fuse_conv_bn_eval(module.conv_dw, module.bn1), nn.Identity()
                module.conv_pw, module.bn2 = fuse_conv_bn_eval(module.conv_pw, module.bn2), nn.Identity()
            elif isinstance(module, LambdaLayer):
                module.to_q, module.norm_q = fuse_conv_bn_eval(module.to_q, module.norm_q), nn.Identity()
                fuse = fuse_conv_bn_eval if isinstance(module.to_v, nn.Conv2d) else fuse_linear_bn_eval
                module.to_v, module.norm_v = fuse(module.to_v, module.norm_v), nn.Identity()
            elif isinstance(module, MoebiusUpBlock2D) and module.upsamplers is not None:
                module.upsamplers[0] = SmallGridUpsample2D(module.upsamplers[0].conv)
            elif isinstance(module, MoebiusTransformerBlock) and isinstance(module.ff, MixFeedForward):
                module.ff = SlicedMixFeedForward(module.ff)
        for module in list(self.modules()):
            for name, child in module.named_children():
                if isinstance(child, nn.Conv2d) and child.kernel_size == (1, 1):
                    setattr(module, name, PointwiseConv2d(child))
        self.to(memory_format=torch.channels_last)
        self.is_fused = True
        self.requires_grad_(False)

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

    def check_inputs(self, sample: torch.Tensor, encoder_hidden_states: torch.Tensor) -> None:
        config = self.config
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
        expected = [sample.shape[0], config.context_length, config.encoder_hid_dim]
        if list(encoder_hidden_states.shape) != expected:
            raise ValueError(
                f"`encoder_hidden_states` must have the shape {expected}, but has {list(encoder_hidden_states.shape)}."
            )

    def project_tokens(self, tokens: torch.Tensor, cache: dict | None) -> torch.Tensor | CachedContext:
        is_cached = cache is not None and self.config.cross_attention_type == "interactive_lambda"
        if not is_cached or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return self.encoder_hid_proj(tokens)
        if self not in cache:
            cache[self] = self.encoder_hid_proj(tokens)
        return CachedContext(cache[self], cache)

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
        context_cache: dict | None = None,
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
            context_cache (`dict`, *optional*): Empty in the first step of a run and handed on from step to step, it
                spares later steps what depends on weights, tokens and size alone; none of these may change meanwhile.
                Not used where gradients are computed or the model is compiled.

        Returns:
            [`MoebiusUNet2DOutput`], or a tuple of the prediction and, if asked for, the tuple of block outputs.
        """
        self.check_inputs(sample, encoder_hidden_states)
        if self.is_fused:
            sample = sample.contiguous(memory_format=torch.channels_last)
        if not torch.is_tensor(timestep):
            timestep = torch.tensor([timestep], device=sample.device)
        timestep = timestep.reshape(-1).to(sample.device).expand(sample.shape[0])
        temb = self.time_embedding(self.time_proj(timestep).to(sample.dtype))
        encoder_hidden_states = self.project_tokens(encoder_hidden_states, context_cache)

        hidden_states = self.conv_in(sample)
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
        sample = self.conv_out(silu_of(self.conv_norm_out(hidden_states)))

        if not return_dict:
            return (sample, block_outputs) if output_hidden_states else (sample,)
        return MoebiusUNet2DOutput(sample=sample, hidden_states=block_outputs if output_hidden_states else None)
