"""Smoothed information -> clusters of consecutive tokens -> a pooling operator for any tensor of tokens.

Shapes: B batch, N tokens, T clusters (of the image that has most), C channels.

Which token belongs to which cluster is decided under `no_grad`; how much it weighs there is differentiable.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from enact.information import Information, filter_tokens


class Clusters(NamedTuple):
    """A partition of each image's tokens, with the weight of each token in its cluster.

    index: (B, N) int64, the cluster of each token; `num_clusters` for a token that belongs to none.
    weight: (B, N), sums to 1 within each cluster, 0 for a token that belongs to none.
    count: (B,) int64, clusters of each image, at least 1.
    num_clusters: T, the largest count.
    """

    index: Tensor  # type: ignore[assignment]  # hides tuple.index
    weight: Tensor
    count: Tensor  # type: ignore[assignment]  # hides tuple.count
    num_clusters: int

    def pool(self, tokens: Tensor) -> Tensor:
        """The weighted sum of the tokens of each cluster: (B, N, C) -> (B, T, C); 0 past an image's count."""
        batch, _, channels = tokens.shape
        slots = self.num_clusters + 1  # the last one takes the tokens that belong to no cluster
        first_slot = torch.arange(batch, device=tokens.device).unsqueeze(1) * slots
        weighted = (tokens * self.weight.unsqueeze(-1)).flatten(0, 1)
        pooled = weighted.new_zeros(batch * slots, channels)
        pooled = pooled.index_add(0, (self.index + first_slot).flatten(), weighted)
        return pooled.view(batch, slots, channels)[:, :-1].to(tokens.dtype)

    def pad_mask(self) -> Tensor:
        """(B, T) bool, True where the image has no such cluster."""
        return torch.arange(self.num_clusters, device=self.index.device) >= self.count.unsqueeze(1)

    def in_token_order(self, order: Tensor) -> Clusters:
        """The same clusters for tokens that stood at `order` (B, N) before they were packed."""
        return self._replace(
            index=torch.empty_like(self.index).scatter(1, order, self.index),
            weight=torch.empty_like(self.weight).scatter(1, order, self.weight),
        )


def softmax_in_clusters(scores: Tensor, index: Tensor, num_clusters: int) -> Tensor:
    """The softmax of `scores` (B, N) among the tokens that share a cluster; `index` as in `Clusters`."""
    slots = (len(scores), num_clusters + 1)
    with torch.no_grad():
        highest = scores.new_zeros(slots).scatter_reduce(1, index, scores, "amax", include_self=False)
    mass = (scores - highest.gather(1, index)).exp()
    total = mass.new_zeros(slots).scatter_add(1, index, mass)
    return mass / total.gather(1, index) * (index < num_clusters)


def curvature_sign(smoothed: Tensor) -> Tensor:
    """(B, N) bool, True where the sequence bends down: 2 s[n] - s[n-1] - s[n+1] > 0, zero outside (spec 2.3)."""
    return filter_tokens(smoothed, smoothed.new_tensor([-1.0, 2.0, -1.0])) > 0


def sign_change_regions(smoothed: Tensor, real: Tensor | None = None) -> Clusters:
    """The paper's clusters: maximal runs of tokens whose information bends the same way (spec 1.2).

    Args:
        smoothed: (B, N) smoothed information, an image's real tokens first; 0 at padding.
        real: (B, N) bool, True for the real tokens; None: all.

    Returns:
        Clusters that cover every real token once.
    """
    with torch.no_grad():
        bends_down = curvature_sign(smoothed)
        starts = torch.zeros_like(bends_down)
        starts[:, 1:] = bends_down[:, 1:] != bends_down[:, :-1]
        if real is not None:
            starts &= real
        index = starts.cumsum(1)
        count = index[:, -1] + 1
        num_clusters = int(count.max())
        if real is not None:
            index = index.masked_fill(~real, num_clusters)
    return Clusters(index, softmax_in_clusters(smoothed, index, num_clusters), count, num_clusters)


def uniform_chunks(smoothed: Tensor, real: Tensor | None = None) -> Clusters:
    """The released code's clusters: chunks of one length for the whole batch (spec 2.4, 2.5).

    The length is the mean run of one curvature sign, averaged over the batch and rounded to even; the tokens that
    do not fill a chunk are left out at both ends. Padding counts as tokens, as in the released code: `real` is
    accepted for the sake of one signature, and ignored.
    """
    with torch.no_grad():
        length = mean_run(smoothed).mean().expand(len(smoothed))
    return _chunks(smoothed, length)


def uniform_chunks_per_image(smoothed: Tensor, real: Tensor | None = None) -> Clusters:
    """As `uniform_chunks`, with each image's own length: what the released code does to an image on its own."""
    with torch.no_grad():
        length = mean_run(smoothed)
    return _chunks(smoothed, length)


def mean_run(smoothed: Tensor) -> Tensor:
    """The mean length, in tokens, of an image's runs of one curvature sign: (B, N) -> (B,) float64."""
    bends_down = curvature_sign(smoothed)
    runs = 1 + (bends_down[:, 1:] != bends_down[:, :-1]).sum(1)
    return (smoothed.shape[1] / runs).double()


def _chunks(smoothed: Tensor, length: Tensor) -> Clusters:
    """Chunks of `length` (B,) tokens, rounded half to even; the tokens left over are split between both ends."""
    tokens = smoothed.shape[1]
    with torch.no_grad():
        length = length.round().long().unsqueeze(1)  # (B, 1)
        count = tokens // length
        num_clusters = int(count.max())
        position = torch.arange(tokens, device=smoothed.device) - tokens % length // 2  # (B, N)
        kept = (position >= 0) & (position < count * length)
        index = torch.where(kept, position // length, num_clusters)
    return Clusters(index, softmax_in_clusters(smoothed, index, num_clusters), count.squeeze(1), num_clusters)


def one_per_token(smoothed: Tensor, real: Tensor | None = None) -> Clusters:
    """No clustering, as a value: every token is a cluster, and ENACT attention is dense attention."""
    batch, tokens = smoothed.shape
    index = torch.arange(tokens, device=smoothed.device).expand(batch, -1)
    count = index.new_full((batch,), tokens)
    if real is not None:
        count = real.sum(1).clamp(min=1)
        index = index.masked_fill(~real, tokens)
    return Clusters(index, (index < tokens).to(smoothed.dtype), count, tokens)


# Smoothed information (B, N) and which tokens are real (B, N), or None -> clusters.
Clustering = Callable[[Tensor, Tensor | None], Clusters]


def cluster_keys(
    keys: Tensor, key_padding_mask: Tensor | None, information: Information, clustering: Clustering
) -> Clusters:
    """The clusters of an image's keys, as if padding were not there.

    Args:
        keys: (B, N, C).
        key_padding_mask: (B, N) bool, True where padded, wherever that is; None: every token counts as real.
        information: from keys to smoothed information.
        clustering: from smoothed information to clusters.
    """
    logits = information.logits(keys)
    if key_padding_mask is None:
        return clustering(information(logits), None)
    order = key_padding_mask.to(torch.uint8).argsort(dim=1, stable=True)  # real tokens first, in raster order
    real = ~key_padding_mask.gather(1, order)
    smoothed = information(logits.gather(1, order), real)
    return clustering(smoothed, real).in_token_order(order)
