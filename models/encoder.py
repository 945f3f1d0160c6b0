"""The transformer encoder of DETR and Conditional DETR; its self-attention is given to it.

Shapes: B batch, N tokens, S real tokens of a batch, C channels.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from models.layers import Dropout, feed_forward, run_layer
from models.packing import Packing, Padding, attend_packed

# Of a module called as nn.MultiheadAttention: (query, key, value, key_padding_mask=, need_weights=) -> (result, ...).
MakeSelfAttention = Callable[[], nn.Module]


class EncoderLayer(nn.Module):
    """Self-attention and a feed-forward block, each with a residual and a layer norm after it.

    Args:
        self_attn: called as `nn.MultiheadAttention(batch_first=True)` is.
        embed_dim: C.
        dim_feedforward: width of the feed-forward block.
        dropout: after the attention, inside and after the feed-forward block.
    """

    def __init__(self, self_attn: nn.Module, embed_dim: int, dim_feedforward: int, dropout: float) -> None:
        super().__init__()
        self.self_attn = self_attn
        self.linear1 = nn.Linear(embed_dim, dim_feedforward)
        self.linear2 = nn.Linear(dim_feedforward, embed_dim)
        self.norm1 = nn.LayerNorm(embed_dim)
        self.norm2 = nn.LayerNorm(embed_dim)
        self.dropout = Dropout(dropout)

    def forward(self, tokens: Tensor, position: Tensor, padding: Padding) -> Tensor:
        """As `Encoder`."""
        tokens = self.norm1(tokens + self.dropout(self._attend(tokens, position, padding)))
        transformed = feed_forward(tokens, self.linear1, self.linear2, self.dropout)
        result: Tensor = self.norm2(tokens + self.dropout(transformed))
        return result

    def _attend(self, tokens: Tensor, position: Tensor, padding: Padding) -> Tensor:
        if isinstance(padding, Packing):
            packed: Tensor = attend_packed(self.self_attn, tokens, tokens, tokens, position=position, packing=padding)
            return packed
        located = tokens + position
        attended: Tensor = self.self_attn(located, located, tokens, key_padding_mask=padding, need_weights=False)[0]
        return attended


class Encoder(nn.Module):
    """A stack of `EncoderLayer`.

    Args:
        make_self_attention: called once a layer.
        num_layers, embed_dim, dim_feedforward, dropout: of the layers.
        recompute: keep the input of each layer alone for backward, which computes the rest once more.
    """

    def __init__(
        self,
        make_self_attention: MakeSelfAttention,
        num_layers: int,
        embed_dim: int,
        dim_feedforward: int,
        dropout: float,
        recompute: bool = False,
    ) -> None:
        super().__init__()
        self.recompute = recompute
        self.layers = nn.ModuleList(
            EncoderLayer(make_self_attention(), embed_dim, dim_feedforward, dropout) for _ in range(num_layers)
        )

    def forward(self, tokens: Tensor, position: Tensor, padding: Padding) -> Tensor:
        """Encode.

        Args:
            tokens, position: (B, N, C); or (S, C), the real tokens of all images one behind the other.
            padding: the mask (B, N) bool, True where padded, or None for no padding; or the `Packing` of S tokens.

        Returns:
            The shape of `tokens`.
        """
        for layer in self.layers:
            tokens = run_layer(layer, tokens, position, padding, recompute=self.recompute)
        return tokens
