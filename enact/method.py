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
    Shared,
    beyond,
    log_mass,
    partition_tokens,
    share_edges,
    softmax_in_clusters,
)
from enact.information import LOWEST, Information

Variant = Literal["paper", "official", "plus"]
Pooling = Literal["information", "scaled_information", "probability", "mean"]
ClusterBias = Literal["none", "size", "mass"]
Boundary = Literal["hard", "soft"]
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
        boundary: "hard" (the paper's): a token belongs to one cluster, and no gradient says where to cut. "soft": the
            tokens beside a cut belong to both clusters, the more so the nearer to zero their curvature is; see
            `share_edges`. Only with regions "sign_change".
        max_clusters: the most clusters that an image may have; neighbours are merged evenly beyond. None: one for
            `min_run` tokens.
        min_run: the shortest mean cluster. The regions of noise are 5.5 tokens long on average, whatever sigma from 3
            up (spec 2.7), so that 4 is hardly ever felt.
        initial_gain: of the first weights of the probability layer. 1: as the released code draws them. Where the
            probability is a prior over keys, small ones start it near uniform: attention is then what dense
            attention would be if the keys of a cluster were equal.
    """

    regions: Regions = "sign_change"
    pooling: Pooling = "information"
    cluster_bias: ClusterBias = "none"
    boundary: Boundary = "hard"
    max_clusters: int | None = None
    min_run: int = 4
    initial_gain: float = 1.0

    def __post_init__(self) -> None:
        """Refuse unknown names and impossible numbers (ValueError)."""
        fields = {"regions": Regions, "pooling": Pooling, "cluster_bias": ClusterBias, "boundary": Boundary}
        for name, choices in fields.items():
            if getattr(self, name) not in get_args(choices):
                raise ValueError(f"{name} must be one of {', '.join(get_args(choices))}, got {getattr(self, name)!r}")
        if self.boundary == "soft" and self.regions != "sign_change":
            raise ValueError(f"boundary soft needs regions sign_change, got {self.regions}")
        if self.min_run < 1 or (self.max_clusters is not None and self.max_clusters < 1):
            raise ValueError("max_clusters and min_run must be 1 or more")

    def budget(self, tokens: _Count) -> _Count | int:
        """The number of clusters that `tokens` tokens may have."""
        return (tokens + self.min_run - 1) // self.min_run if self.max_clusters is None else self.max_clusters

    def most_clusters(self, tokens: int) -> int:
        """The most clusters that an image of `tokens` tokens gets."""
        return tokens if self.regions == "tokens" else int(self.budget(tokens))


VARIANTS: dict[Variant, Method] = {
    "paper": Method(),
    "official": Method(regions="chunks", min_run=2),
    "plus": Method(pooling="probability", cluster_bias="mass", boundary="soft", initial_gain=0.1),
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
    smoothed = information(_precise(logits), real)
    tokens = _Tokens(logits, smoothed.to(logits.dtype), real)
    largest = logits.shape[1]
    lengths = tokens.lengths()
    limit = torch.zeros_like(lengths) + method.budget(lengths)
    partition = partition_tokens(method.regions, smoothed.detach(), real, limit.squeeze(1), method.budget(largest))
    pooling, counting = _pooling_scores(tokens, method.pooling), _counting_scores(tokens, method.cluster_bias)
    if method.boundary == "hard":
        weight = softmax_in_clusters(pooling, partition)
        return Clusters(partition.index, partition.count, partition.num_clusters, weight, _bias(counting, partition))
    both, shares = share_edges(tokens.smoothed, partition)
    weight = softmax_in_clusters(pooling.repeat(1, 2) + shares, both)
    bias = _bias(None if counting is None else counting.repeat(1, 2) + shares, both)
    own, second = (slice(None), slice(largest)), (slice(None), slice(largest, None))  # the ONNX exporter fails on chunk
    shared = Shared(both.index[second], weight[second])
    return Clusters(partition.index, partition.count, partition.num_clusters, weight[own], bias, shared)


def _precise(logits: Tensor) -> Tensor:
    """In fp64 where the device has it, for the signs of second differences of the information.

    In fp32 these are ten times as noisy as rounding in the backbone makes them, and a sign that turns moves a cut.
    """
    return logits if logits.device.type == "mps" else logits.double()


def _pooling_scores(tokens: _Tokens, pooling: Pooling) -> Tensor:
    """(B, N): a token's weight is the softmax of these over its cluster."""
    if pooling == "probability":
        return tokens.logits
    if pooling == "mean":
        return torch.zeros_like(tokens.logits)
    if pooling == "scaled_information":
        return tokens.smoothed * tokens.lengths() / tokens.smoothed.sum(1, keepdim=True)
    return tokens.smoothed


def _counting_scores(tokens: _Tokens, cluster_bias: ClusterBias) -> Tensor | None:
    """(B, N): a cluster counts for the sum of the exponentials of these; None: for one."""
    if cluster_bias == "none":
        return None
    if cluster_bias == "size":
        return torch.zeros_like(tokens.logits)
    if tokens.real is None:
        return tokens.logits.log_softmax(1) + tokens.lengths().log()
    masked = tokens.logits.masked_fill(~tokens.real, LOWEST)
    return masked.log_softmax(1).masked_fill(~tokens.real, 0) + tokens.lengths().log()


def _bias(counting: Tensor | None, partition: Partition) -> Tensor | None:
    """(B, T), or None where every image has T clusters and none counts for more than another."""
    absent = beyond(partition.count, partition.num_clusters)
    if counting is None:
        return None if partition.full else absent * ABSENT
    return log_mass(counting, partition)[:, :-1].masked_fill(absent, ABSENT)
