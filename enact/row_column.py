"""Row-column decoupled attention over clusters of keys and values, for Anchor DETR's encoder.

Shapes: B batch, H x W cells, N = H * W of them in raster order, T clusters, C channels, h heads, D channels a head.
"Row" is what varies along a row (x), "column" what varies along a column (y).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from enact.attention import split_heads
from enact.clustering import Clusters
from enact.information import Information
from enact.kernels import biased_attention, one_kernel, packed_attention
from enact.method import Variant, cluster_keys, method_of
from enact.order import TokenOrder
from enact.packing import cluster_packed

# Which fifth of the packed projection serves the row query, column query, row key, column key and value. The
# released code hands the pooled keys to the fifths that Anchor DETR trains for queries (spec 3.1, item 8).
SLICES = {"paper": (0, 1, 2, 3, 4), "official": (2, 3, 0, 1, 4), "plus": (0, 1, 2, 3, 4)}


class EnactRowColumnAttention(nn.Module):
    """Row-column attention of a feature map to clusters of its own cells.

    Anchor DETR's attention is the product of a distribution over columns, from row queries and keys, and one over
    rows, from column queries and keys. Over clusters, which are neither, both run over the same T clusters, and the
    weights of a query are their product, normalised:

        weight[t] = softmax_t(q_row . k_row[t] + q_col . k_col[t])  is proportional to
                    softmax_t(q_row . k_row[t]) * softmax_t(q_col . k_col[t])

    which is one fused attention with row and column queries, and row and column keys, side by side: neither variant
    stores an H x W x T map. The parameters are those of Anchor DETR's attention, and `information.probability`.

    Args:
        embed_dim, num_heads: C and h.
        dropout: on the weights, in training. (Anchor DETR has it on both factors; the published rate is 0.)
        smoothing_sigma: standard deviation, in tokens, of the Gaussian that smooths the information.
        variant: "paper": each image's runs of one curvature sign, over its real cells in raster order; the weights
            above, which sum to 1; every cell asks with its own queries, as in Anchor DETR itself, so that its weights
            carry over and padding has no mean to leak into. It departs from the released code in all of this, and
            from Anchor DETR in that keys are those of the clusters, not means over a column and over a row.
            "official": what the released code computes for each image alone on its canvas (spec 2.6). Chunks of one
            length, padding counted; row queries averaged over y and column queries over x, padding included; the
            product left unnormalised, so that the weights of a query sum to about 1/T at the start; queries and keys
            in each other's slice of the packed projection. It departs in what a larger batch gets: no image's rows go
            to another (spec 3.1, item 1), and each image has its own chunk length.
            "plus": as "paper", with soft boundaries, and tokens and clusters that weigh by their learned probability.
        token_order: the order in which cells form the sequence that is cut; None: row by row.
        choices: as in `EnactAttention`.

    Source: arXiv 2409.07541; spec 2.6; `variant` is explained in the README's table of deviations.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        *,
        smoothing_sigma: float = 5.0,
        variant: Variant = "paper",
        token_order: TokenOrder | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **choices: Any,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = embed_dim // num_heads
        self.dropout = dropout
        self.variant = variant
        if variant == "official" and choices.get("regions") is None:
            choices["regions"] = "image_chunks"
        self.method = method_of(variant, **choices)
        self.token_order = token_order
        self.information = Information(embed_dim, smoothing_sigma, device=device, dtype=dtype)
        self.in_proj_weight = nn.Parameter(torch.empty(5 * embed_dim, embed_dim, device=device, dtype=dtype))
        self.in_proj_bias = nn.Parameter(torch.empty(5 * embed_dim, device=device, dtype=dtype))
        self.out_proj = nn.Linear(embed_dim, embed_dim, device=device, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw new parameters, as Anchor DETR does (spec 6.3)."""
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.in_proj_bias)
        self.out_proj.reset_parameters()
        nn.init.zeros_(self.out_proj.bias)
        self.information.probability.reset_parameters()
        with torch.no_grad():
            self.information.probability.weight.mul_(self.method.initial_gain)

    def clusters(self, key_row: Tensor, key_padding_mask: Tensor | None = None) -> Clusters:
        """The clusters of the cells: `key_row` (B, H, W, C); `key_padding_mask` (B, H, W) bool, True where padded."""
        if key_padding_mask is not None:
            key_padding_mask = None if self.variant == "official" else key_padding_mask.flatten(1)
        height, width = key_row.shape[1:3]
        place = None if self.token_order is None else self.token_order(height, width, key_row.device)
        return cluster_keys(key_row.flatten(1, 2), key_padding_mask, self.information, self.method, place)

    def forward(
        self,
        query_row: Tensor,
        query_col: Tensor,
        key_row: Tensor,
        key_col: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
    ) -> Tensor:
        """Attend to the clusters of a map.

        Args:
            query_row, query_col, key_row, key_col, value: (B, H, W, C).
            key_padding_mask: (B, H, W) bool, True where a cell is padding; "official" counts those too.

        Returns:
            (B, H, W, C).
        """
        clusters = self.clusters(key_row, key_padding_mask)
        pooled = (clusters.pool(tensor.flatten(1, 2)) for tensor in (key_row, key_col, value))
        if self.variant == "official":
            query_row, query_col = query_row.mean(1, keepdim=True), query_col.mean(2, keepdim=True)
        heads = self._project(query_row, query_col, *pooled)
        attended = self._attend(heads, clusters.bias)  # (B, h, N, D)
        result: Tensor = self.out_proj(attended.transpose(1, 2).flatten(2))
        return result.view_as(value)

    def attend_packed(
        self,
        query_row: Tensor,
        query_col: Tensor,
        key_row: Tensor,
        key_col: Tensor,
        value: Tensor,
        lengths: Sequence[int],
        slots: Tensor,
    ) -> Tensor:
        """As `forward` for the real cells alone of images that stand one behind the other, in the order to be cut.

        Args:
            query_row, query_col, key_row, key_col, value: (S, C), S the sum of the lengths.
            lengths, slots: as in `EnactAttention.attend_packed`.

        Returns:
            (S, C).
        """
        if self.variant == "official":
            raise ValueError("ENACT official averages queries over rows and columns, so it needs the whole map")
        weights, biases = self.in_proj_weight.chunk(5), self.in_proj_bias.chunk(5)

        def heads_of(tokens: Tensor, fifth: int) -> Tensor:
            return F.linear(tokens, weights[fifth], biases[fifth]).view(len(tokens), self.num_heads, -1)

        query = torch.cat([heads_of(query_row, 0), heads_of(query_col, 1)], -1)  # (S, h, 2 D)
        dropout = self.dropout if self.training else 0.0
        tight = one_kernel(query, dropout)
        clusters = cluster_packed(key_row, lengths, slots, self.information, self.method, tight=tight)
        key = torch.cat([heads_of(clusters.pool(key_row), 2), heads_of(clusters.pool(key_col), 3)], -1)
        heads, scale = (query, key, heads_of(clusters.pool(value), 4)), self.head_dim**-0.5
        return packed_attention(
            heads, clusters.bias, lengths, clusters.counts, clusters.starts, self.out_proj, dropout, scale
        )

    def _project(self, *inputs: Tensor) -> Heads:
        weights, biases = self.in_proj_weight.chunk(5), self.in_proj_bias.chunk(5)
        return Heads(*(
            split_heads(F.linear(tokens, weights[fifth], biases[fifth]), self.num_heads)
            for tokens, fifth in zip(inputs, SLICES[self.variant], strict=True)
        ))

    def _attend(self, heads: Heads, bias: Tensor | None) -> Tensor:
        """Heads -> (B, h, N, D); bias (B, T) of the clusters, or None."""
        height, width = heads.query_col.shape[2], heads.query_row.shape[3]
        queries = (query.expand(-1, -1, height, width, -1) for query in (heads.query_row, heads.query_col))
        query = torch.cat(tuple(queries), -1).flatten(2, 3)  # (B, h, N, 2 D)
        key = torch.cat((heads.key_row, heads.key_col), -1)  # (B, h, T, 2 D)
        attended = self._softmax(query, key, heads.value, bias)
        return attended * self._mass(heads, bias) if self.variant == "official" else attended

    def _softmax(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
        dropout = self.dropout if self.training else 0.0
        return biased_attention(query, key, value, bias, dropout, self.head_dim**-0.5)

    def _mass(self, heads: Heads, bias: Tensor | None) -> Tensor:
        """What the product of the two distributions sums to for each cell, (B, h, N, 1); arguments as `_attend`."""
        over_row = self._distribution(heads.query_row, heads.key_row, bias)  # (B, h, W, T)
        over_col = self._distribution(heads.query_col, heads.key_col, bias)  # (B, h, H, T)
        mass: Tensor = over_col @ over_row.transpose(2, 3)  # (B, h, H, W)
        return mass.flatten(2).unsqueeze(-1)

    def _distribution(self, query: Tensor, key: Tensor, bias: Tensor | None) -> Tensor:
        logits: Tensor = query.flatten(2, 3) @ key.transpose(2, 3) * self.head_dim**-0.5
        return (logits if bias is None else logits + bias[:, None, None].to(logits.dtype)).softmax(-1)


class Heads(NamedTuple):
    """Projected queries (B, h, H, W, D), where H or W may be 1; keys and value (B, h, T, D)."""

    query_row: Tensor
    query_col: Tensor
    key_row: Tensor
    key_col: Tensor
    value: Tensor
