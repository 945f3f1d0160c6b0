"""The choices that make up a variant of ENACT, and the way from keys to clusters.

Shapes: B batch, N tokens, T clusters, C channels.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, TypeVar, get_args

import torch
from torch import Tensor

from enact.clustering import (
    ABSENT,
    Clusters,
    Partition,
    Regions,
    beyond,
    log_mass,
    partition_tokens,
    softmax_in_clusters,
)
from enact.information import Information

Variant = Literal["paper", "official", "plus"]
Pooling = Literal["information", "scaled_information", "probability", "mean"]
ClusterBias = Literal["none", "size", "mass"]
_Count = TypeVar("_Count", int, Tensor)


@dataclass(frozen=True)
class Method:
    """How keys become clusters.

    Args:
        regions: where the token sequence is cut; see `partition_tokens`.
        pooling: what a token weighs in its cluster, a softmax over the cluster's tokens of
            "information": their smoothed information (the paper's; nearly uniform, since it is of the order of 1 / N);
            "scaled_information": the same, divided by its mean over the image;
            "probability": the logits of the learned probability, so that weights are p, normalised in the cluster;
            "mean": nothing, all tokens weigh the same.
        cluster_bias: what is added to the attention logits of a cluster.
            "none" (the paper's): a cluster of ten tokens counts as one key.
            "size": the logarithm of its number of tokens, so that it counts as that many.
            "mass": the logarithm of N times its share of the learned probability. With a uniform probability that is
                "size". Attention is then what dense attention would be with p as a prior over keys, if the keys of a
                cluster were equal; and the probability gets a gradient through every logit.
        max_clusters: the most clusters that an image may have; neighbours are merged evenly beyond. None: one for
            `min_run` tokens.
        min_run: the shortest mean cluster. The regions of noise are 5.5 tokens long on average, whatever sigma from 3
            up (spec 2.7), so that 4 is hardly ever felt.
    """

    regions: Regions = "sign_change"
    pooling: Pooling = "information"
    cluster_bias: ClusterBias = "none"
    max_clusters: int | None = None
    min_run: int = 4

    def __post_init__(self) -> None:
        """Refuse unknown names and impossible numbers (ValueError)."""
        for name, choices in (("regions", Regions), ("pooling", Pooling), ("cluster_bias", ClusterBias)):
            if getattr(self, name) not in get_args(choices):
                raise ValueError(f"{name} must be one of {', '.join(get_args(choices))}, got {getattr(self, name)!r}")
        if self.min_run < 1 or (self.max_clusters is not None and self.max_clusters < 1):
            raise ValueError("max_clusters and min_run must be 1 or more")

    def budget(self, tokens: _Count) -> _Count | int:
        """The number of clusters that `tokens` tokens may have."""
        return (tokens + self.min_run - 1) // self.min_run if self.max_clusters is None else self.max_clusters


VARIANTS: dict[Variant, Method] = {
    "paper": Method(),
    "official": Method(regions="chunks", min_run=2),
    "plus": Method(pooling="probability", cluster_bias="mass"),
}


def method_of(variant: Variant, **choices: Any) -> Method:
    """The method of a variant, with the fields of `choices` that are not None in place of its own."""
    if variant not in VARIANTS:
        raise ValueError(f"variant must be one of {', '.join(VARIANTS)}, got {variant!r}")
    return replace(VARIANTS[variant], **{name: choice for name, choice in choices.items() if choice is not None})


def cluster_keys(
    keys: Tensor, key_padding_mask: Tensor | None, information: Information, method: Method, place: Tensor | None = None
) -> Clusters:
    """The clusters of an image's keys, as if padding were not there.

    Args:
        keys: (B, N, C).
        key_padding_mask: (B, N) bool, True where padded, wherever that is; None: every token counts as real.
        information: from keys to smoothed information.
        method: from information to clusters.
        place: (N,) int64, the place of each token in the sequence that is cut, gaps allowed; None: as they stand.

    Returns:
        The clusters, differentiable in their weights and bias.
    """
    logits = information.logits(keys)
    if key_padding_mask is None and place is None:
        return form_clusters(logits, information, method)
    tokens = keys.shape[1]
    place = torch.arange(tokens, device=keys.device) if place is None else place
    if key_padding_mask is None:
        order, real = place.argsort().expand(keys.shape[0], -1), None
    else:
        order = (place + key_padding_mask * (place.max() + 1)).argsort(1)  # real tokens first
        real = ~key_padding_mask.gather(1, order)
    return form_clusters(logits.gather(1, order), information, method, real).in_token_order(order)


class _Tokens(NamedTuple):
    """What is known of a sequence whose real tokens come first: (B, N), (B, N), (B, N) bool or None."""

    logits: Tensor
    smoothed: Tensor
    real: Tensor | None

    def lengths(self) -> Tensor:
        """Real tokens of each image, (B, 1) int64, at least 1."""
        if self.real is None:
            return torch.full_like(self.logits[:, :1], self.logits.shape[1], dtype=torch.long)
        return self.real.sum(1, keepdim=True).clamp(min=1)


def form_clusters(logits: Tensor, information: Information, method: Method, real: Tensor | None = None) -> Clusters:
    """Logits (B, N) of the probability of a sequence's tokens, real ones (B, N) first -> its clusters."""
    tokens = _Tokens(logits, information(logits, real), real)
    largest = logits.shape[1]
    lengths = tokens.lengths()
    limit = torch.zeros_like(lengths) + method.budget(lengths)
    partition = partition_tokens(method.regions, tokens.smoothed, real, limit.squeeze(1), method.budget(largest))
    weight = softmax_in_clusters(_pooling_scores(tokens, method.pooling), partition)
    bias = _bias(tokens, method.cluster_bias, partition)
    return Clusters(partition.index, partition.count, partition.num_clusters, weight, bias)


def _pooling_scores(tokens: _Tokens, pooling: Pooling) -> Tensor:
    """(B, N): a token's weight is the softmax of these over its cluster."""
    if pooling == "probability":
        return tokens.logits
    if pooling == "mean":
        return torch.zeros_like(tokens.logits)
    if pooling == "scaled_information":
        return tokens.smoothed * tokens.lengths() / tokens.smoothed.sum(1, keepdim=True)
    return tokens.smoothed


def _bias(tokens: _Tokens, cluster_bias: ClusterBias, partition: Partition) -> Tensor | None:
    """(B, T), or None where every image has T clusters and none counts for more than another."""
    absent = beyond(partition.count, partition.num_clusters)
    if cluster_bias == "none":
        return None if partition.full else absent * ABSENT
    scores = torch.zeros_like(tokens.logits)
    if cluster_bias == "mass":
        real = torch.ones_like(tokens.logits, dtype=torch.bool) if tokens.real is None else tokens.real
        scores = tokens.logits.masked_fill(~real, torch.finfo(tokens.logits.dtype).min).log_softmax(1)
        scores = scores.masked_fill(~real, 0) + tokens.lengths().log()
    return log_mass(scores, partition)[:, :-1].masked_fill(absent, ABSENT)
