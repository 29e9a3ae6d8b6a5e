import pytest
import torch
from numbers_of_models import relative_error

from diffusers_moebius.models.fused_layers import SmallGridUpsample2D
from diffusers_moebius.models.unet_2d_moebius import MoebiusUpsample2D


@pytest.mark.parametrize("size", [(1, 1), (5, 8), (16, 3)])
def test_upsampling_on_the_small_grid_is_exact(size):
    torch.manual_seed(0)
    layer = MoebiusUpsample2D(6)
    hidden_states = torch.randn(2, 6, *size)
    with torch.no_grad():
        assert relative_error(SmallGridUpsample2D(layer.conv)(hidden_states), layer(hidden_states)) < 1e-5
