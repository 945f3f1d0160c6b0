"""Clusters, against loops that follow the definitions of spec 1.2 and 2.3 to 2.5."""

from __future__ import annotations

from itertools import groupby, pairwise
from typing import get_args

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from enact.clustering import (
    ABSENT,
    SOFTNESS,
    Clusters,
    Partition,
    Regions,
    curvature,
    log_mass,
    partition_tokens,
    softmax_in_clusters,
)
from enact.information import Information
from enact.method import Method, cluster_keys, form_clusters, method_of


def rough(batch: int = 3, tokens: int = 60) -> Tensor:
    return 0.02 * torch.rand(batch, tokens)


def cut(smoothed: Tensor, regions: Regions = "sign_change", real: Tensor | None = None, most: int = 99) -> Clusters:
    """Clusters of information as it stands, with the softmax of the information as weights."""
    limit = torch.full((len(smoothed),), most)
    partition = partition_tokens(regions, smoothed, real, limit, most)
    weight = softmax_in_clusters(smoothed, partition)
    return Clusters(partition.index, partition.count, partition.num_clusters, weight, None)


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
    clusters = cut(smoothed)
    for image, sequence in enumerate(smoothed.tolist()):
        expected = regions_by_hand(sequence)
        assert clusters.index[image].tolist() == expected
        assert clusters.count[image] == expected[-1] + 1
    assert clusters.num_clusters == int(clusters.count.max())


def test_region_pooling_is_the_softmax_weighted_sum() -> None:
    smoothed, tokens = rough(2, 50), torch.randn(2, 50, 5)
    clusters = cut(smoothed)
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
    expected, found = cut(alone), cut(padded, real=real)
    assert_close(found.index[:, :33], expected.index)
    assert_close(found.weight[:, :33], expected.weight)
    assert_close(found.weight[:, 33:], torch.zeros(1, 14))
    assert found.num_clusters == expected.num_clusters


@pytest.mark.parametrize("regions", get_args(Regions))
def test_weights_sum_to_one_in_every_cluster(regions: Regions) -> None:
    clusters = cut(rough(), regions)
    totals = clusters.pool(torch.ones(3, 60, 1)).squeeze(-1)
    assert_close(totals, (~clusters.pad_mask()).float())


def test_uniform_chunks_follow_the_released_arithmetic() -> None:
    smoothed, tokens = rough(3, 61), torch.randn(3, 61, 4)
    runs = [regions_by_hand(sequence)[-1] + 1 for sequence in smoothed.tolist()]
    length = round(sum(61 / count for count in runs) / 3)
    first = (61 % length) // 2
    chunks = 61 // length
    index = [min(max((n - first) // length, -1), chunks) for n in range(61)]
    clusters = cut(smoothed, "chunks")
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
    runs = 1 + int(((curvature(smoothed) > 0)[0].int().diff() != 0).sum())
    expected = round(tokens / runs)
    assert cut(smoothed, "chunks").num_clusters == tokens // expected


def test_constant_information_gives_three_regions() -> None:
    """Zero outside makes both ends bend down (spec 3.2, item 16)."""
    clusters = cut(torch.full((1, 30), 0.01))
    assert clusters.index[0].tolist() == [0] + [1] * 28 + [2]


def test_rounding_of_second_differences_moves_no_cut() -> None:
    """fp32 logits give the cuts that they give in fp64."""
    logits = torch.randn(64, 3400)
    information, method = Information(8, 3.0), Method()
    found, exact = (form_clusters(numbers, information, method) for numbers in (logits, logits.double()))
    assert_close(found.index, exact.index)
    assert found.weight.dtype == torch.float32


def test_tokens_of_no_probability_are_cut_by_no_rounding() -> None:
    logits = (-44 - 15 * torch.rand(1, 400)).index_fill(1, torch.tensor([150]), 0.0)
    information = Information(8, 3.0)
    found = form_clusters(logits, information, Method())
    moved = form_clusters(logits + 1e-6 * torch.randn(1, 400), information, Method())
    assert_close(moved.index, found.index)
    assert int(found.count) < 12  # around that token, and at both ends


@pytest.mark.parametrize("tokens", [1, 2, 3])
def test_a_few_tokens_are_clustered_too(tokens: int) -> None:
    clusters = cut(rough(1, tokens))
    assert 1 <= clusters.num_clusters <= tokens
    assert cut(rough(1, tokens), "chunks").num_clusters >= 1


def test_gradient_reaches_the_scores_through_the_weights_alone() -> None:
    scores = rough().requires_grad_()
    clusters = cut(scores)
    clusters.pool(torch.randn(3, 60, 4)).square().sum().backward()
    assert scores.grad is not None
    assert scores.grad.abs().max() > 0
    assert not clusters.index.requires_grad


def test_every_real_token_is_in_a_cluster_and_no_padding_is() -> None:
    real = torch.arange(60) < torch.tensor([[60], [41], [1]])
    clusters = cut(rough() * real, real=real)
    assert_close(clusters.index < clusters.num_clusters, real)
    assert_close(clusters.weight > 0, real)


def lengths_of(clusters: Clusters, image: int) -> list[int]:
    """Tokens of each cluster of an image, in the order of the tokens."""
    mine = [index for index in clusters.index[image].tolist() if index < clusters.num_clusters]
    return [len(list(members)) for _, members in groupby(mine)]


def test_an_image_with_more_regions_than_allowed_has_neighbours_merged_evenly() -> None:
    smoothed = rough()
    free, few = cut(smoothed), cut(smoothed, most=7)
    assert few.num_clusters == 7
    for image, sequence in enumerate(smoothed.tolist()):
        assert free.count[image] > 7
        regions = regions_by_hand(sequence)
        expected = [7 * region // (regions[-1] + 1) for region in regions]
        assert few.index[image].tolist() == expected
        merged = [len({r for r, e in zip(regions, expected, strict=True) if e == cluster}) for cluster in range(7)]
        assert max(merged) - min(merged) <= 1


@pytest.mark.parametrize("real", [None, torch.arange(60) < torch.tensor([[60], [41], [17]])])
def test_the_controls_have_as_many_clusters_as_the_regions(real: Tensor | None) -> None:
    smoothed = rough() if real is None else rough() * real
    regions, uniform, shuffled = (cut(smoothed, name, real) for name in ("sign_change", "uniform", "random"))  # type: ignore[arg-type]
    assert_close(uniform.count, regions.count)
    assert_close(shuffled.count, regions.count)
    for image in range(3):
        expected, even, mixed = (lengths_of(clusters, image) for clusters in (regions, uniform, shuffled))
        assert len(even) == len(expected)
        assert max(even) - min(even) <= 1
        assert sorted(mixed) == sorted(expected)
        assert mixed != expected


def test_log_mass_is_the_log_of_the_summed_exponentials_of_a_cluster() -> None:
    scores = torch.randn(1, 6)
    index = torch.tensor([[0, 0, 2, 2, 2, 4]])  # cluster 1 and 3 are empty, the last token is in none
    found = log_mass(scores, Partition(index, torch.tensor([4]), 4))[0]
    for cluster, members in ((0, [0, 1]), (2, [2, 3, 4]), (4, [5])):
        assert_close(found[cluster], scores[0, members].logsumexp(0))


def form(tokens: Tensor, mask: Tensor | None = None, **choices: object) -> tuple[Clusters, Tensor]:
    """Clusters of random keys, and the logits of their probability."""
    torch.manual_seed(1)
    information = Information(tokens.shape[-1], 3.0)
    return cluster_keys(tokens, mask, information, Method(**choices)), information.logits(tokens)  # type: ignore[arg-type]


@pytest.mark.parametrize("pooling", ["information", "scaled_information", "probability", "mean"])
def test_tokens_weigh_what_the_pooling_says(pooling: str) -> None:
    clusters, logits = form(torch.randn(1, 40, 8), pooling=pooling)
    smoothed = Information(8, 3.0)(logits)[0]
    scores = {"information": smoothed, "scaled_information": smoothed / smoothed.mean(), "probability": logits[0],
              "mean": torch.zeros(40)}[pooling]  # fmt: skip
    for cluster in range(clusters.num_clusters):
        members = clusters.index[0] == cluster
        assert_close(clusters.weight[0, members], scores[members].softmax(0))


def test_a_cluster_counts_for_its_size_or_for_its_share_of_the_probability() -> None:
    tokens = torch.randn(2, 40, 8)
    mask = torch.arange(40) >= torch.tensor([[40], [23]])
    size, _ = form(tokens, mask, cluster_bias="size")
    mass, logits = form(tokens, mask, cluster_bias="mass")
    assert size.bias is not None
    assert mass.bias is not None
    for image, real in ((0, 40), (1, 23)):
        probability = logits[image, :real].softmax(0)
        for cluster in range(size.num_clusters):
            members = size.index[image, :real] == cluster
            if members.any():
                assert_close(size.bias[image, cluster], members.sum().log())
                assert_close(mass.bias[image, cluster], (probability[members].sum() * real).log())
            else:
                assert size.bias[image, cluster] == mass.bias[image, cluster] == ABSENT


@pytest.mark.parametrize("variant", ["paper", "plus"])
def test_clusters_do_not_depend_on_how_far_the_canvas_goes(variant: str) -> None:
    """One for four real tokens at most, whatever the padding."""
    tokens = torch.randn(1, 61, 8)
    tokens[:, ::2] += 5 * torch.randn(8)  # so rough that regions have to be merged
    padded = torch.cat([tokens, torch.randn(1, 90, 8)], 1)
    mask = torch.arange(151)[None] >= 61
    method = method_of(variant)  # type: ignore[arg-type]
    information = Information(8, 0.5)
    alone, found = cluster_keys(tokens, None, information, method), cluster_keys(padded, mask, information, method)
    assert alone.num_clusters == 16
    assert_close(found.index[:, :61], alone.index)
    assert_close(found.weight[:, :61], alone.weight)


def test_a_place_puts_the_tokens_into_the_order_that_is_cut() -> None:
    tokens, place = torch.randn(2, 40, 8), torch.randperm(40)
    mask = torch.arange(40) >= torch.tensor([[40], [23]])
    sequence = place.argsort()
    expected, _ = form(tokens[:, sequence], mask[:, sequence])
    torch.manual_seed(1)
    found = cluster_keys(tokens, mask, Information(8, 3.0), Method(), place)
    assert_close(found.index[:, sequence], expected.index)
    assert_close(found.weight[:, sequence], expected.weight)


def test_tokens_beside_a_cut_belong_to_both_clusters_by_how_nearly_they_bend_neither_way() -> None:
    tokens = torch.randn(2, 40, 8)
    mask = torch.arange(40) >= torch.tensor([[40], [23]])
    hard, logits = form(tokens, mask, pooling="probability", cluster_bias="size")
    soft, _ = form(tokens, mask, pooling="probability", cluster_bias="size", boundary="soft")
    assert_close(soft.index, hard.index)
    assert soft.bias is not None
    for image, real in ((0, 40), (1, 23)):
        bend = curvature(Information(8, 3.0)(logits[image : image + 1, :real]))[0].abs()
        own = (bend / (SOFTNESS * bend.mean())).sigmoid()
        index, shares = hard.index[image].tolist(), torch.zeros(soft.num_clusters, real)
        for n in range(real):
            neighbours = [m for m in (n - 1, n + 1) if 0 <= m < real and index[m] != index[n]]
            shares[index[n], n] = own[n] if neighbours else 1
            if neighbours:
                shares[index[neighbours[0]], n] = 1 - own[n]
        weights = shares * logits[image, :real].exp()
        weights = weights / weights.sum(1, keepdim=True).clamp(min=1e-30)
        assert_close(soft.pool(tokens)[image], weights @ tokens[image, :real], atol=1e-5, rtol=1e-4)
        count = int(soft.count[image])
        assert_close(soft.bias[image, :count], shares.sum(1).log()[:count], atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_a_soft_boundary_moves_with_a_smaller_jump() -> None:
    """Where a token's curvature changes its sign the token itself moves without one; its neighbour starts to share."""
    tokens = torch.randn(1, 60, 4, dtype=torch.float64)
    jumps = {}
    for boundary in ("hard", "soft"):
        torch.manual_seed(3)
        information = Information(4, 3.0).double()
        method = Method(pooling="mean", boundary=boundary)  # type: ignore[arg-type]
        steps = [cluster_keys(tokens + 2e-4 * t * tokens.flip(1), None, information, method) for t in range(2000)]
        one, two = next(
            (one, two)
            for one, two in pairwise(steps)
            if one.num_clusters == two.num_clusters and not torch.equal(one.index, two.index)
        )
        jumps[boundary] = float((one.pool(tokens) - two.pool(tokens)).abs().max())
    assert jumps["hard"] > 0.1
    assert jumps["soft"] < 0.2 * jumps["hard"]


def test_a_gradient_moves_soft_boundaries_only() -> None:
    """With equal weights in a cluster nothing but the boundary depends on the probability."""
    for boundary, learns in (("hard", False), ("soft", True)):
        information, tokens = Information(8, 3.0), torch.randn(1, 40, 8)
        method = Method(pooling="mean", boundary=boundary)  # type: ignore[arg-type]
        pooled = cluster_keys(tokens, None, information, method).pool(tokens)
        assert pooled.requires_grad == learns
        if learns:
            (gradient,) = torch.autograd.grad(pooled.square().sum(), information.probability.weight)
            assert gradient.abs().sum() > 0


def test_a_soft_boundary_needs_regions_that_bend() -> None:
    with pytest.raises(ValueError, match="boundary soft needs regions sign_change, got uniform"):
        Method(regions="uniform", boundary="soft")


def test_unknown_choices_are_named() -> None:
    with pytest.raises(ValueError, match=r"pooling must be one of information, .* got 'max'"):
        method_of("paper", pooling="max")
    with pytest.raises(ValueError, match="variant must be one of paper, official, plus, got 'new'"):
        method_of("new")  # type: ignore[arg-type]
