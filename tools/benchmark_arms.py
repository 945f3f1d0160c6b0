"""The encoders that are compared, and the published ones among them in plain form.

The published encoders compute on the padded map and store every attention map, as DETR, Anchor DETR and the released
ENACT do. They take the weights of our own, so that both give the same result for real tokens.

Shapes: B images, N tokens of the padded map, H x W = N cells, T clusters, C channels, h heads, D channels a head.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import is_fake

from configs.schema import Config, EnactVariant
from enact.information import PROBABILITY_FLOOR, gaussian_taps
from models import attention_dropout, build_model_from

# The length of a chunk where tokens have no values to tell it: what random ones give (spec 2.7).
TYPICAL_CHUNK = 6


class Arm(NamedTuple):
    """An encoder: a variant of ENACT, or None for dense; and whether as published."""

    enact: EnactVariant | None
    published: bool


ARMS = {
    "naive": Arm(None, published=True),
    "dense": Arm(None, published=False),
    "official": Arm("official", published=True),
    "paper": Arm("paper", published=False),
    "plus": Arm("plus", published=False),
}


def build_arm(config: Config, arm: str) -> nn.Module:
    """The detector of a config with the encoder of an arm, with new weights (a random backbone).

    Args:
        config: of a row; whether it says dense or ENACT must be what the arm is.
        arm: one of `ARMS`.
    """
    enact, published = ARMS[arm]
    model = build_model_from(replace(config, enact=enact, backbone_weights=None))
    if published:
        use_published_encoder(model, config)
    return model


def use_published_encoder(model: nn.Module, config: Config) -> None:
    """Give a detector of ours the published encoder, with the weights that its own has."""
    anchor, clustered = config.model == "anchor_detr", config.enact is not None
    attentions: tuple[type[nn.Module], type[nn.Module]]
    attentions = (MapAttention, ClusteredMapAttention) if anchor else (Attention, ClusteredAttention)
    make_layer = MapEncoderLayer if anchor else EncoderLayer
    encoder = PublishedEncoder(make_layer(attentions[clustered](config), config) for _ in range(config.enc_layers))
    encoder.load_state_dict(model.get_submodule("encoder").state_dict())
    model.encoder = encoder
    model.skip_padding = False  # type: ignore[assignment]  # an attribute that is no module


class PublishedEncoder(nn.Module):
    """A stack of layers, called as the encoder whose place it takes."""

    def __init__(self, layers: Iterable[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, tokens: Tensor, *position_and_mask: Tensor) -> Tensor:
        for layer in self.layers:
            tokens = layer(tokens, *position_and_mask)
        return tokens


class FeedForward(nn.Module):
    """Two linear layers with a residual and a layer norm; every result between them is a tensor that is kept."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.linear1 = nn.Linear(config.hidden_dim, config.dim_feedforward)
        self.linear2 = nn.Linear(config.dim_feedforward, config.hidden_dim)
        self.norm2 = nn.LayerNorm(config.hidden_dim)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, tokens: Tensor) -> Tensor:
        """(..., C) -> (..., C)."""
        transformed = self.linear2(self.dropout(F.relu(self.linear1(tokens))))
        result: Tensor = self.norm2(tokens + self.dropout(transformed))
        return result


class EncoderLayer(FeedForward):
    """A layer of DETR's and Conditional DETR's encoder."""

    def __init__(self, self_attn: nn.Module, config: Config) -> None:
        super().__init__(config)
        self.self_attn = self_attn
        self.norm1 = nn.LayerNorm(config.hidden_dim)

    def forward(self, tokens: Tensor, position: Tensor, pad_mask: Tensor | None) -> Tensor:  # type: ignore[override]
        """tokens, position (B, N, C); pad_mask (B, N) bool, True where padded, or None -> (B, N, C)."""
        located = tokens + position
        attended = self.self_attn(located, located, tokens, key_padding_mask=pad_mask)[0]
        return super().forward(self.norm1(tokens + self.dropout(attended)))


class MapEncoderLayer(nn.Module):
    """A layer of Anchor DETR's encoder."""

    def __init__(self, self_attn: nn.Module, config: Config) -> None:
        super().__init__()
        self.self_attn = self_attn
        self.norm1 = nn.LayerNorm(config.hidden_dim)
        self.dropout = nn.Dropout(config.dropout)
        self.ffn = FeedForward(config)

    def forward(self, x: Tensor, pos_row: Tensor, pos_col: Tensor, pad_mask: Tensor) -> Tensor:
        """Map x (B, H, W, C), pos_row (B, 1, W, C), pos_col (B, H, 1, C), pad_mask (B, H, W) -> (B, H, W, C)."""
        row, col = x + pos_row, x + pos_col
        attended = self.self_attn(row, col, row, col, x, key_padding_mask=pad_mask)
        result: Tensor = self.ffn(self.norm1(x + self.dropout(attended)))
        return result


class Attention(nn.MultiheadAttention):
    """DETR's: torch's own, asked for the map, which it then stores."""

    def __init__(self, config: Config) -> None:
        super().__init__(config.hidden_dim, config.nheads, attention_dropout(config), batch_first=True)


class _Projected(nn.Module):
    """One matrix for several projections, as `nn.MultiheadAttention` keeps it, and one for the result."""

    def __init__(self, config: Config, projections: int) -> None:
        super().__init__()
        width = config.hidden_dim
        self.num_heads, self.head_dim, self.dropout = config.nheads, width // config.nheads, attention_dropout(config)
        self.in_proj_weight = nn.Parameter(torch.empty(projections * width, width))
        self.in_proj_bias = nn.Parameter(torch.empty(projections * width))
        self.out_proj = nn.Linear(width, width)

    def project(self, *inputs: Tensor) -> list[Tensor]:
        """Each (B, ..., C) by its share of the matrix -> (B, ..., h, D)."""
        shares = self.in_proj_weight.chunk(len(inputs)), self.in_proj_bias.chunk(len(inputs))
        return [
            torch.unflatten(F.linear(x, weight, bias), -1, (self.num_heads, self.head_dim))
            for x, weight, bias in zip(inputs, *shares, strict=True)
        ]


class MapAttention(_Projected):
    """Anchor DETR's, the product of a distribution over columns and one over rows; see `models.row_column`."""

    def __init__(self, config: Config) -> None:
        super().__init__(config, projections=5)

    def forward(
        self,
        query_row: Tensor,
        query_col: Tensor,
        key_row: Tensor,
        key_col: Tensor,
        value: Tensor,
        key_padding_mask: Tensor,
    ) -> Tensor:
        """All (B, H, W, C), the mask (B, H, W) bool -> (B, H, W, C)."""
        q_row, q_col, k_row, k_col, v = self.project(query_row, query_col, key_row, key_col, value)
        over_x = self._distribution(q_row, k_row.mean(1), key_padding_mask[:, 0])  # (B, h, N, W)
        over_y = self._distribution(q_col, k_col.mean(2), key_padding_mask[:, :, 0])  # (B, h, N, H)
        v = v.permute(0, 3, 1, 2, 4)  # (B, h, H, W, D)
        if v.shape[2] < v.shape[3]:  # the longer side is summed over first
            over_y, over_x, v = over_x, over_y, v.transpose(2, 3)
        lines = (over_y @ v.flatten(3)).view(*over_y.shape[:3], *v.shape[3:])  # (B, h, N, shorter side, D)
        attended = (over_x.unsqueeze(-2) @ lines).squeeze(-2)
        result: Tensor = self.out_proj(attended.transpose(1, 2).flatten(2)).view_as(value)
        return result

    def _distribution(self, query: Tensor, key: Tensor, pad_mask: Tensor) -> Tensor:
        """(B, H, W, h, D), (B, L, h, D), (B, L) -> (B, h, N, L)."""
        query = query.flatten(1, 2).transpose(1, 2) * self.head_dim**-0.5
        logits = query @ key.permute(0, 2, 3, 1)
        weights = logits.masked_fill(pad_mask[:, None, None], -math.inf).softmax(-1)
        return F.dropout(weights, self.dropout, self.training)


class _Clustered(_Projected):
    """What both forms of the released ENACT share (spec 2.2 to 2.5).

    Attributes:
        num_clusters: T of the last call, for the report.
    """

    kernel: Tensor
    curvature: Tensor
    num_clusters: int = 0

    def __init__(self, config: Config, projections: int) -> None:
        super().__init__(config, projections)
        self.information = nn.ModuleDict({"probability": nn.Linear(config.hidden_dim, 1)})
        self.register_buffer("kernel", gaussian_taps(config.smoothing_sigma)[None, None], persistent=False)
        self.register_buffer("curvature", torch.tensor([[[-1.0, 2.0, -1.0]]]), persistent=False)

    def pool(self, keys: Tensor, *others: Tensor) -> list[Tensor]:
        """Keys and others, each (B, N, C) -> each (B, T, C), by chunks of one length for the batch."""
        smoothed = self._smoothed_information(keys)
        length = self._chunk_length(smoothed)
        self.num_clusters = count = smoothed.shape[1] // length
        first = smoothed.shape[1] % length // 2
        scores, *tokens = (
            torch.unflatten(x[:, first : first + count * length], 1, (count, length)) for x in (smoothed, keys, *others)
        )
        weights = scores.softmax(-1).unsqueeze(-1)
        return [(weights * x).sum(2) for x in tokens]

    def _smoothed_information(self, keys: Tensor) -> Tensor:
        p = self.information["probability"](keys).squeeze(-1).softmax(1) + PROBABILITY_FLOOR
        information = -p * p.log() / math.log(2)
        return F.conv1d(information.unsqueeze(1), self.kernel, padding="same").squeeze(1)

    @torch.no_grad()
    def _chunk_length(self, smoothed: Tensor) -> int:
        """The mean run of one sign of curvature; the number is read on the host image by image, as published."""
        if is_fake(smoothed):
            return min(TYPICAL_CHUNK, smoothed.shape[1])
        bends = F.conv1d(smoothed.unsqueeze(1), self.curvature, padding="same").squeeze(1) > 0
        runs = [1 + len((image[1:] != image[:-1]).nonzero()) for image in bends]
        return round(sum(smoothed.shape[1] / run for run in runs) / len(runs))


class ClusteredAttention(_Clustered):
    """The released ENACT of DETR and Conditional DETR (spec 2.6): padding counts, logits are not scaled, no dropout."""

    def __init__(self, config: Config) -> None:
        super().__init__(config, projections=3)

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None = None
    ) -> tuple[Tensor, None]:
        """All (B, N, C); the mask is ignored -> (B, N, C), None."""
        q, k, v = (x.transpose(1, 2) for x in self.project(query, *self.pool(key, value)))
        weights = (q @ k.transpose(2, 3)).softmax(-1)  # (B, h, N, T)
        attended = weights / self.head_dim @ v
        return self.out_proj(attended.transpose(1, 2).flatten(2)), None


class ClusteredMapAttention(_Clustered):
    """The released ENACT of Anchor DETR (spec 2.6), image by image, since it is right with one image a process."""

    def __init__(self, config: Config) -> None:
        super().__init__(config, projections=5)

    def forward(
        self,
        query_row: Tensor,
        query_col: Tensor,
        key_row: Tensor,
        key_col: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
    ) -> Tensor:
        """All (B, H, W, C); the mask is ignored -> (B, H, W, C)."""
        images = zip(*(torch.split(x, 1) for x in (query_row, query_col, key_row, key_col, value)), strict=True)
        return torch.cat([self._one_image(*image) for image in images])

    def _one_image(self, query_row: Tensor, query_col: Tensor, *keys_and_value: Tensor) -> Tensor:
        pooled = self.pool(*(x.flatten(1, 2) for x in keys_and_value))
        k_row, k_col, q_row, q_col, v = self.project(pooled[0], pooled[1], query_row, query_col, pooled[2])
        over_row = self._distribution(q_row.mean(1), k_row)  # (1, h, W, T)
        over_col = self._distribution(q_col.mean(2), k_col)  # (1, h, H, T)
        weights = over_col.unsqueeze(3) * over_row.unsqueeze(2)  # (1, h, H, W, T)
        attended = weights @ v.transpose(1, 2).unsqueeze(2)  # copies the values for each row, as published
        result: Tensor = self.out_proj(attended.flatten(2, 3).transpose(1, 2).flatten(2))
        return result.view_as(query_row)

    def _distribution(self, query: Tensor, key: Tensor) -> Tensor:
        """(1, L, h, D), (1, T, h, D) -> (1, h, L, T)."""
        logits = query.transpose(1, 2) @ (key * self.head_dim**-0.5).permute(0, 2, 3, 1)
        return F.dropout(logits.softmax(-1), self.dropout, self.training)
