"""The PixelHacker denoiser (arXiv 2504.20438), teacher of Moebius: Stable Diffusion with gated linear attention."""

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.attention import AttentionMixin, BasicTransformerBlock
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.unets.unet_2d_blocks import (
    CrossAttnDownBlock2D,
    CrossAttnUpBlock2D,
    DownBlock2D,
    UNetMidBlock2DCrossAttn,
    UpBlock2D,
)
from diffusers.utils import apply_lora_scale
from torch import nn

from .linear_attention import GatedLinearAttention
from .unet_2d_moebius import MoebiusUNet2DOutput, embed_inputs


class RasterGatedLinearAttention(GatedLinearAttention):
    """[`GatedLinearAttention`] in the place of a diffusers self-attention, which is called with masks and options."""

    def forward(self, hidden_states: torch.Tensor, encoder_hidden_states=None, attention_mask=None) -> torch.Tensor:
        if encoder_hidden_states is not None or attention_mask is not None:
            raise ValueError("`attention_mask` and `encoder_hidden_states` have no meaning for causal self-attention.")
        return super().forward(hidden_states)


class PixelHackerUNet2DModel(ModelMixin, AttentionMixin, ConfigMixin, PeftAdapterMixin):
    r"""
    The U-Net of PixelHacker (arXiv 2504.20438): Stable Diffusion 1.5 with gated linear self-attention.

    The defaults are the published model. It takes the place of [`MoebiusUNet2DModel`] in [`MoebiusInpaintPipeline`].
    Sinusoidal time embedding and attention states are computed in float32.

    Args:
        sample_size (`int`, defaults to 64): Native side of the latents. Any other runs too; nothing is resampled.
        in_channels (`int`, defaults to 9): Channels of the input: noisy latents (4), mask (1), masked-image
            latents (4).
        out_channels (`int`, defaults to 4): Channels of the prediction.
        block_out_channels (`tuple[int, ...]`, defaults to `(320, 640, 1280, 1280)`): Width of each level; the last has
            no attention.
        layers_per_block (`int`, defaults to 2): Residual blocks in a down block; an up block has one more.
        num_attention_heads (`int`, defaults to 8): Heads at every level.
        cross_attention_dim (`int`, defaults to 768): Width to which the context tokens are projected.
        encoder_hid_dim (`int`, defaults to 3072): Width of the context tokens as given.
        norm_num_groups (`int`, defaults to 32): Groups of the group normalisations.
        norm_eps (`float`, defaults to 1e-5): Epsilon of the group normalisations outside of the transformers.
        dropout (`float`, defaults to 0.0): Dropout in the residual blocks.

    Raises:
        ValueError: If there are fewer than two levels or the groups do not divide a width.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["BasicTransformerBlock", "ResnetBlock2D"]
    _repeated_blocks = ["BasicTransformerBlock"]
    _skip_layerwise_casting_patterns = ["norm", "time_embedding"]

    @register_to_config
    def __init__(
        self,
        sample_size: int = 64,
        in_channels: int = 9,
        out_channels: int = 4,
        block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280),
        layers_per_block: int = 2,
        num_attention_heads: int = 8,
        cross_attention_dim: int = 768,
        encoder_hid_dim: int = 3072,
        norm_num_groups: int = 32,
        norm_eps: float = 1e-5,
        dropout: float = 0.0,
    ):
        super().__init__()
        if len(block_out_channels) < 2:
            raise ValueError(f"`block_out_channels` must name at least two widths, but is {block_out_channels}.")
        for width in block_out_channels:
            if width % norm_num_groups:
                raise ValueError(f"`norm_num_groups` must divide every width, but is {norm_num_groups} for {width}.")

        time_embed_dim = 4 * block_out_channels[0]
        self.time_proj = Timesteps(block_out_channels[0], flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embedding = TimestepEmbedding(block_out_channels[0], time_embed_dim)
        self.encoder_hid_proj = nn.Linear(encoder_hid_dim, cross_attention_dim)
        self.conv_in = nn.Conv2d(in_channels, block_out_channels[0], 3, padding=1)

        plain = {
            "temb_channels": time_embed_dim,
            "dropout": dropout,
            "resnet_eps": norm_eps,
            "resnet_groups": norm_num_groups,
        }
        attentive = {
            **plain,
            "num_attention_heads": num_attention_heads,
            "cross_attention_dim": cross_attention_dim,
        }
        last = len(block_out_channels) - 1
        self.down_blocks = nn.ModuleList()
        channels = block_out_channels[0]
        for level, width in enumerate(block_out_channels):
            sizes = {"in_channels": channels, "out_channels": width, "num_layers": layers_per_block}
            if level < last:
                self.down_blocks.append(CrossAttnDownBlock2D(**sizes, **attentive))
            else:
                self.down_blocks.append(DownBlock2D(**sizes, **plain, add_downsample=False))
            channels = width
        self.mid_block = UNetMidBlock2DCrossAttn(channels, **attentive)
        self.up_blocks = nn.ModuleList()
        for level in reversed(range(len(block_out_channels))):
            sizes = {
                "in_channels": block_out_channels[max(level - 1, 0)],
                "prev_output_channel": channels,
                "out_channels": block_out_channels[level],
                "num_layers": layers_per_block + 1,
                "add_upsample": level > 0,
            }
            if level == last:
                self.up_blocks.append(UpBlock2D(**sizes, **plain))
            else:
                self.up_blocks.append(CrossAttnUpBlock2D(**sizes, **attentive))
            channels = block_out_channels[level]
        for module in self.modules():
            if isinstance(module, BasicTransformerBlock):
                module.attn1 = RasterGatedLinearAttention(module.dim, num_attention_heads)

        self.conv_norm_out = nn.GroupNorm(norm_num_groups, block_out_channels[0], eps=norm_eps)
        self.conv_act = nn.SiLU()
        self.conv_out = nn.Conv2d(block_out_channels[0], out_channels, 3, padding=1)

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
                and W multiples of 8 (of 2 to the number of levels less one).
            timestep (`torch.Tensor`, `float` or `int`): One for all, or one for each sample of the batch.
            encoder_hidden_states (`torch.Tensor` of shape `[B, tokens, encoder_hid_dim]`): LCG tokens.
            return_dict (`bool`, defaults to `True`): Return a [`MoebiusUNet2DOutput`] instead of a tuple.
            output_hidden_states (`bool`, defaults to `False`): Also return the output of every block: down, mid, up.
            attention_kwargs (`dict`, *optional*): `{"scale": s}` sets the weight of the active LoRA adapters.

        Returns:
            [`MoebiusUNet2DOutput`], or a tuple of the prediction and, if asked for, the tuple of block outputs.
        """
        temb, encoder_hidden_states = embed_inputs(self, sample, timestep, encoder_hidden_states)
        hidden_states = self.conv_in(sample)
        skips = (hidden_states,)
        block_outputs = ()
        for block in self.down_blocks:
            context = {"encoder_hidden_states": encoder_hidden_states} if hasattr(block, "attentions") else {}
            hidden_states, block_skips = block(hidden_states, temb, **context)
            skips += block_skips
            block_outputs += (hidden_states,)
        hidden_states = self.mid_block(hidden_states, temb, encoder_hidden_states=encoder_hidden_states)
        block_outputs += (hidden_states,)
        for block in self.up_blocks:
            count = len(block.resnets)
            skips, block_skips = skips[:-count], skips[-count:]
            context = {"encoder_hidden_states": encoder_hidden_states} if hasattr(block, "attentions") else {}
            hidden_states = block(hidden_states, block_skips, temb, **context)
            block_outputs += (hidden_states,)
        sample = self.conv_out(self.conv_act(self.conv_norm_out(hidden_states)))

        if not return_dict:
            return (sample, block_outputs) if output_hidden_states else (sample,)
        return MoebiusUNet2DOutput(sample=sample, hidden_states=block_outputs if output_hidden_states else None)
