"""Inference only: layers that take the place of others in a model, the same functions in less time or memory."""

import sys

import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from ..linear import linear
from .unet_2d_moebius import LambdaLayer, MixFeedForward, MoebiusBlock, MoebiusUpsample2D, SeparableConv2d


# Both write into their first argument: to be given new memory by the system costs more time than the arithmetic.
def silu_(hidden_states: torch.Tensor) -> torch.Tensor:
    return F.silu(hidden_states, inplace=True)


def add_(hidden_states: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    if hidden_states.dtype != other.dtype:  # autocast and float32 residuals: the result has the wider type
        return hidden_states + other
    return hidden_states.add_(other)


def slices(size: int, count: int) -> list[slice]:
    """Cuts `size` channels into at most `count` parts of about the same width."""
    count = max(1, min(size, count))
    return [slice(size * i // count, size * (i + 1) // count) for i in range(count)]


class PointwiseConv2d(nn.Linear):
    """
    A 1x1 convolution as a matrix product, without a copy where the input is channels last in memory.

    Args:
        conv (`torch.nn.Conv2d`): The 1x1 convolution that it replaces.
    """

    def __init__(self, conv: nn.Conv2d):
        super().__init__(conv.in_channels, conv.out_channels, device="meta")
        self.weight = nn.Parameter(conv.weight.detach().flatten(1))
        self.bias = conv.bias

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return linear(hidden_states.permute(0, 2, 3, 1), self.weight, self.bias).permute(0, 3, 1, 2)


# The next three own the weights that they cut up, so that offloading, which follows calls, has them in place.
class FusedSeparableConv2d(nn.Module):
    """
    A separable convolution without its BatchNorm layers, a slice of wide inputs after another.

    Args:
        layer (`SeparableConv2d`): The layer that it replaces.
        max_elements (`int`, defaults to 3 * 2**19): Size up to which a slice may grow on the CPU.
    """

    def __init__(self, layer: SeparableConv2d, max_elements: int = 3 * 2**19):
        super().__init__()
        self.has_skip = layer.has_skip
        self.max_elements = max_elements
        depthwise = fuse_conv_bn_eval(layer.conv_dw, layer.bn1)
        pointwise = fuse_conv_bn_eval(layer.conv_pw, layer.bn2)
        self.depthwise_weight, self.depthwise_bias = depthwise.weight, depthwise.bias
        self.weight, self.bias = nn.Parameter(pointwise.weight.detach().flatten(1)), pointwise.bias

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        channels = hidden_states.shape[1]
        count = -(-hidden_states.numel() // self.max_elements) if hidden_states.device.type == "cpu" else 1
        output = None
        for part in slices(channels, count):
            weight, bias = self.depthwise_weight[part], self.depthwise_bias[part]
            depthwise = F.conv2d(hidden_states[:, part], weight, bias, padding=1, groups=len(weight))
            depthwise = F.relu(depthwise, inplace=True).permute(0, 2, 3, 1)
            product = linear(depthwise, self.weight[:, part], self.bias if output is None else None)
            output = product if output is None else output.add_(product)
        output = output.permute(0, 3, 1, 2)
        return add_(output, hidden_states) if self.has_skip else output


class SlicedMixFeedForward(nn.Module):
    """
    The Mix-FFN a slice of its hidden channels after another, so that the widest tensors of the model never exist.

    Args:
        layer (`MixFeedForward`): The layer that it replaces.
        max_elements (`int`, *optional*): Size up to which a slice may grow. By default 2**21 on the CPU, where it then
            stays in the cache and in memory that the allocator keeps, and 2**28 elsewhere.
    """

    def __init__(self, layer: MixFeedForward, max_elements: int | None = None):
        super().__init__()
        self.max_elements = max_elements
        inverted, depth = layer.inverted_conv.conv, layer.depth_conv.conv
        for name, value in (
            ("inverted_weight", inverted.weight.flatten(1)),
            ("inverted_bias", inverted.bias),
            ("depth_weight", depth.weight),
            ("depth_bias", depth.bias),
        ):
            self.register_parameter(name, nn.Parameter(value.detach().unflatten(0, (2, -1))))  # value, then gate
        self.weight = nn.Parameter(layer.point_conv.conv.weight.detach().flatten(1))

    def expand(self, tokens: torch.Tensor, half: int, part: slice) -> torch.Tensor:
        hidden_states = linear(tokens, self.inverted_weight[half, part], self.inverted_bias[half, part])
        hidden_states = silu_(hidden_states).permute(0, 3, 1, 2)
        weight, bias = self.depth_weight[half, part], self.depth_bias[half, part]
        return F.conv2d(hidden_states, weight, bias, padding=1, groups=len(weight)).permute(0, 2, 3, 1)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        tokens = hidden_states.permute(0, 2, 3, 1)  # [B, H, W, C]
        hidden = self.weight.shape[1]
        max_elements = self.max_elements or (2**21 if tokens.device.type == "cpu" else 2**28)
        output = None
        for part in slices(hidden, -(-hidden * tokens[..., 0].numel() // max_elements)):
            gate = silu_(self.expand(tokens, 1, part))
            product = linear(gate.mul_(self.expand(tokens, 0, part)), self.weight[:, part])
            output = product if output is None else output.add_(product)
        return output.permute(0, 3, 1, 2)


class SmallGridUpsample2D(nn.Module):
    """
    Nearest-neighbour enlargement by 2 and a 3x3 convolution, as nine matrix products on the small grid.

    Along one axis a filter `(a, b, c)` sees two copies of a position `x[i]` and one of its neighbours. With the sum
    `s = a + b + c` the two outputs are `s x[i] + a (x[i - 1] - x[i])` and `s x[i] + c (x[i + 1] - x[i])`: three
    products. Along both axes there are nine of them for each channel and small position; the enlarged grid needs 36.

    Args:
        layer (`MoebiusUpsample2D` or `Upsample2D`): The layer that it replaces.
        max_elements (`int`, defaults to 2**20): On the CPU, size of the bands of rows that it works on one by one.
    """

    def __init__(self, layer: MoebiusUpsample2D | Upsample2D, max_elements: int = 2**20):
        super().__init__()
        self.max_elements = max_elements
        weight = layer.conv.weight.detach()
        # What multiplies x[i] - x[i - 1], x[i] and x[i + 1] - x[i].
        terms = torch.tensor([[-1.0, 0, 0], [1, 1, 1], [0, 0, 1]], device=weight.device)
        self.weight = nn.Parameter(torch.einsum("ur,vc,oirc->uvoi", terms, terms, weight.float()).to(weight))
        self.bias = layer.conv.bias

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        tokens = hidden_states.permute(0, 2, 3, 1)  # [B, H, W, C]
        batch, height, width, _ = tokens.shape
        count = -(-tokens.numel() // self.max_elements) if tokens.device.type == "cpu" else 1
        output = tokens.new_empty(batch, height, 2, width, 2, self.weight.shape[2])
        for part in slices(height, count):
            above, below = max(part.start - 1, 0), min(part.stop + 1, height)
            edges = (0, 0, 0, 0, above - part.start + 1, part.stop + 1 - below)
            self.enlarge(F.pad(tokens[:, above:below], edges), output[:, part])
        return output.view(batch, 2 * height, 2 * width, -1).permute(0, 3, 1, 2)

    def enlarge(self, tokens: torch.Tensor, output: torch.Tensor) -> None:
        """Writes a band of rows, given with one more on either side `[B, H + 2, W, C]`, to `[B, H, 2, W, 2, out]`."""
        height, width = output.shape[1], output.shape[3]
        rows, tokens = tokens.diff(dim=1), tokens[:, 1:-1]
        columns = F.pad(tokens, (0, 0, 1, 1)).diff(dim=2)
        corners = F.pad(rows, (0, 0, 1, 1)).diff(dim=2)
        center = linear(tokens, self.weight[1, 1], self.bias)
        across = []
        for x in (0, 1):
            horizontal = linear(columns, self.weight[1, 2 * x])  # [B, H, W + 1, out]
            across.append(center + horizontal[:, :, x : x + width])
        for y in (0, 1):
            vertical = linear(rows, self.weight[2 * y, 1])[:, y : y + height]
            for x in (0, 1):
                diagonal = linear(corners, self.weight[2 * y, 2 * x])[:, y : y + height, x : x + width]
                output[:, :, y, :, x] = (vertical + diagonal).add_(across[x])


class FusedResnetBlock2D(nn.Module):
    """
    A residual block of an autoencoder that works in place.

    Args:
        layer (`ResnetBlock2D`): The block that it replaces: without time embedding, as those of [`AutoencoderKL`] are.
    """

    def __init__(self, layer: ResnetBlock2D):
        super().__init__()
        self.norm1, self.conv1, self.norm2, self.conv2 = layer.norm1, layer.conv1, layer.norm2, layer.conv2
        self.conv_shortcut = layer.conv_shortcut

    def forward(self, hidden_states: torch.Tensor, temb: None = None) -> torch.Tensor:
        output = self.conv2(silu_(self.norm2(self.conv1(silu_(self.norm1(hidden_states))))))
        return add_(output, hidden_states if self.conv_shortcut is None else self.conv_shortcut(hidden_states))


def adapter_layers(model: nn.Module | None) -> dict[str, nn.Module]:
    """The layers of a model (if there is one) that peft has put in the place of others, by name."""
    tuners = sys.modules.get("peft.tuners.tuners_utils")
    if model is None or tuners is None:  # without peft in memory no layer can be one of its own
        return {}
    return {name: module for name, module in model.named_modules() if isinstance(module, tuners.BaseTunerLayer)}


def check_adapters_fused(model: nn.Module) -> None:
    """Raises a `ValueError` if LoRA adapters act that have not been fused into their layers."""
    for name, layer in adapter_layers(model).items():
        acts = any(layer.scaling.get(adapter) for adapter in layer.active_adapters)
        if acts and not layer.disable_adapters and not layer.merged:
            raise ValueError(
                f"LoRA adapters are active on `{name}` and not fused: call `fuse_lora()` or `unload_lora_weights()`"
                " first."
            )


def remove_fused_adapters(model: nn.Module) -> None:
    """Puts the layers themselves in the place of LoRA layers that have been fused into them."""
    check_adapters_fused(model)
    for name, layer in adapter_layers(model).items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer.get_base_layer())
    if hasattr(model, "peft_config"):
        model.unload_lora()


REPLACEMENTS = {
    SeparableConv2d: FusedSeparableConv2d,
    MixFeedForward: SlicedMixFeedForward,
    MoebiusUpsample2D: SmallGridUpsample2D,
}


def fuse_for_inference(unet: nn.Module) -> None:
    """Folds every BatchNorm and puts the faster layers in place: see [`MoebiusUNet2DModel.fuse_for_inference`]."""
    if unet.is_fused:
        return
    if unet.training:
        raise ValueError("In train mode BatchNorm follows the batch and cannot be folded: call `eval()` first.")
    if getattr(unet, "hf_quantizer", None) is not None:
        raise ValueError("Quantized weights cannot be folded or cut up: load the model without `quantization_config`.")
    remove_fused_adapters(unet)
    for parent in list(unet.modules()):
        if isinstance(parent, MoebiusBlock):
            parent.silu, parent.add = silu_, add_
        if isinstance(parent, LambdaLayer):
            parent.to_q, parent.norm_q = fuse_conv_bn_eval(parent.to_q, parent.norm_q), nn.Identity()
            fuse = fuse_conv_bn_eval if isinstance(parent.to_v, nn.Conv2d) else fuse_linear_bn_eval
            parent.to_v, parent.norm_v = fuse(parent.to_v, parent.norm_v), nn.Identity()
        for name, layer in parent.named_children():
            if type(layer) in REPLACEMENTS:
                setattr(parent, name, REPLACEMENTS[type(layer)](layer))
            elif isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1):
                setattr(parent, name, PointwiseConv2d(layer))
    unet.requires_grad_(False)
    unet.is_fused = True


def refuse_to_save(*args, **kwargs) -> None:
    raise ValueError("This autoencoder has been fused for inference and cannot be saved; load it again to save it.")


def fuse_autoencoder(vae: nn.Module) -> None:
    """
    Puts faster layers in the place of those of an [`AutoencoderKL`]; other autoencoders stay as they are.

    Its function stays the same but for rounding. It can no longer be saved.
    """
    if not isinstance(vae, AutoencoderKL):
        return
    for parent in list(vae.modules()):
        for name, layer in parent.named_children():
            if type(layer) is ResnetBlock2D:
                setattr(parent, name, FusedResnetBlock2D(layer))
            elif type(layer) is Upsample2D:
                setattr(parent, name, SmallGridUpsample2D(layer))
    for half in (vae.encoder, vae.decoder):
        half.conv_in.to(memory_format=torch.channels_last)
    vae.save_pretrained = refuse_to_save
