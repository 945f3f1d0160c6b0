"""Anchor DETR with row-column decoupled attention (arXiv 2109.07107; spec 6.3).

Shapes: B images, H x W cells of the feature map, S real cells of a batch, Q queries, C channels, K classes, L decoder
layers. Feature maps are (B, H, W, C). "Row" is what varies along a row (x), "column" along a column (y).
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from models.backbone import Backbone
from models.layers import (
    MLP,
    Dropout,
    boxes_around,
    collect_outputs,
    feature_pad_mask,
    feed_forward,
    run_layer,
    start_at_anchors,
)
from models.packing import Packing, TokenOrder, attend_packed, padding_of
from models.position_encoding import sine_embedding
from models.row_column import RowColumnAttention


class FeedForward(nn.Module):
    """Two linear layers with a residual and a layer norm after them."""

    def __init__(self, embed_dim: int, dim_feedforward: int, dropout: float) -> None:
        super().__init__()
        self.linear1 = nn.Linear(embed_dim, dim_feedforward)
        self.linear2 = nn.Linear(dim_feedforward, embed_dim)
        self.norm2 = nn.LayerNorm(embed_dim)
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., C)."""
        result: Tensor = self.norm2(x + self.dropout(feed_forward(x, self.linear1, self.linear2, self.dropout)))
        return result


class RowColumnEncoderLayer(nn.Module):
    """Row-column self-attention of a feature map, and feed-forward.

    Args:
        self_attn: called as `RowColumnAttention` is.
        embed_dim, dim_feedforward, dropout: sizes, and the rate after the attention and in the feed-forward block.
    """

    def __init__(self, self_attn: nn.Module, embed_dim: int, dim_feedforward: int, dropout: float) -> None:
        super().__init__()
        self.self_attn = self_attn
        self.norm1 = nn.LayerNorm(embed_dim)
        self.dropout = Dropout(dropout)
        self.ffn = FeedForward(embed_dim, dim_feedforward, dropout)

    def forward(self, x: Tensor, pos_row: Tensor, pos_col: Tensor, padding: Tensor | Packing) -> Tensor:
        """As `RowColumnEncoder`."""
        row, col = x + pos_row, x + pos_col
        if isinstance(padding, Packing):
            attended = attend_packed(self.self_attn, row, col, row, col, x, packing=padding)
        else:
            attended = self.self_attn(row, col, row, col, x, key_padding_mask=padding)
        result: Tensor = self.ffn(self.norm1(x + self.dropout(attended)))
        return result


class RowColumnEncoder(nn.Module):
    """A stack of `RowColumnEncoderLayer`, which start as copies of one another (spec 6.3).

    Args:
        make_self_attention: makes the self-attention.
        num_layers, embed_dim, dim_feedforward, dropout: of the layers.
        recompute: as in `Encoder`.
    """

    def __init__(
        self,
        make_self_attention: Callable[[], nn.Module],
        num_layers: int,
        embed_dim: int,
        dim_feedforward: int,
        dropout: float,
        recompute: bool = False,
    ) -> None:
        super().__init__()
        self.recompute = recompute
        layer = RowColumnEncoderLayer(make_self_attention(), embed_dim, dim_feedforward, dropout)
        self.layers = nn.ModuleList(deepcopy(layer) for _ in range(num_layers))

    def forward(self, x: Tensor, pos_row: Tensor, pos_col: Tensor, padding: Tensor | Packing) -> Tensor:
        """Encode.

        Args:
            x: (B, H, W, C); or (S, C), the real cells of all images one behind the other.
            pos_row, pos_col: (B, 1, W, C) and (B, H, 1, C); or (S, C).
            padding: the mask (B, H, W) bool, True where padded; or the `Packing` of the S cells.

        Returns:
            The shape of `x`.
        """
        for layer in self.layers:
            x = run_layer(layer, x, pos_row, pos_col, padding, recompute=self.recompute)
        return x


# Row keys, column keys and values, each (B, H, W, C).
MapTensors = tuple[Tensor, Tensor, Tensor]


class AnchorDecoderLayer(nn.Module):
    """Self-attention among the queries, row-column attention to the map, feed-forward.

    Args:
        embed_dim, num_heads, dim_feedforward: sizes.
        dropout: after attentions, and in the feed-forward block.
        attention_dropout: on the weights of both attentions.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dim_feedforward: int,
        dropout: float,
        attention_dropout: float,
    ) -> None:
        super().__init__()
        self.self_attn = nn.MultiheadAttention(embed_dim, num_heads, attention_dropout, batch_first=True)
        self.norm2 = nn.LayerNorm(embed_dim)
        self.cross_attn = RowColumnAttention(embed_dim, num_heads, attention_dropout)
        self.norm1 = nn.LayerNorm(embed_dim)
        self.ffn = FeedForward(embed_dim, dim_feedforward, dropout)
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor, query_pos: QueryPosition, memory: MapTensors, pad_mask: Tensor) -> Tensor:
        """Update the queries.

        Args:
            x: (B, Q, C).
            query_pos: embeddings of the anchor points, each (Q, C).
            memory: of the encoded map.
            pad_mask: (B, H, W) bool, True where padded.

        Returns:
            (B, Q, C).
        """
        located = x + query_pos.point
        x = self.norm2(x + self.dropout(self.self_attn(located, located, x, need_weights=False)[0]))
        attended = self.cross_attn(x + query_pos.row, x + query_pos.col, *memory, key_padding_mask=pad_mask)
        result: Tensor = self.ffn(self.norm1(x + self.dropout(attended)))
        return result


class AnchorDecoder(nn.Module):
    """A stack of `AnchorDecoderLayer`, which start as copies of one another; no norm after the last (spec 6.3)."""

    def __init__(
        self,
        num_layers: int,
        embed_dim: int,
        num_heads: int,
        dim_feedforward: int,
        dropout: float,
        attention_dropout: float,
    ) -> None:
        super().__init__()
        layer = AnchorDecoderLayer(embed_dim, num_heads, dim_feedforward, dropout, attention_dropout)
        self.layers = nn.ModuleList(deepcopy(layer) for _ in range(num_layers))

    def forward(self, x: Tensor, query_pos: QueryPosition, memory: MapTensors, pad_mask: Tensor) -> Tensor:
        """As a layer -> (L, B, Q, C)."""
        outputs = []
        for layer in self.layers:
            x = layer(x, query_pos, memory, pad_mask)
            outputs.append(x)
        return torch.stack(outputs)


class AnchorPoints(nn.Module):
    """The learned prior.

    Args:
        num_points: P.

    Attributes:
        weight: (P, 2), (x, y), which start uniform in [0, 1].
    """

    def __init__(self, num_points: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(num_points, 2))


class Lattice(nn.Module):
    """The grid prior: fixed points in place of a learned embedding of them.

    Args:
        num_points: how many are wanted; there are n x n, the square that comes nearest in n.

    Attributes:
        weight: (n * n, 2), (x, y) in [0, 1], each coordinate one of (i + 0.5) / n.
    """

    weight: Tensor

    def __init__(self, num_points: int) -> None:
        super().__init__()
        side = round(num_points**0.5)
        line = (torch.arange(side) + 0.5) / side
        self.register_buffer("weight", torch.cartesian_prod(line, line), persistent=False)


class QueryPosition(NamedTuple):
    """Embeddings of the anchor points, each (Q, C): of the point, of its x alone and of its y alone."""

    point: Tensor
    row: Tensor
    col: Tensor


class AnchorDetr(nn.Module):
    """Anchor DETR: a query is one of several patterns at an anchor point.

    Args:
        backbone: images -> features.
        encoder: (map, row position, column position, pad_mask) -> map, with dense or clustered self-attention.
        decoder: (states, query position, memory, pad_mask) -> states of each layer.
        num_classes: K, the largest category id + 1; the logits are for a sigmoid, so that no class is "no object".
        num_query_position: anchor points.
        num_query_pattern: queries at each point; query index = pattern * points + point.
        spatial_prior: "learned" points, which start uniform in the image, or a "grid", see `Lattice`.
        embed_dim: C.
        aux_loss: return the predictions of the earlier decoder layers too.
        skip_padding: let the encoder compute on real cells only, and leave zeros at the others. For a self-attention
            with a method `attend_packed` alone; that of the dense model runs over padding, as published.
        token_order: the order in which packed cells stand; see `Packing`.
    """

    def __init__(
        self,
        backbone: Backbone,
        encoder: RowColumnEncoder,
        decoder: AnchorDecoder,
        *,
        num_classes: int,
        num_query_position: int = 300,
        num_query_pattern: int = 3,
        spatial_prior: Literal["learned", "grid"] = "learned",
        embed_dim: int = 256,
        aux_loss: bool = True,
        skip_padding: bool = False,
        token_order: TokenOrder | None = None,
    ) -> None:
        super().__init__()
        self.aux_loss = aux_loss
        self.skip_padding = skip_padding
        self._packed_order = token_order
        self.backbone = backbone
        projection = nn.Conv2d(backbone.num_channels, embed_dim, kernel_size=1)
        nn.init.xavier_uniform_(projection.weight)
        nn.init.zeros_(projection.get_parameter("bias"))
        self.input_proj = nn.Sequential(projection, nn.GroupNorm(32, embed_dim))
        self.encoder = encoder
        self.decoder = decoder
        self.pattern = nn.Embedding(num_query_pattern, embed_dim)
        self.position = AnchorPoints(num_query_position) if spatial_prior == "learned" else Lattice(num_query_position)
        self.num_queries = num_query_pattern * len(self.position.weight)
        self.adapt_pos1d = adapter(embed_dim)
        self.adapt_pos2d = adapter(embed_dim)
        self.class_embed = nn.Linear(embed_dim, num_classes)
        self.bbox_embed = MLP(embed_dim, embed_dim, embed_dim, 4)
        start_at_anchors(self.class_embed, self.bbox_embed, log_size=-2.0)

    def forward(self, images: Tensor, pad_mask: Tensor) -> dict[str, Tensor | list[dict[str, Tensor]]]:
        """Detect.

        Args:
            images: float (B, 3, H, W), normalised, zero where padded.
            pad_mask: bool (B, H, W), True where padded; in host memory even for a GPU, as in `Detr`.

        Returns:
            "pred_logits" (B, Q, K), each for a sigmoid; "pred_boxes" (B, Q, 4) cxcywh in [0, 1] of the image without
            padding; and "aux_outputs", the same two for each earlier decoder layer.
        """
        features = self.backbone(images)
        cells = feature_pad_mask(pad_mask, features)
        pad_mask = cells.to(features.device, non_blocking=True)
        pos_row, pos_col = self._map_position(pad_mask)
        x = self._encode(self.input_proj(features).permute(0, 2, 3, 1), pos_row, pos_col, cells, pad_mask)
        points_xy, query_pos = self._query_position()
        contents = self.pattern.weight.repeat_interleave(len(self.position.weight), 0).expand(images.shape[0], -1, -1)
        states = self.decoder(contents, query_pos, (x + pos_row, x + pos_col, x), pad_mask)
        boxes = boxes_around(points_xy, self.bbox_embed(states))
        return collect_outputs(self.class_embed(states), boxes, self.aux_loss)

    def _encode(self, x: Tensor, pos_row: Tensor, pos_col: Tensor, cells: Tensor, pad_mask: Tensor) -> Tensor:
        """Map x (B, H, W, C), positions as in the encoder, the mask (B, H, W) as it came and on the device."""
        encoded: Tensor
        if not self.skip_padding:
            encoded = self.encoder(x, pos_row, pos_col, pad_mask)
            return encoded
        padding = padding_of(cells, x.device, self._packed_order)
        if isinstance(padding, Packing):
            packed = (padding.pack(tokens.expand_as(x).flatten(1, 2)) for tokens in (x, pos_row, pos_col))
            return padding.to_map(self.encoder(*packed, padding), x.shape[1] * x.shape[2]).view_as(x)
        encoded = self.encoder(x, pos_row, pos_col, pad_mask)
        return encoded.masked_fill(pad_mask.unsqueeze(-1), 0)

    def _map_position(self, pad_mask: Tensor) -> tuple[Tensor, Tensor]:
        """pad_mask (B, H, W) -> embeddings of x (B, 1, W, C) and of y (B, H, 1, C)."""
        x, y = (relative_position(line) for line in (pad_mask[:, 0], pad_mask[:, :, 0]))
        return self._embed(x).unsqueeze(1), self._embed(y).unsqueeze(2)

    def _query_position(self) -> tuple[Tensor, QueryPosition]:
        """The point of each query (Q, 2), (x, y) in [0, 1], and its embeddings."""
        points_xy = self.position.weight
        x, y = points_xy.unbind(-1)
        features = self.pattern.embedding_dim // 2
        point = self.adapt_pos2d(torch.cat([sine_embedding(axis, features) for axis in (y, x)], dim=-1))
        embeddings = (point, self._embed(x), self._embed(y))
        copies = (self.pattern.num_embeddings, 1)
        return points_xy.repeat(copies), QueryPosition(*(embedding.repeat(copies) for embedding in embeddings))

    def _embed(self, coordinate: Tensor) -> Tensor:
        """(...) in [0, 1] -> (..., C)."""
        result: Tensor = self.adapt_pos1d(sine_embedding(coordinate, self.pattern.embedding_dim))
        return result


def adapter(embed_dim: int) -> nn.Sequential:
    """What turns sines and cosines into a position embedding."""
    return nn.Sequential(nn.Linear(embed_dim, embed_dim), nn.ReLU(), nn.Linear(embed_dim, embed_dim))


def relative_position(pad_mask: Tensor) -> Tensor:
    """Centres of the cells of a line, relative to its part without padding: pad_mask (B, N) -> (B, N)."""
    count = (~pad_mask).float().cumsum(1)
    return (count - 0.5) / count[:, -1:]
