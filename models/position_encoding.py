"""Position embeddings of feature-map cells and of points.

Shapes: B images, h x w cells, C channels.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def sine_embedding(position: Tensor, num_features: int, temperature: float = 10000.0) -> Tensor:
    """Sines and cosines of a coordinate at falling frequencies (spec 6.0).

    Args:
        position: (...) in [0, 1].
        num_features: even; feature i has frequency temperature ** -(2 (i // 2) / num_features), even i sine, odd
            cosine.

    Returns:
        (..., num_features) float32.
    """
    exponent = torch.arange(0, num_features, 2, device=position.device, dtype=torch.float32) / num_features
    angle = position.float().unsqueeze(-1) * (2 * math.pi) / temperature**exponent
    return torch.stack((angle.sin(), angle.cos()), dim=-1).flatten(-2)


class SinePositionEmbedding(nn.Module):
    """DETR's fixed embedding: half of the channels from y, half from x, each relative to the image without padding."""

    def __init__(self, embed_dim: int) -> None:
        super().__init__()
        self.features_per_axis = embed_dim // 2

    def forward(self, pad_mask: Tensor) -> Tensor:
        """pad_mask (B, h, w) bool, True where padded -> (B, h, w, C)."""
        real = (~pad_mask).float()
        y, x = real.cumsum(1), real.cumsum(2)
        y = y / (y[:, -1:] + 1e-6)
        x = x / (x[:, :, -1:] + 1e-6)
        return torch.cat([sine_embedding(axis, self.features_per_axis) for axis in (y, x)], dim=-1)


class LearnedPositionEmbedding(nn.Module):
    """DETR's learned embedding: one vector a column, one a row, for maps of up to 50 x 50 cells (spec 6.0)."""

    def __init__(self, embed_dim: int, max_cells: int = 50) -> None:
        super().__init__()
        self.row_embed = nn.Embedding(max_cells, embed_dim // 2)
        self.col_embed = nn.Embedding(max_cells, embed_dim // 2)
        nn.init.uniform_(self.row_embed.weight)
        nn.init.uniform_(self.col_embed.weight)

    def forward(self, pad_mask: Tensor) -> Tensor:
        """pad_mask (B, h, w) bool -> (B, h, w, C), x first; the mask gives only the shape."""
        batch, height, width = pad_mask.shape
        limit = self.row_embed.num_embeddings
        if max(height, width) > limit:
            raise ValueError(f"a learned position embedding holds {limit} cells a side, the map has {height} x {width}")
        x = self.col_embed.weight[:width].expand(batch, height, -1, -1)
        y = self.row_embed.weight[:height].unsqueeze(1).expand(batch, -1, width, -1)
        return torch.cat((x, y), dim=-1)


def build_position_embedding(kind: str, embed_dim: int) -> nn.Module:
    """`kind` "sine" or "learned"."""
    return SinePositionEmbedding(embed_dim) if kind == "sine" else LearnedPositionEmbedding(embed_dim)
