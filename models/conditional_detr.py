"""Conditional DETR (arXiv 2108.06152; spec 6.2).

Shapes: B images, N tokens, Q queries, C channels, H heads, D channels a head, K classes, L decoder layers.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.backbone import Backbone
from models.detr import Detr
from models.encoder import Encoder
from models.layers import MLP, Dropout, boxes_around, collect_outputs, feed_forward, split_heads, start_at_anchors
from models.position_encoding import sine_embedding


class ProjectedAttention(nn.Module):
    """Multi-head attention whose queries, keys and values are projected already, and may come in several parts.

    The heads of the parts lie side by side, so that the logits of the parts add up: with two parts a head's queries
    and keys have 2 D channels and its values D.

    Args:
        embed_dim, num_heads: C and H.
        dropout: on the attention.
    """

    def __init__(self, embed_dim: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.dropout = dropout
        self.out_proj = nn.Linear(embed_dim, embed_dim)
        nn.init.zeros_(self.out_proj.bias)

    def forward(
        self, queries: tuple[Tensor, ...], keys: tuple[Tensor, ...], value: Tensor, pad_mask: Tensor | None = None
    ) -> Tensor:
        """Attend.

        Args:
            queries: each (B, Q, C).
            keys: as many, each (B, N, C).
            value: (B, N, C).
            pad_mask: (B, N) bool, True where a key is padding and must not count.

        Returns:
            (B, Q, C).
        """
        query, key, values = self._heads(*queries), self._heads(*keys), self._heads(value)
        width = values.shape[-1]
        # The kernels that store no map want values as wide as keys; the zeros cost less than a map.
        values = F.pad(values, (0, query.shape[-1] - width))
        mask = None if pad_mask is None else ~pad_mask[:, None, None]  # (B, 1, 1, N)
        attended = F.scaled_dot_product_attention(query, key, values, mask, self.dropout if self.training else 0.0)
        result: Tensor = self.out_proj(attended[..., :width].transpose(1, 2).flatten(2))
        return result

    def _heads(self, *parts: Tensor) -> Tensor:
        """Each (B, N, C) -> (B, H, N, parts * D)."""
        return torch.cat([split_heads(part, self.num_heads) for part in parts], -1)


class ConditionalDecoderLayer(nn.Module):
    """Self-attention among the queries, conditional attention to the image, feed-forward; a layer norm after each.

    Content and position have projections of their own; in the attention to the image their heads lie side by side.

    Args:
        embed_dim, num_heads, dim_feedforward: sizes.
        dropout: after attentions, inside and after the feed-forward block.
        attention_dropout: on the weights of both attentions.
        first: the first layer of the decoder, whose queries hold nothing yet: there position is added to content too.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dim_feedforward: int,
        dropout: float,
        attention_dropout: float,
        first: bool,
    ) -> None:
        super().__init__()
        self.sa_qcontent_proj = nn.Linear(embed_dim, embed_dim)
        self.sa_qpos_proj = nn.Linear(embed_dim, embed_dim)
        self.sa_kcontent_proj = nn.Linear(embed_dim, embed_dim)
        self.sa_kpos_proj = nn.Linear(embed_dim, embed_dim)
        self.sa_v_proj = nn.Linear(embed_dim, embed_dim)
        self.ca_qcontent_proj = nn.Linear(embed_dim, embed_dim)
        self.ca_kcontent_proj = nn.Linear(embed_dim, embed_dim)
        self.ca_kpos_proj = nn.Linear(embed_dim, embed_dim)
        self.ca_v_proj = nn.Linear(embed_dim, embed_dim)
        self.ca_qpos_sine_proj = nn.Linear(embed_dim, embed_dim)
        self.ca_qpos_proj = nn.Linear(embed_dim, embed_dim) if first else None
        self.self_attn = ProjectedAttention(embed_dim, num_heads, attention_dropout)
        self.cross_attn = ProjectedAttention(embed_dim, num_heads, attention_dropout)
        self.linear1 = nn.Linear(embed_dim, dim_feedforward)
        self.linear2 = nn.Linear(dim_feedforward, embed_dim)
        self.norm1 = nn.LayerNorm(embed_dim)
        self.norm2 = nn.LayerNorm(embed_dim)
        self.norm3 = nn.LayerNorm(embed_dim)
        self.dropout = Dropout(dropout)

    def forward(
        self,
        x: Tensor,
        query_pos: Tensor,
        query_sine: Tensor,
        memory: Tensor,
        position: Tensor,
        pad_mask: Tensor | None,
    ) -> Tensor:
        """Update the queries.

        Args:
            x: (B, Q, C) content of the queries.
            query_pos: (B, Q, C) learned embedding.
            query_sine: (B, Q, C) embedding of the reference points, scaled.
            memory, position: (B, N, C).
            pad_mask: (B, N) bool, True where padded, or None.

        Returns:
            (B, Q, C).
        """
        x = self.norm1(x + self.dropout(self._attend_to_queries(x, query_pos)))
        attended = self._attend_to_image(x, query_pos, query_sine, memory, position, pad_mask)
        x = self.norm2(x + self.dropout(attended))
        result: Tensor = self.norm3(x + self.dropout(feed_forward(x, self.linear1, self.linear2, self.dropout)))
        return result

    def _attend_to_queries(self, x: Tensor, query_pos: Tensor) -> Tensor:
        query = self.sa_qcontent_proj(x) + self.sa_qpos_proj(query_pos)
        key = self.sa_kcontent_proj(x) + self.sa_kpos_proj(query_pos)
        result: Tensor = self.self_attn((query,), (key,), self.sa_v_proj(x))
        return result

    def _attend_to_image(
        self,
        x: Tensor,
        query_pos: Tensor,
        query_sine: Tensor,
        memory: Tensor,
        position: Tensor,
        pad_mask: Tensor | None,
    ) -> Tensor:
        query, key = self.ca_qcontent_proj(x), self.ca_kcontent_proj(memory)
        key_pos = self.ca_kpos_proj(position)
        if self.ca_qpos_proj is not None:
            query, key = query + self.ca_qpos_proj(query_pos), key + key_pos
        queries, keys = (query, self.ca_qpos_sine_proj(query_sine)), (key, key_pos)
        result: Tensor = self.cross_attn(queries, keys, self.ca_v_proj(memory), pad_mask)
        return result


class ConditionalDecoder(nn.Module):
    """A stack of `ConditionalDecoderLayer` around fixed reference points; one layer norm for every layer's output."""

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
        self.layers = nn.ModuleList(
            ConditionalDecoderLayer(embed_dim, num_heads, dim_feedforward, dropout, attention_dropout, layer == 0)
            for layer in range(num_layers)
        )
        self.norm = nn.LayerNorm(embed_dim)
        self.query_scale = MLP(embed_dim, embed_dim, embed_dim)
        self.ref_point_head = MLP(embed_dim, embed_dim, 2)

    def forward(
        self, query_pos: Tensor, memory: Tensor, position: Tensor, pad_mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """query_pos (B, Q, C), the rest as in a layer -> states (L, B, Q, C), reference points (B, Q, 2) in [0, 1]."""
        points_xy = self.ref_point_head(query_pos).sigmoid()
        features = query_pos.shape[-1] // 2
        point_sine = torch.cat([sine_embedding(points_xy[..., axis], features) for axis in (1, 0)], dim=-1)
        x = torch.zeros_like(query_pos)
        outputs: list[Tensor] = []
        for layer in self.layers:
            query_sine = self.query_scale(x) * point_sine if outputs else point_sine
            x = layer(x, query_pos, query_sine, memory, position, pad_mask)
            outputs.append(self.norm(x))
        return torch.stack(outputs), points_xy


class ConditionalDetr(Detr):
    """Conditional DETR: boxes are offsets from each query's reference point, classes are scored one by one.

    Args:
        backbone, position_embedding, encoder, num_queries, embed_dim, aux_loss, options: as in `Detr`.
        decoder: (query_pos, memory, position, pad_mask) -> states of each layer, reference points.
        num_classes: K, the largest category id + 1; the logits are for a sigmoid, so that no class is "no object".
    """

    decoder: ConditionalDecoder

    def __init__(
        self,
        backbone: Backbone,
        position_embedding: nn.Module,
        encoder: Encoder,
        decoder: ConditionalDecoder,
        *,
        num_classes: int,
        num_queries: int = 300,
        embed_dim: int = 256,
        aux_loss: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(
            backbone,
            position_embedding,
            encoder,
            decoder,
            num_logits=num_classes,
            num_queries=num_queries,
            embed_dim=embed_dim,
            aux_loss=aux_loss,
            **options,
        )
        start_at_anchors(self.class_embed, self.bbox_embed)

    def forward(self, images: Tensor, pad_mask: Tensor) -> dict[str, Tensor | list[dict[str, Tensor]]]:
        """As `Detr`, with K logits for a sigmoid."""
        memory = self.encode(images, pad_mask)
        queries = self.query_embed.weight.expand(images.shape[0], -1, -1)
        states, points_xy = self.decoder(queries, *memory)
        boxes = boxes_around(points_xy, self.bbox_embed(states))
        return collect_outputs(self.class_embed(states), boxes, self.aux_loss)
