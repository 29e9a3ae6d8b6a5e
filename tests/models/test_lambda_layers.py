import pytest
import torch
from numbers_of_models import randomize_statistics, relative_error

from diffusers_moebius.models.unet_2d_moebius import (
    FastLocalLambdaProcessor,
    InteractiveLambda,
    LocalLambda,
    LocalLambdaProcessor,
)


@pytest.mark.parametrize(("tile_width", "max_elements"), [(1, 1), (3, 1000), (16, 2**24), (64, 10)])
@pytest.mark.parametrize("window", [1, 7, 15])
def test_local_lambda_does_not_depend_on_tiling(tile_width, max_elements, window):
    torch.manual_seed(0)
    layer = randomize_statistics(LocalLambda(24, 3, window).eval())
    hidden_states = torch.randn(2, 24, 11, 37)
    with torch.no_grad():
        layer.set_processor(LocalLambdaProcessor())
        reference = layer(hidden_states)
        layer.set_processor(FastLocalLambdaProcessor(tile_width, max_elements))
        assert relative_error(layer(hidden_states), reference) < 1e-5


def test_an_exported_graph_is_small_and_the_same():
    """A group of rows is a part of the graph each, and the time of compilers grows faster than the graph."""
    torch.manual_seed(0)
    layer = randomize_statistics(LocalLambda(32, 4, 15).eval())
    hidden_states = torch.randn(2, 32, 64, 64)
    with torch.no_grad(), torch.profiler.profile() as profile:
        eager = layer(hidden_states)
    groups = sum(event.name == "aten::baddbmm" for event in profile.events())
    with torch.no_grad():
        graph = torch.export.export(layer, (hidden_states,))
    products = [node for node in graph.graph.nodes if node.target == torch.ops.aten.baddbmm.default]
    assert groups > 4 * len(products) > 0
    assert relative_error(graph.module()(hidden_states), eager) < 1e-5


def test_position_embeddings_are_exact_at_the_native_size_and_resampled_elsewhere():
    layer = InteractiveLambda(16, 4, 16, 10, grid_size=8)
    native = layer.position_embedding(8, 8)
    assert torch.equal(native, layer.rel_pos_emb.squeeze(-1))
    layer.rel_pos_emb.data.copy_(torch.arange(8.0).repeat(8)[:, None, None, None])  # the column's number
    wide = layer.position_embedding(8, 16)[:, 0, 0].view(8, 16)
    assert torch.allclose(wide[0, 1:-1], torch.arange(0.25, 7, 0.5)) and torch.equal(wide[0], wide[7])
