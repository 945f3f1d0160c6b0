"""DETR (arXiv 2005.12872; spec 6.1).

Shapes: B images, N tokens, Q queries, C channels, K classes, L decoder layers.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.backbone import Backbone
from models.encoder import Encoder
from models.layers import MLP, Dropout, collect_outputs, feature_pad_mask, feed_forward, xavier_matrices
from models.packing import Packing, TokenOrder, padding_of


class DecoderLayer(nn.Module):
    """Self-attention among the queries, attention to the image, feed-forward; a layer norm after each.

    Args:
        embed_dim, num_heads, dim_feedforward: sizes.
        dropout: after attentions, inside and after the feed-forward block.
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
        self.multihead_attn = nn.MultiheadAttention(embed_dim, num_heads, attention_dropout, batch_first=True)
        self.linear1 = nn.Linear(embed_dim, dim_feedforward)
        self.linear2 = nn.Linear(dim_feedforward, embed_dim)
        self.norm1 = nn.LayerNorm(embed_dim)
        self.norm2 = nn.LayerNorm(embed_dim)
        self.norm3 = nn.LayerNorm(embed_dim)
        self.dropout = Dropout(dropout)

    def forward(
        self, x: Tensor, query_pos: Tensor, memory: Tensor, position: Tensor, pad_mask: Tensor | None
    ) -> Tensor:
        """x, query_pos (B, Q, C); memory, position (B, N, C); pad_mask (B, N) bool or None -> (B, Q, C)."""
        located = x + query_pos
        attended = self.self_attn(located, located, x, need_weights=False)[0]
        x = self.norm1(x + self.dropout(attended))
        attended = self.multihead_attn(
            x + query_pos, memory + position, memory, key_padding_mask=pad_mask, need_weights=False
        )[0]
        x = self.norm2(x + self.dropout(attended))
        result: Tensor = self.norm3(x + self.dropout(feed_forward(x, self.linear1, self.linear2, self.dropout)))
        return result


class Decoder(nn.Module):
    """A stack of `DecoderLayer`; one layer norm for the output of every layer."""

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
            DecoderLayer(embed_dim, num_heads, dim_feedforward, dropout, attention_dropout) for _ in range(num_layers)
        )
        self.norm = nn.LayerNorm(embed_dim)

    def forward(self, query_pos: Tensor, memory: Tensor, position: Tensor, pad_mask: Tensor | None) -> Tensor:
        """query_pos (B, Q, C), the rest as in `DecoderLayer` -> (L, B, Q, C)."""
        x, outputs = torch.zeros_like(query_pos), []
        for layer in self.layers:
            x = layer(x, query_pos, memory, position, pad_mask)
            outputs.append(self.norm(x))
        return torch.stack(outputs)


class Detr(nn.Module):
    """DETR.

    Args:
        backbone: images -> features.
        position_embedding: pad_mask (B, h, w) -> (B, h, w, C).
        encoder: (tokens, position, pad_mask) -> memory, with dense or clustered self-attention.
        decoder: (query_pos, memory, position, pad_mask) -> states of each layer.
        num_logits: K, the largest category id + 2; the last class is "no object".
        num_queries: Q, the most objects that an image can have.
        embed_dim: C.
        aux_loss: return the predictions of the earlier decoder layers too.
        skip_padding: let the encoder compute on real tokens only, where the mask is in host memory and nothing is
            compiled. False feeds it the padded map, as published, which changes the result only where the encoder's
            attention does not mask padding ("official" ENACT).
        token_order: (h, w, device) -> (h * w,) int64, the order in which the encoder gets the cells; None: row by row.
            It matters to attention that clusters neighbours.
    """

    def __init__(
        self,
        backbone: Backbone,
        position_embedding: nn.Module,
        encoder: Encoder,
        decoder: nn.Module,
        *,
        num_logits: int,
        num_queries: int = 100,
        embed_dim: int = 256,
        aux_loss: bool = True,
        skip_padding: bool = True,
        token_order: TokenOrder | None = None,
    ) -> None:
        super().__init__()
        self.num_queries = num_queries
        self.aux_loss = aux_loss
        self.skip_padding = skip_padding
        self.token_order = token_order
        self.backbone = backbone
        self.position_embedding = position_embedding
        self.input_proj = nn.Conv2d(backbone.num_channels, embed_dim, kernel_size=1)
        self.encoder = encoder
        self.decoder = decoder
        self.query_embed = nn.Embedding(num_queries, embed_dim)
        self.class_embed = nn.Linear(embed_dim, num_logits)
        self.bbox_embed = MLP(embed_dim, embed_dim, embed_dim, 4)
        xavier_matrices(self.encoder, self.decoder)

    def forward(self, images: Tensor, pad_mask: Tensor) -> dict[str, Tensor | list[dict[str, Tensor]]]:
        """Detect.

        Args:
            images: float (B, 3, H, W), normalised, zero where padded.
            pad_mask: bool (B, H, W), True where padded; in host memory even for a GPU, so that what follows from it
                (how many tokens are real) is known without waiting.

        Returns:
            "pred_logits" (B, Q, K), "pred_boxes" (B, Q, 4) cxcywh in [0, 1] of the image without padding, and
            "aux_outputs", the same two for each earlier decoder layer.
        """
        memory = self.encode(images, pad_mask)
        queries = self.query_embed.weight.expand(images.shape[0], -1, -1)
        states = self.decoder(queries, *memory)
        return collect_outputs(self.class_embed(states), self.bbox_embed(states).sigmoid(), self.aux_loss)

    def encode(self, images: Tensor, pad_mask: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Images and pad_mask as in `forward` -> memory (B, N, C), its position (B, N, C), its mask (B, N) or None."""
        features = self.backbone(images)
        cells = feature_pad_mask(pad_mask, features)
        padding = padding_of(cells, features.device, self.token_order, skip=self.skip_padding)
        position = self.position_embedding(cells.to(features.device, non_blocking=True)).flatten(1, 2)
        tokens = self.input_proj(features).flatten(2).transpose(1, 2)
        if isinstance(padding, Packing):
            tokens, position = padding.pack(tokens), padding.pack(position)
            memory = self.encoder(tokens, position, padding)
            return padding.unpack(memory), padding.unpack(position), padding.pad_mask()
        if self.token_order is not None:
            height, width = cells.shape[1:]
            order = self.token_order(height, width, features.device).argsort()
            tokens, position = tokens[:, order], position[:, order]
            padding = None if padding is None else padding[:, order]
        return self.encoder(tokens, position, padding), position, padding
