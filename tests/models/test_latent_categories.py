import pytest
import torch

from diffusers_moebius.models.latent_categories import LatentCategoriesEmbedder


def test_gives_an_output_or_a_tuple(tiny_lcg_embedder):
    ids = tiny_lcg_embedder.category_ids("foreground", batch_size=2)
    embeds = tiny_lcg_embedder(ids).embeds
    assert embeds.shape == (2, 10, 24)
    assert torch.equal(embeds[0], tiny_lcg_embedder.embedding_layer.weight[10:])
    (same,) = tiny_lcg_embedder(ids, return_dict=False)
    assert torch.equal(same, embeds)


def test_categories_share_no_id(tiny_lcg_embedder):
    background, foreground = (
        tiny_lcg_embedder.category_ids(name)[0].tolist() for name in ("background", "foreground")
    )
    assert background == list(range(10)) and foreground == list(range(10, 20))
    with pytest.raises(ValueError, match="`category`"):
        tiny_lcg_embedder.category_ids("sky")


@pytest.mark.parametrize(("arguments", "name"), [((3, 8), "num_embeddings"), ((2, 0), "embedding_dim")])
def test_wrong_sizes_are_named(arguments, name):
    with pytest.raises(ValueError, match=f"`{name}`"):
        LatentCategoriesEmbedder(*arguments)
