"""Clusters of tokens: which token belongs to which, what it weighs there, and how to pool any tensor of tokens.

Shapes: B batch, N tokens, T clusters, C channels.

Nothing here waits for a GPU, and every shape follows from the shapes of the arguments: T is a budget, which images with
fewer clusters do not use up. On a CPU, where reading a number costs nothing, T is then cut to what the batch needs; no
result depends on that.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from enact.information import filter_tokens

Regions = Literal["sign_change", "uniform", "random", "chunks", "image_chunks", "tokens"]

# Added to the logit of a cluster that an image does not have: its weight is then exactly 0. Not an infinity, which
# would make gradients NaN, and in the range of half precision when divided by a usual attention scale.
ABSENT = -5000.0

# Of the information: a curvature of less is none. (Usual ones are 0.01 of it; rounding in fp64 makes 1e-15 of it.)
FLAT = 1e-9

# Of the mean absolute curvature of an image: how near to zero a curvature is for its token to belong to two clusters.
SOFTNESS = 0.25


class Partition(NamedTuple):
    """Which token belongs to which cluster.

    index: (B, N) int64, the cluster of each token; `num_clusters` for a token that belongs to none.
    count: (B,) int64, clusters of each image, at least 1.
    num_clusters: T, at least the largest count.
    full: every image is known to have T clusters.
    """

    index: Tensor  # type: ignore[assignment]  # hides tuple.index
    count: Tensor  # type: ignore[assignment]  # hides tuple.count
    num_clusters: int
    full: bool = False

    def with_index(self, index: Tensor) -> Partition:
        """The same clusters of other tokens. (The compiler of torch 2.6 does not know `_replace`.)"""
        return Partition(index, self.count, self.num_clusters, self.full)

    def cut(self) -> Partition:
        """T as small as this batch allows, where finding out is free: on a CPU, outside compilation."""
        if not free_to_read(self.index):
            return self
        fewest, most = (int(bound) for bound in self.count.aminmax())
        index = self.index.masked_fill(self.index == self.num_clusters, most)
        return Partition(index, self.count, most, full=fewest == most)


class Shared(NamedTuple):
    """A cluster of each token, as in `Partition`, and the token's weight there: both (B, N)."""

    index: Tensor  # type: ignore[assignment]  # hides tuple.index
    weight: Tensor

    def in_token_order(self, order: Tensor) -> Shared:
        """The same for tokens that stood at `order` (B, N) before they were sorted."""
        return Shared(*(torch.empty_like(column).scatter(1, order, column) for column in self))


class Clusters(NamedTuple):
    """A partition of each image's tokens, with the weight of each token in its cluster.

    index, count, num_clusters: as in `Partition`.
    weight: (B, N), sums to 1 within each cluster, 0 for a token that belongs to none.
    bias: (B, T), to be added to the attention logits of each cluster: what the cluster counts for, and `ABSENT` for
        one that the image does not have. None: nothing to add.
    shared: a second cluster for the tokens at its edge, and their weights there, which then count among those that
        sum to 1. None: every token belongs to one cluster alone.
    """

    index: Tensor  # type: ignore[assignment]  # hides tuple.index
    count: Tensor  # type: ignore[assignment]  # hides tuple.count
    num_clusters: int
    weight: Tensor
    bias: Tensor | None
    shared: Shared | None = None

    def pool(self, tokens: Tensor) -> Tensor:
        """The weighted sum of the tokens of each cluster: (B, N, C) -> (B, T, C); 0 past an image's count."""
        batch, _, channels = tokens.shape
        slots = self.num_clusters + 1  # the last one takes the tokens that belong to no cluster
        first_slot = torch.arange(batch, device=tokens.device).unsqueeze(1) * slots
        pooled = tokens.new_zeros(batch * slots, channels, dtype=torch.promote_types(tokens.dtype, self.weight.dtype))
        for index, weight in self.memberships():
            weighted = (tokens * weight.unsqueeze(-1)).flatten(0, 1)
            pooled = pooled.index_add(0, (index + first_slot).flatten(), weighted)
        return pooled.view(batch, slots, channels)[:, :-1].to(tokens.dtype)

    def memberships(self) -> list[Shared]:
        """Each way in which tokens belong to clusters: one, or two with a soft boundary."""
        own = Shared(self.index, self.weight)
        return [own] if self.shared is None else [own, self.shared]

    def pad_mask(self) -> Tensor:
        """(B, T) bool, True where the image has no such cluster."""
        return beyond(self.count, self.num_clusters)

    def in_token_order(self, order: Tensor) -> Clusters:
        """The same clusters for tokens that stood at `order` (B, N) before they were sorted."""
        index, weight = Shared(self.index, self.weight).in_token_order(order)
        shared = None if self.shared is None else self.shared.in_token_order(order)
        return Clusters(index, self.count, self.num_clusters, weight, self.bias, shared)


def free_to_read(tensor: Tensor) -> bool:
    """Whether the host may read numbers of it at no cost: on a CPU, outside compilation."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def beyond(count: Tensor, total: int) -> Tensor:
    """(B,) -> (B, total) bool, True from `count` on."""
    return torch.arange(total, device=count.device) >= count.unsqueeze(1)


def log_mass(scores: Tensor, partition: Partition) -> Tensor:
    """Log sum exp of the scores (B, N) of each cluster's tokens: (B, T + 1), the last for tokens of no cluster."""
    slots = (scores.shape[0], partition.num_clusters + 1)
    with torch.no_grad():
        lowest = scores.new_full(slots, torch.finfo(scores.dtype).min)
        highest = lowest.scatter_reduce(1, partition.index, scores, "amax")
    mass = (scores - highest.gather(1, partition.index)).exp()
    total = mass.new_zeros(slots).scatter_add(1, partition.index, mass)
    return total.clamp(min=torch.finfo(total.dtype).tiny).log() + highest


def softmax_in_clusters(scores: Tensor, partition: Partition) -> Tensor:
    """The softmax of `scores` (B, N) among the tokens that share a cluster, 0 for a token that belongs to none."""
    weight = (scores - log_mass(scores, partition).gather(1, partition.index)).exp()
    return weight * (partition.index < partition.num_clusters)


def partition_tokens(
    regions: Regions, smoothed: Tensor, real: Tensor | None, limit: Tensor, max_clusters: int
) -> Partition:
    """Cut each image's token sequence into clusters of consecutive tokens.

    Args:
        regions: where to cut.
            "sign_change": the paper's, at each change of the sign of the information's curvature (spec 1.2).
            "uniform": as many as "sign_change" finds, of one length: the control that says what the places are worth.
            "random": regions of the lengths that "sign_change" finds, in a shuffled order: another control.
            "chunks": the released code's (spec 2.4, 2.5), of one length for the batch; `real` is ignored.
            "image_chunks": the same with each image's own length.
            "tokens": one cluster a token, which makes attention dense again.
        smoothed: (B, N) smoothed information, an image's real tokens first; 0 at padding.
        real: (B, N) bool, True for the real tokens; None: all.
        limit: (B,) int64: neighbours are merged, evenly, in an image that has more clusters; not for "tokens".
        max_clusters: T before it is cut, at least the largest limit.

    Returns:
        The partition, without gradient. All but the chunks cover every real token once.
    """
    with torch.no_grad():
        if regions == "tokens":
            return _one_per_token(smoothed, real).cut()
        if regions in ("chunks", "image_chunks"):
            found = _chunks(smoothed, whole_batch=regions == "chunks")
        else:
            found = _sign_change_regions(smoothed, real)
        partition = _merge(found, limit, max_clusters)
        if regions == "uniform":
            partition = _same_length(partition, real)
        elif regions == "random":
            partition = _shuffled(partition)
        return partition.cut()


def share_edges(smoothed: Tensor, partition: Partition) -> tuple[Partition, Tensor]:
    """Let the tokens on both sides of a cut belong to both clusters, so that a gradient moves the cut.

    A token at the edge of its cluster belongs to it for sigmoid(|c| / tau), c its curvature and tau `SOFTNESS` times
    the mean |c| of the image, and to the cluster beyond the cut for the rest: half and half where the sign is about to
    change, after which it would be on the other side of the cut, half and half again. (What remains of a jump: its
    neighbour then starts to share, and a cluster may appear or go.)

    Args:
        smoothed: (B, N), from which the partition was made.
        partition: by "sign_change".

    Returns:
        The partition with an index (B, 2 N), every token's own cluster and then its second one, if any; and the
        logarithms of the shares in both, (B, 2 N).
    """
    index, none = partition.index, partition.num_clusters
    before = torch.cat([index[:, :1], index[:, :-1]], 1)
    behind = torch.cat([index[:, 1:], torch.zeros_like(index[:, :1]) + none], 1)  # pad() would fix T in a graph
    second = torch.where(before != index, before, torch.where(behind != index, behind, none))
    real = index != none
    second = second.masked_fill(~real, none)
    shared = second != none
    bend = curvature(smoothed).abs() * real
    mean = bend.detach().sum(1, keepdim=True) / real.sum(1, keepdim=True).clamp(min=1)
    tau = SOFTNESS * mean.clamp(min=torch.finfo(bend.dtype).tiny)
    shares = [F.logsigmoid(bend / tau).masked_fill(~shared, 0), F.logsigmoid(-bend / tau).masked_fill(~shared, 0)]
    return partition.with_index(torch.cat([index, second], 1)), torch.cat(shares, 1)


def curvature(smoothed: Tensor) -> Tensor:
    """(B, N), above 0 where the sequence bends down: 2 s[n] - s[n-1] - s[n+1], zero outside (spec 2.3)."""
    return filter_tokens(smoothed, smoothed.new_tensor([-1.0, 2.0, -1.0]))


def sign_changes(smoothed: Tensor) -> Tensor:
    """(B, N) bool, True for a token whose curvature has another sign than that of the token before it.

    Among tokens of no probability a curvature is rounding noise, and counts as none.
    """
    bends_down = curvature(smoothed) > FLAT * smoothed
    return torch.cat([torch.zeros_like(bends_down[:, :1]), bends_down[:, 1:] != bends_down[:, :-1]], dim=1)


def _sign_change_regions(smoothed: Tensor, real: Tensor | None) -> Partition:
    tokens = smoothed.shape[1]
    starts = sign_changes(smoothed)
    if real is not None:
        starts = starts & real
    index = starts.cumsum(1)
    count = index[:, -1] + 1
    return Partition(index if real is None else index.masked_fill(~real, tokens), count, tokens)


def _chunks(smoothed: Tensor, whole_batch: bool) -> Partition:
    """Chunks of the mean run of one sign, rounded half to even; the tokens left over are split between both ends."""
    tokens = smoothed.shape[1]
    length = mean_run(smoothed)
    if whole_batch:
        length = length.mean().expand(smoothed.shape[0])
    length = length.round().long().unsqueeze(1)  # (B, 1)
    count = torch.full_like(length, tokens) // length
    position = torch.arange(tokens, device=smoothed.device) - (tokens - count * length) // 2  # (B, N)
    kept = (position >= 0) & (position < count * length)
    return Partition(torch.where(kept, position // length, tokens), count.squeeze(1), tokens)


def mean_run(smoothed: Tensor) -> Tensor:
    """The mean length, in tokens, of an image's runs of one curvature sign: (B, N) -> (B,) float64."""
    runs = 1 + sign_changes(smoothed).sum(1)
    return (smoothed.shape[1] / runs).double()


def _one_per_token(smoothed: Tensor, real: Tensor | None) -> Partition:
    batch, tokens = smoothed.shape
    index = torch.arange(tokens, device=smoothed.device).expand(batch, -1)
    if real is None:
        return Partition(index, index.new_full((batch,), tokens), tokens)
    return Partition(index.masked_fill(~real, tokens), real.sum(1).clamp(min=1), tokens)


def _merge(partition: Partition, limit: Tensor, max_clusters: int) -> Partition:
    """Merge neighbours where an image has more than `limit` clusters, as evenly as whole clusters can be."""
    none = partition.index == partition.num_clusters
    count = partition.count.minimum(limit)
    index = partition.index * count.unsqueeze(1) // partition.count.unsqueeze(1)
    return Partition(index.masked_fill(none, max_clusters), count, max_clusters)


def _same_length(partition: Partition, real: Tensor | None) -> Partition:
    """As many clusters, whose lengths differ by a token at most."""
    index, count, slots, _ = partition
    tokens = torch.arange(index.shape[1], device=index.device)
    if real is None:
        return partition.with_index(tokens * count.unsqueeze(1) // index.shape[1])
    even = tokens * count.unsqueeze(1) // real.sum(1, keepdim=True).clamp(min=1)
    return partition.with_index(torch.where(real, even, slots))


def _shuffled(partition: Partition) -> Partition:
    """The same lengths in another order, the same one for every batch."""
    index, count, slots, _ = partition
    position = torch.arange(slots, device=index.device)
    lottery = (torch.sin(12.9898 * (position + 1.0)) * 43758.5453).frac()
    lottery = torch.where(beyond(count, slots), 2.0, lottery)  # clusters that an image does not have stay last
    lengths = torch.zeros(index.shape[0], slots + 1, dtype=torch.long, device=index.device)
    lengths = lengths.scatter_add(1, index, torch.ones_like(index))[:, :slots].gather(1, lottery.argsort(1))
    tokens = torch.arange(index.shape[1], device=index.device).expand(index.shape[0], -1).contiguous()
    shuffled = torch.searchsorted(lengths.cumsum(1), tokens, right=True)
    return partition.with_index(torch.where(index == slots, slots, shuffled))
