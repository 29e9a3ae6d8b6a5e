"""How much arithmetic a model needs, counted without doing it."""

from collections.abc import Callable

import torch
from torch.utils.flop_counter import FlopCounterMode


def _in_place_product(_, a_shape, b_shape, *args, out_shape=None, **kwargs) -> int:
    return 2 * a_shape[0] * a_shape[1] * b_shape[1]


def count_multiply_adds(function: Callable, *shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> int:
    """
    Counts the multiply-adds of convolutions and matrix products in one call.

    Args:
        function (`Callable`): A model, or a method of one, with its weights on the meta device, where shapes are
            worked out and nothing is computed.
        shapes (`tuple[int, ...]`): The shapes of its arguments.
        dtype (`torch.dtype`, defaults to `torch.float32`): Their type, which must be that of the weights.

    Returns:
        `int`: Multiply-adds; the paper calls their number FLOPs.
    """
    tensors = [torch.empty(shape, device="meta", dtype=dtype) for shape in shapes]
    with (
        torch.no_grad(),
        FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: _in_place_product}) as counter,
    ):
        function(*tensors)
    return counter.get_total_flops() // 2
