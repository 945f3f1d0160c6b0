"""Multi-head attention over clusters of keys and values.

Shapes: B batch, L queries, N keys, T clusters, C channels, H heads, D channels a head.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from enact.clustering import Clusters, cluster_keys, sign_change_regions, uniform_chunks
from enact.information import Information

Variant = Literal["paper", "official"]


class EnactAttention(nn.MultiheadAttention):
    """`nn.MultiheadAttention` whose keys and values are pooled into clusters of similar information first.

    Every query attends to T clusters instead of N keys. The constructor, the call and the parameters are those of
    `nn.MultiheadAttention`, plus `information.probability`, one linear layer from a key to a logit.

    Args:
        embed_dim, num_heads, dropout, bias, batch_first, device, dtype: as in `nn.MultiheadAttention`.
        smoothing_sigma: standard deviation, in tokens, of the Gaussian that smooths the information.
        variant: "paper": each image's runs of one curvature sign over its real tokens, then ordinary scaled
            attention with dropout. "official": the released code's arithmetic (spec 2.2 to 2.6): one chunk length for
            the batch, padding not masked, logits unscaled, the result divided by D, no attention dropout.

    Source: arXiv 2409.07541; `variant` is explained in the README's table of deviations.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        *,
        batch_first: bool = False,
        smoothing_sigma: float = 3.0,
        variant: Variant = "paper",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if variant not in get_args(Variant):
            raise ValueError(f"variant must be one of {', '.join(get_args(Variant))}, got {variant!r}")
        super().__init__(embed_dim, num_heads, dropout, bias, batch_first=batch_first, device=device, dtype=dtype)
        self.variant = variant
        self.cluster = sign_change_regions if variant == "paper" else uniform_chunks
        self.information = Information(embed_dim, smoothing_sigma, device=device, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw new parameters: DETR's initialisation (spec 6.1), or the released code's (spec 3.3, item 21)."""
        self._reset_parameters()
        nn.init.xavier_uniform_(self.out_proj.weight)
        nn.init.xavier_uniform_(self.information.probability.weight)
        if self.variant == "official":
            for projection in self.in_proj_weight.chunk(3):
                nn.init.xavier_uniform_(projection)
            for bias in (self.in_proj_bias, self.out_proj.bias):
                if bias is not None:
                    nn.init.uniform_(bias, -(self.embed_dim**-0.5), self.embed_dim**-0.5)
        else:
            nn.init.zeros_(self.information.probability.bias)

    def clusters(self, key: Tensor, key_padding_mask: Tensor | None = None) -> Clusters:
        """The clusters of `key` (B, N, C); `key_padding_mask` (B, N) bool, True where padded."""
        mask = None if self.variant == "official" else key_padding_mask
        return cluster_keys(key, mask, self.information, self.cluster)

    def forward(  # type: ignore[override]
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend to the clusters of `key` and `value`.

        Args:
            query: (B, L, C), or (L, B, C) without `batch_first`.
            key, value: (B, N, C), or (N, B, C).
            key_padding_mask: (B, N) bool, True where a key is padding and must not count.
            need_weights: also return the attention of each query to each key: its cluster's, times the key's
                weight in the cluster. This stores the whole map; the result itself does not.
            attn_mask, is_causal: not supported, since a cluster holds many keys.
            average_attn_weights: average the map over the heads.

        Returns:
            The result in the shape of `query`, and the map (B, L, N), (B, H, L, N) or None.
        """
        if attn_mask is not None or is_causal:
            raise ValueError("EnactAttention pools keys into clusters, so it cannot take attn_mask or is_causal")
        if not self.batch_first:
            query, key, value = (tensor.transpose(0, 1) for tensor in (query, key, value))
        clusters = self.clusters(key, key_padding_mask)
        heads = self._project(query, clusters.pool(key), clusters.pool(value))
        mask = clusters.pad_mask()[:, None, None] if key_padding_mask is not None or len(query) > 1 else None
        weights = self._token_weights(heads, mask, clusters) if need_weights else None
        result = self.out_proj(self._attend(heads, mask))
        if weights is not None and average_attn_weights:
            weights = weights.mean(1)
        return (result if self.batch_first else result.transpose(0, 1)), weights

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> Heads:
        weights = self.in_proj_weight.chunk(3)
        biases: Any = (None, None, None) if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        projected = (
            split_heads(F.linear(tokens, weight, bias), self.num_heads)
            for tokens, weight, bias in zip((query, key, value), weights, biases, strict=True)
        )
        return Heads(*projected)

    def _attend(self, heads: Heads, mask: Tensor | None) -> Tensor:
        """Heads -> (B, L, C); mask (B, 1, 1, T) True where there is no cluster."""
        if self.variant == "official":
            attended: Tensor = F.scaled_dot_product_attention(*heads, scale=1.0) / self.head_dim
        else:
            dropout = self.dropout if self.training else 0.0
            attended = F.scaled_dot_product_attention(*heads, None if mask is None else ~mask, dropout)
        return attended.transpose(1, 2).flatten(2)

    def _token_weights(self, heads: Heads, mask: Tensor | None, clusters: Clusters) -> Tensor:
        """(B, H, L, N): the attention to each token's cluster times the token's weight in it."""
        official = self.variant == "official"
        logits = heads.query @ heads.key.transpose(2, 3) * (1.0 if official else self.head_dim**-0.5)
        if mask is not None:
            logits = logits.masked_fill(mask, float("-inf"))
        attention = logits.softmax(-1) / (self.head_dim if official else 1.0)  # (B, H, L, T)
        attention = F.pad(attention, (0, 1))  # the slot of tokens that belong to no cluster
        index = clusters.index[:, None, None].expand(-1, *attention.shape[1:3], -1)
        weights: Tensor = attention.gather(3, index) * clusters.weight[:, None, None]
        return weights


def split_heads(tokens: Tensor, num_heads: int) -> Tensor:
    """(B, ..., H * D) -> (B, H, ..., D)."""
    heads: Tensor = tokens.view(*tokens.shape[:-1], num_heads, -1)
    return heads.movedim(-2, 1)


class Heads(NamedTuple):
    """Projected query (B, H, L, D), key (B, H, T, D) and value (B, H, T, D)."""

    query: Tensor
    key: Tensor
    value: Tensor
