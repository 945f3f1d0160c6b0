"""Anchor DETR's row-column decoupled attention to a feature map (arXiv 2109.07107; spec 6.3).

Shapes: B images, H x W cells of the feature map, Q queries, C channels, h heads, D channels a head. Feature maps are
(B, H, W, C). "Row" is what varies along a row (x), "column" along a column (y).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.layers import split_heads


class RowColumnAttention(nn.Module):
    """Attention to a feature map as the product of one distribution over its columns and one over its rows.

        A_row[q, x] = softmax_x(q_row . mean_y k_row[y, x])      A_col[q, y] = softmax_y(q_col . mean_x k_col[y, x])
        result[q] = sum_{y, x} A_col[q, y] A_row[q, x] v[y, x]

    Args:
        embed_dim, num_heads: C and h.
        dropout: on both distributions.

    Source: spec 6.3. The means run over padding too, as published; the distributions do not.
    """

    def __init__(self, embed_dim: int, num_heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.dropout = dropout
        self.in_proj_weight = nn.Parameter(torch.empty(5 * embed_dim, embed_dim))  # q_row, q_col, k_row, k_col, v
        self.in_proj_bias = nn.Parameter(torch.zeros(5 * embed_dim))
        self.out_proj = nn.Linear(embed_dim, embed_dim)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(
        self,
        query_row: Tensor,
        query_col: Tensor,
        key_row: Tensor,
        key_col: Tensor,
        value: Tensor,
        key_padding_mask: Tensor,
    ) -> Tensor:
        """Attend.

        Args:
            query_row, query_col: (B, ..., C), a list of queries or a map of them.
            key_row, key_col, value: (B, H, W, C).
            key_padding_mask: (B, H, W) bool, True where padded; the padding is on the right and at the bottom.

        Returns:
            The shape of `query_row`.
        """
        queries = (query.flatten(1, -2) for query in (query_row, query_col))
        q_row, q_col, k_row, k_col, v = self._project(*queries, key_row.mean(1), key_col.mean(2), value)
        over_x = self._distribution(q_row, k_row, key_padding_mask[:, 0])  # (B, h, Q, W)
        over_y = self._distribution(q_col, k_col, key_padding_mask[:, :, 0])  # (B, h, Q, H)
        attended = sum_over_map(over_y, over_x, v).transpose(1, 2).flatten(2)  # (B, Q, C)
        result: Tensor = self.out_proj(attended).view_as(query_row)
        return result

    def _project(self, *inputs: Tensor) -> list[Tensor]:
        """Each (B, ..., C) through its slice of the packed projection -> (B, h, ..., D)."""
        slices = zip(inputs, self.in_proj_weight.chunk(5), self.in_proj_bias.chunk(5), strict=True)
        return [
            split_heads(F.linear(tokens, weight, bias), self.num_heads)
            for tokens, weight, bias in slices
        ]

    def _distribution(self, query: Tensor, key: Tensor, pad_mask: Tensor) -> Tensor:
        """Query (B, h, Q, D), key (B, h, N, D), pad_mask (B, N) -> (B, h, Q, N)."""
        logits = query * query.shape[-1] ** -0.5 @ key.transpose(2, 3)
        weights = logits.masked_fill(pad_mask[:, None, None], float("-inf")).softmax(-1)
        return F.dropout(weights, self.dropout, self.training)


def sum_over_map(over_y: Tensor, over_x: Tensor, value: Tensor) -> Tensor:
    """Sum a map with separable weights, the longer side first, so that the (Q, H or W, D) between is the smaller one.

    Compiled or exported, rows go first whatever the shape.

    Args:
        over_y: (B, h, Q, H).
        over_x: (B, h, Q, W).
        value: (B, h, H, W, D).

    Returns:
        (B, h, Q, D).
    """
    height, width, channels = value.shape[-3:]
    if not torch.compiler.is_compiling() and height < width:  # one graph serves both shapes of image
        over_y, over_x, value = over_x, over_y, value.transpose(2, 3)
        height, width = width, height
    rows = (over_y @ value.flatten(3)).view(*over_y.shape[:3], width, channels)
    result: Tensor = over_x.unsqueeze(-2) @ rows  # (B, h, Q, 1, D)
    return result.squeeze(-2)
