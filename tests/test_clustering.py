"""Clusters, against loops that follow the definitions of spec 1.2 and 2.3 to 2.5."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from enact.clustering import Clusters, curvature_sign, one_per_token, sign_change_regions, uniform_chunks


def rough(batch: int = 3, tokens: int = 60) -> Tensor:
    return 0.02 * torch.rand(batch, tokens)


def signs_by_hand(sequence: list[float]) -> list[bool]:
    padded = [0.0, *sequence, 0.0]
    return [2 * padded[n] - padded[n - 1] - padded[n + 1] > 0 for n in range(1, len(sequence) + 1)]


def regions_by_hand(sequence: list[float]) -> list[int]:
    signs, index = signs_by_hand(sequence), [0]
    for before, after in pairwise(signs):
        index.append(index[-1] + (before != after))
    return index


def pooled_by_hand(tokens: Tensor, scores: Tensor, index: list[int]) -> Tensor:
    rows = []
    for cluster in sorted(set(index)):
        members = [n for n, found in enumerate(index) if found == cluster]
        rows.append(scores[members].softmax(0) @ tokens[members])
    return torch.stack(rows)


def test_regions_are_the_maximal_runs_of_one_curvature_sign() -> None:
    smoothed = rough()
    clusters = sign_change_regions(smoothed)
    for image, sequence in enumerate(smoothed.tolist()):
        expected = regions_by_hand(sequence)
        assert clusters.index[image].tolist() == expected
        assert clusters.count[image] == expected[-1] + 1
    assert clusters.num_clusters == int(clusters.count.max())


def test_region_pooling_is_the_softmax_weighted_sum() -> None:
    smoothed, tokens = rough(2, 50), torch.randn(2, 50, 5)
    clusters = sign_change_regions(smoothed)
    pooled = clusters.pool(tokens)
    for image in range(2):
        expected = pooled_by_hand(tokens[image], smoothed[image], clusters.index[image].tolist())
        assert_close(pooled[image, : len(expected)], expected)
        assert_close(pooled[image, len(expected) :], torch.zeros_like(pooled[image, len(expected) :]))
    assert_close(clusters.pad_mask().sum(1), clusters.num_clusters - clusters.count)


def test_regions_of_a_padded_image_are_those_of_the_image_alone() -> None:
    alone = rough(1, 33)
    padded, real = torch.zeros(1, 47), torch.zeros(1, 47, dtype=torch.bool)
    padded[:, :33], real[:, :33] = alone, True
    expected, found = sign_change_regions(alone), sign_change_regions(padded, real)
    assert_close(found.index[:, :33], expected.index)
    assert_close(found.weight[:, :33], expected.weight)
    assert_close(found.weight[:, 33:], torch.zeros(1, 14))
    assert found.num_clusters == expected.num_clusters


@pytest.mark.parametrize("clustering", [sign_change_regions, uniform_chunks, one_per_token])
def test_weights_sum_to_one_in_every_cluster(clustering: object) -> None:
    clusters: Clusters = clustering(rough())  # type: ignore[operator]
    totals = clusters.pool(torch.ones(3, 60, 1)).squeeze(-1)
    assert_close(totals, (~clusters.pad_mask()).float())


def test_uniform_chunks_follow_the_released_arithmetic() -> None:
    smoothed, tokens = rough(3, 61), torch.randn(3, 61, 4)
    runs = [regions_by_hand(sequence)[-1] + 1 for sequence in smoothed.tolist()]
    length = round(sum(61 / count for count in runs) / 3)
    first = (61 % length) // 2
    chunks = 61 // length
    index = [min(max((n - first) // length, -1), chunks) for n in range(61)]
    clusters = uniform_chunks(smoothed)
    assert clusters.num_clusters == chunks
    pooled = clusters.pool(tokens)
    for image in range(3):
        kept = [n for n in range(61) if 0 <= index[n] < chunks]
        expected = pooled_by_hand(tokens[image, kept], smoothed[image, kept], [index[n] for n in kept])
        assert_close(pooled[image], expected)


@pytest.mark.parametrize(("tokens", "length"), [(11, 6), (13, 6)])
def test_chunk_length_is_rounded_half_to_even(tokens: int, length: int) -> None:
    """Two runs in 11 tokens are 5.5 each, in 13 tokens 6.5: both give 6."""
    smoothed = torch.ones(1, tokens)
    smoothed[0, : tokens // 2] = torch.linspace(0, 1, tokens // 2) ** 2  # bends up, then down from somewhere on
    runs = 1 + int((curvature_sign(smoothed)[0, 1:] != curvature_sign(smoothed)[0, :-1]).sum())
    expected = round(tokens / runs)
    assert uniform_chunks(smoothed).num_clusters == tokens // expected


def test_constant_information_gives_three_regions() -> None:
    """Zero outside makes both ends bend down (spec 3.2, item 16)."""
    clusters = sign_change_regions(torch.full((1, 30), 0.01))
    assert clusters.index[0].tolist() == [0] + [1] * 28 + [2]


@pytest.mark.parametrize("tokens", [1, 2, 3])
def test_a_few_tokens_are_clustered_too(tokens: int) -> None:
    clusters = sign_change_regions(rough(1, tokens))
    assert 1 <= clusters.num_clusters <= tokens
    assert uniform_chunks(rough(1, tokens)).num_clusters >= 1


def test_gradient_reaches_the_scores_through_the_weights_alone() -> None:
    scores = rough().requires_grad_()
    clusters = sign_change_regions(scores)
    clusters.pool(torch.randn(3, 60, 4)).square().sum().backward()
    assert scores.grad is not None
    assert scores.grad.abs().max() > 0
    assert not clusters.index.requires_grad


def test_every_real_token_is_in_a_cluster_and_no_padding_is() -> None:
    real = torch.arange(60) < torch.tensor([[60], [41], [1]])
    clusters = sign_change_regions(rough() * real, real)
    assert_close(clusters.index < clusters.num_clusters, real)
    assert_close(clusters.weight > 0, real)
