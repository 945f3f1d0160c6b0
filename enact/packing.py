"""Clusters of images that stand one behind the other, without padding between them.

Shapes: B images of n_1 ... n_B tokens, S their sum; t_1 ... t_B clusters, R their sum; C channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from enact.clustering import Shared, free_to_read
from enact.information import Information
from enact.kernels import starts_of
from enact.method import Method, form_clusters
from enact.sums import weighted_sum


class PackedClusters(NamedTuple):
    """Clusters as rows of a matrix, those of the first image first.

    memberships: as in `Clusters.memberships`, an index (S,) of rows, R for none, and weights (S,).
    counts: t_1 ... t_B, or what they are at most.
    bias: (R,), to be added to the attention logits of each cluster, or None.
    starts: (B + 1,) int32, the first row of each image and the last one of the last; None: as the counts say.
    """

    memberships: list[Shared]
    counts: tuple[int, ...]
    bias: Tensor | None
    starts: Tensor | None = None

    def pool(self, tokens: Tensor, addend: Tensor | None = None) -> Tensor:
        """The weighted sum of the tokens of each cluster, `addend` (S, C) added to them first: (S, C) -> (R, C)."""
        rows = sum(self.counts) + 1  # the last one is of no cluster
        pooled = [weighted_sum(tokens, addend, weight, index, rows) for index, weight in self.memberships]
        return torch.stack(pooled).sum(0)[:-1] if len(pooled) > 1 else pooled[0][:-1]


def cluster_packed(
    keys: Tensor,
    lengths: Sequence[int],
    slots: Tensor,
    information: Information,
    method: Method,
    addend: Tensor | None = None,
    *,
    tight: bool = False,
) -> PackedClusters:
    """The clusters of packed keys.

    On a CPU an image has the rows that it needs. Elsewhere, where the number found is not known to the host, it has as
    many as its length allows, and the bias takes those that it does not need out of the attention.

    Args:
        keys: (S, C).
        lengths: n_1 ... n_B, each at least 1.
        slots: (S,) int64, the place of each token in the batch padded to its longest image, which is `rows_of(lengths,
            max(lengths))`.
        information: from keys to smoothed information.
        method: from information to clusters.
        addend: (S, C), added to the keys; None: nothing.
        tight: let the rows of an image begin where those that the one before it needs end, for a kernel that takes
            `starts` from the device. What is left over are rows behind the last image's.
    """
    longest = max(lengths)
    logits = unpack(information.logits(keys, addend), slots, len(lengths), longest)
    real = None
    if min(lengths) < longest:
        real = torch.arange(longest) < torch.tensor(lengths).unsqueeze(1)
        real = real.to(keys.device, non_blocking=True)
    clusters = form_clusters(logits, information, method, real)
    exact = free_to_read(slots)
    counts = tuple(clusters.count.tolist() if exact else (method.most_clusters(length) for length in lengths))
    starts = F.pad(clusters.count.cumsum(0), (1, 0)) if tight else starts_of(counts, slots.device)
    bias = clusters.bias
    if method.cluster_bias == "none" and (exact or tight):
        bias = None  # nobody attends to a cluster that is not there
    elif bias is not None and tight:
        rows = starts[:-1, None] + torch.arange(clusters.num_clusters, device=slots.device)
        rows = torch.where(clusters.pad_mask(), sum(counts), rows)
        bias = bias.new_zeros(sum(counts) + 1).scatter(0, rows.flatten(), bias.flatten())[:-1]
    elif bias is not None:
        bias = bias.flatten()[rows_of(counts, clusters.num_clusters).to(slots.device, non_blocking=True)]
    first = starts[slots // longest]
    memberships = []
    for index, weight in clusters.memberships():
        index = index.flatten()[slots]
        row = torch.where(index == clusters.num_clusters, sum(counts), index + first)
        memberships.append(Shared(row, weight.flatten()[slots]))
    return PackedClusters(memberships, counts, bias, starts.int() if tight else None)


def rows_of(lengths: Sequence[int], longest: int) -> Tensor:
    """Where the elements of packed sequences stand in a batch padded to `longest`, flattened: (S,) int64."""
    return torch.cat([torch.arange(length) + image * longest for image, length in enumerate(lengths)])


def unpack(packed: Tensor, slots: Tensor, batch: int, longest: int) -> Tensor:
    """(S, ...) -> (B, longest, ...), zero where padded; `slots` as in `cluster_packed`."""
    padded = packed.new_zeros(batch * longest, *packed.shape[1:]).index_copy(0, slots, packed)
    return padded.view(batch, longest, *packed.shape[1:])
