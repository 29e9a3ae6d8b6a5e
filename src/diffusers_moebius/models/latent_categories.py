"""The latent-categories-guidance (LCG) embedding: which kind of content the hole is to be filled with."""

from dataclasses import dataclass

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import BaseOutput
from torch import nn


@dataclass
class LatentCategoriesEmbedderOutput(BaseOutput):
    """
    The output of [`LatentCategoriesEmbedder`].

    Args:
        embeds (`torch.Tensor` of shape `[B, context_length, embedding_dim]`): The context tokens.
    """

    embeds: torch.Tensor


class LatentCategoriesEmbedder(ModelMixin, ConfigMixin):
    """
    Embeds latent category ids into the context tokens of the denoiser.

    The first half of the ids means *background*, the second half *foreground* (PixelHacker, arXiv 2504.20438, section
    3.2). At inference the background tokens are the conditional branch of the guidance and the foreground tokens the
    unconditional one.

    Args:
        num_embeddings (`int`, defaults to 20): Number of ids, half of them background. Must be even.
        embedding_dim (`int`, defaults to 3072): Width of a token.

    Raises:
        ValueError: If `num_embeddings` is not a positive even number or `embedding_dim` is not positive.
    """

    @register_to_config
    def __init__(self, num_embeddings: int = 20, embedding_dim: int = 3072):
        super().__init__()
        if num_embeddings < 2 or num_embeddings % 2:
            raise ValueError(f"`num_embeddings` must be a positive even number, but is {num_embeddings}.")
        if embedding_dim < 1:
            raise ValueError(f"`embedding_dim` must be positive, but is {embedding_dim}.")
        self.embedding_layer = nn.Embedding(num_embeddings, embedding_dim)

    @property
    def context_length(self) -> int:
        """Number of tokens of one category, 10 in the published models."""
        return self.config.num_embeddings // 2

    def category_ids(
        self, category: str, batch_size: int = 1, device: torch.device | str | None = None
    ) -> torch.LongTensor:
        """
        The ids of a category.

        Args:
            category (`str`): `"background"` or `"foreground"`.
            batch_size (`int`, defaults to 1): Number of rows.
            device (`torch.device`, *optional*): Where to put them, by default where the weights are. Offloaded weights
                may be on no real device.

        Returns:
            `torch.LongTensor` of shape `[batch_size, context_length]`.
        """
        if category not in ("background", "foreground"):
            raise ValueError(f'`category` must be "background" or "foreground", but is {category!r}.')
        first = 0 if category == "background" else self.context_length
        device = self.embedding_layer.weight.device if device is None else device
        ids = torch.arange(first, first + self.context_length, device=device)
        return ids.expand(batch_size, -1)

    def forward(
        self, input_ids: torch.LongTensor, return_dict: bool = True
    ) -> LatentCategoriesEmbedderOutput | tuple[torch.Tensor]:
        """
        Args:
            input_ids (`torch.LongTensor` of shape `[B, context_length]`): Category ids.
            return_dict (`bool`, defaults to `True`): Return a [`LatentCategoriesEmbedderOutput`] instead of a tuple.

        Returns:
            [`LatentCategoriesEmbedderOutput`], or a tuple of the embeddings.
        """
        embeds = self.embedding_layer(input_ids)
        return LatentCategoriesEmbedderOutput(embeds=embeds) if return_dict else (embeds,)
