"""Products of float32 matrices, for networks and for comparing patches."""

import torch
import torch.nn.functional as F

# There is no public name for it; where it is missing, PyTorch's own product does.
_linear_by_onednn = (
    getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None
)


def linear(tokens: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """
    `F.linear`, on a CPU by oneDNN, to which PyTorch leaves convolutions but not float32 products.

    Those go to MKL, which on AMD's processors does without AVX-512 and takes twice as long there.
    """
    by_onednn = (
        _linear_by_onednn is not None
        and tokens.device.type == "cpu"
        and tokens.dtype == weight.dtype == torch.float32
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
    )
    if not by_onednn:
        return F.linear(tokens, weight, bias)
    return _linear_by_onednn(tokens, weight.contiguous(), bias, "none", [], "")  # strided: 1000 x
