"""Multi-head attention over clusters of keys and values.

Shapes: B batch, L queries, N keys, T clusters, C channels, H heads, D channels a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from enact.clustering import Clusters, beyond
from enact.information import Information
from enact.kernels import biased_attention, one_kernel, packed_attention
from enact.method import Variant, cluster_keys, method_of
from enact.packing import cluster_packed, unpack
from enact.sums import linear_of_sum


class EnactAttention(nn.MultiheadAttention):
    """`nn.MultiheadAttention` whose keys and values are pooled into clusters of similar information first.

    Every query attends to T clusters instead of N keys. The constructor, the call and the parameters are those of
    `nn.MultiheadAttention`, plus `information.probability`, one linear layer from a key to a logit.

    Args:
        embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first, device, dtype: as in
            `nn.MultiheadAttention`. The keys that `add_bias_kv` and `add_zero_attn` add are not clustered.
        variant: "paper": each image's runs of one curvature sign over its real tokens, then ordinary scaled
            attention with dropout. "official": the released code's arithmetic (spec 2.2 to 2.6): one chunk length for
            the batch, padding not masked, logits unscaled, the result divided by D, no attention dropout. "plus":
            clusters as in "paper", in which tokens weigh by their learned probability, which count for their share
            of it, and whose boundaries are soft, so that all of it learns.
        smoothing_sigma: standard deviation, in tokens, of the Gaussian that smooths the information.
        choices: fields of `Method` to replace the variant's own: regions, pooling, cluster_bias,
            boundary, max_clusters, min_run.

    Source: arXiv 2409.07541; `variant` is explained in the README's table of deviations.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        variant: Variant = "paper",
        smoothing_sigma: float = 3.0,
        **choices: Any,
    ) -> None:
        method = method_of(variant, **choices)
        super().__init__(
            embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first, device, dtype
        )
        self._packed = self._qkv_same_embed_dim
        self._qkv_same_embed_dim = False  # torch's encoder layer would otherwise run a fused kernel in our place
        self.variant = variant
        self.method = method
        self.information = Information(self.kdim, smoothing_sigma, device=device, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw new parameters: DETR's initialisation (spec 6.1), or the released code's (spec 3.3, item 21)."""
        self._qkv_same_embed_dim = self._packed
        self._reset_parameters()
        self._qkv_same_embed_dim = False
        nn.init.xavier_uniform_(self.out_proj.weight)
        self.information.reset_parameters(self.method.initial_gain)
        if self.variant != "official":
            return
        for projection in self._projections().weights:
            nn.init.xavier_uniform_(projection)
        for bias in (self.in_proj_bias, self.out_proj.bias, self.information.probability.bias):
            if bias is not None:
                nn.init.uniform_(bias, -(self.embed_dim**-0.5), self.embed_dim**-0.5)

    def clusters(self, key: Tensor, key_padding_mask: Tensor | None = None) -> Clusters:
        """The clusters of `key` (B, N, kdim); `key_padding_mask` (B, N) bool, True where padded."""
        mask = None if self.variant == "official" else key_padding_mask
        return cluster_keys(key, mask, self.information, self.method)

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
            query: (B, L, C), or (L, B, C) without `batch_first`, or (L, C) for one sequence.
            key, value: (B, N, kdim) and (B, N, vdim), or (N, B, ...), or (N, ...).
            key_padding_mask: (B, N) or (N,) bool, True where a key is padding and must not count; or a float mask
                that is minus infinity there and 0 elsewhere, as `nn.TransformerEncoder` makes of a bool one.
            need_weights: also return the attention of each query to each key: its cluster's, times the key's
                weight in the cluster. This stores the whole map; the result itself does not.
            attn_mask, is_causal: not supported, since a cluster holds many keys.
            average_attn_weights: average the map over the heads.

        Returns:
            The result in the shape of `query`, and the map (B, L, N), (B, H, L, N) or None; without B for one
            sequence. The keys that `add_bias_kv` and `add_zero_attn` add stand at the end of the map.
        """
        if attn_mask is not None or is_causal:
            raise ValueError("EnactAttention pools keys into clusters, so it cannot take attn_mask or is_causal")
        single, batch_dim = query.dim() == 2, 0 if self.batch_first or query.dim() == 2 else 1
        if single:
            query, key, value = (tensor.unsqueeze(0) for tensor in (query, key, value))
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        query, key, value = (tensor.movedim(batch_dim, 0) for tensor in (query, key, value))
        result, weights = self._attend(query, key, value, _as_bool(key_padding_mask), need_weights)
        if weights is not None and average_attn_weights:
            weights = weights.mean(1)
        if single:
            return result.squeeze(0), None if weights is None else weights.squeeze(0)
        return result.movedim(0, batch_dim), weights

    def attend_packed(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        lengths: Sequence[int],
        slots: Tensor,
        position: Tensor | None = None,
    ) -> Tensor:
        """Self-attention of images that stand one behind the other: what `forward` gives, at no cost for padding.

        Args:
            query, key, value: (S, C), (S, kdim), (S, vdim), S the sum of the lengths.
            lengths: tokens of each image, 1 or more.
            slots: (S,) int64, the place of each token in the batch padded to its longest image; see `rows_of`.
            position: (S, C), to be added to query and key; None: nothing.

        Returns:
            (S, C).
        """
        if self.variant == "official" or self.bias_k is not None or self.add_zero_attn:  # padding or extra keys count
            located = (x if position is None else x + position for x in (query, key))
            query, key, value = (unpack(x, slots, len(lengths), max(lengths)) for x in (*located, value))
            mask = beyond(torch.tensor(lengths), max(lengths)).to(key.device, non_blocking=True)
            return self._attend(query, key, value, mask, need_weights=False)[0].flatten(0, 1)[slots]
        weights, biases = self._projections()
        heads = [linear_of_sum(query, position, weights[0], biases[0]).view(len(query), self.num_heads, -1)]
        dropout = self.dropout if self.training else 0.0
        tight = one_kernel(heads[0], dropout)
        clusters = cluster_packed(key, lengths, slots, self.information, self.method, position, tight=tight)
        for tokens, weight, bias in zip(
            (clusters.pool(key, position), clusters.pool(value)), weights[1:], biases[1:], strict=True
        ):
            heads.append(F.linear(tokens, weight, bias).view(len(tokens), self.num_heads, -1))
        return packed_attention(
            heads, clusters.bias, lengths, clusters.counts, clusters.starts, self.out_proj, dropout, self._scale()
        )

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None, need_weights: bool
    ) -> tuple[Tensor, Tensor | None]:
        """As `forward`, batch first; the map for each head."""
        clusters = self.clusters(key, key_padding_mask)
        heads = self._with_extra_keys(self._project(query, clusters.pool(key), clusters.pool(value)))
        result = self._attend_to_clusters(heads, clusters.bias)
        return result, self._token_weights(heads, clusters) if need_weights else None

    def _attend_to_clusters(self, heads: Heads, bias: Tensor | None) -> Tensor:
        """Heads, and bias (B, T) of the clusters or None -> (B, L, C)."""
        official = self.variant == "official"
        dropout = self.dropout if self.training and not official else 0.0
        attended = biased_attention(*heads, self._with_extra_bias(bias), dropout, self._scale())
        if official:
            attended = attended / self.head_dim
        result: Tensor = self.out_proj(attended.transpose(1, 2).flatten(2))
        return result

    def _scale(self) -> float:
        return 1.0 if self.variant == "official" else self.head_dim**-0.5

    def _projections(self) -> Projections:
        packed = self.in_proj_weight
        weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight) if packed is None else packed.chunk(3)
        return Projections(weights, (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3))

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> Heads:
        projected = (
            split_heads(F.linear(tokens, weight, bias), self.num_heads)
            for tokens, weight, bias in zip((query, key, value), *self._projections(), strict=True)
        )
        return Heads(*projected)

    def _with_extra_keys(self, heads: Heads) -> Heads:
        """Append the learned key and the zero key that the constructor asked for."""
        query, key, value = heads
        if self.bias_k is not None and self.bias_v is not None:
            bias_k, bias_v = (split_heads(bias.expand(query.shape[0], -1, -1), self.num_heads)
                              for bias in (self.bias_k, self.bias_v))
            key, value = torch.cat([key, bias_k], 2), torch.cat([value, bias_v], 2)
        if self.add_zero_attn:
            key, value = F.pad(key, (0, 0, 0, 1)), F.pad(value, (0, 0, 0, 1))
        return Heads(query, key, value)

    def _with_extra_bias(self, bias: Tensor | None) -> Tensor | None:
        """Bias (B, T) of the clusters -> of all keys; those that are no clusters count as one token each."""
        extra = int(self.bias_k is not None) + int(self.add_zero_attn)
        return bias if bias is None or extra == 0 else F.pad(bias, (0, extra))

    def _token_weights(self, heads: Heads, clusters: Clusters) -> Tensor:
        """(B, H, L, N): the attention to each token's cluster times the token's weight in it; then the extra keys."""
        logits = heads.query @ heads.key.transpose(2, 3) * self._scale()
        bias = self._with_extra_bias(clusters.bias)
        if bias is not None:
            logits = logits + bias[:, None, None].to(logits.dtype)
        attention = logits.softmax(-1) / (self.head_dim if self.variant == "official" else 1.0)
        attention, extra = attention.tensor_split([clusters.num_clusters], dim=-1)
        attention = F.pad(attention, (0, 1))  # the slot of tokens that belong to no cluster
        tokens = torch.zeros_like(attention[..., :1])
        for index, weight in clusters.memberships():
            of_cluster = attention.gather(3, index[:, None, None].expand(-1, *attention.shape[1:3], -1))
            tokens = tokens + of_cluster * weight[:, None, None].to(attention.dtype)
        return torch.cat([tokens, extra], -1)


def split_heads(tokens: Tensor, num_heads: int) -> Tensor:
    """(B, ..., H * D) -> (B, H, ..., D)."""
    heads: Tensor = tokens.reshape(*tokens.shape[:-1], num_heads, -1)
    return heads.movedim(-2, 1)


def _as_bool(key_padding_mask: Tensor | None) -> Tensor | None:
    if key_padding_mask is None or key_padding_mask.dtype == torch.bool:
        return key_padding_mask
    return key_padding_mask == float("-inf")


class Projections(NamedTuple):
    """Weights (C, C), (C, kdim), (C, vdim) of query, key and value, and biases (C,) or None."""

    weights: tuple[Tensor, ...]
    biases: tuple[Tensor | None, ...]


class Heads(NamedTuple):
    """Projected query (B, H, L, D), key (B, H, T, D) and value (B, H, T, D)."""

    query: Tensor
    key: Tensor
    value: Tensor
