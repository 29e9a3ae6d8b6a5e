import pytest
import torch

from diffusers_moebius.linear import linear


@pytest.mark.parametrize("gradients", [False, True])
def test_products_with_slices_of_weights(gradients):
    torch.manual_seed(0)
    tokens, weight, bias = torch.randn(2, 5, 3, 8), torch.randn(7, 24), torch.randn(7)
    with torch.set_grad_enabled(gradients):
        for part in (slice(0, 8), slice(8, 16)):
            assert torch.allclose(linear(tokens, weight[:, part], bias), tokens @ weight[:, part].T + bias, atol=1e-5)
        assert torch.allclose(linear(tokens[:, 1:-1], weight[:, :8]), tokens[:, 1:-1] @ weight[:, :8].T, atol=1e-5)
        assert linear(tokens.bfloat16(), weight[:, :8].bfloat16()).dtype == torch.bfloat16
