"""EnactAttention: against dense attention, slow oracles, and the published test vectors (spec 2.9)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from enact import EnactAttention
from enact.clustering import Shared
from enact.kernels import biased_attention
from enact.method import VARIANTS, Method
from enact.packing import PackedClusters, rows_of, unpack


def make_attention(variant: str = "paper", **options: object) -> EnactAttention:
    return EnactAttention(32, 4, batch_first=True, variant=variant, **options)  # type: ignore[arg-type]


def pad(tokens: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """Tokens (B, N, C) spread over `total` slots in order, noise in the other slots; and the mask of those."""
    slots = torch.randperm(total)[: tokens.shape[1]].sort().values
    padded = 10 * torch.randn(len(tokens), total, tokens.shape[2])
    padded[:, slots] = tokens
    mask = torch.ones(len(tokens), total, dtype=torch.bool)
    mask[:, slots] = False
    return padded, mask


def test_one_cluster_per_token_is_dense_attention() -> None:
    dense = nn.MultiheadAttention(32, 4, batch_first=True)
    attention = make_attention()
    attention.load_state_dict(dense.state_dict(), strict=False)
    attention.method = Method(regions="tokens")
    query, key, value = torch.randn(2, 9, 32), torch.randn(2, 21, 32), torch.randn(2, 21, 32)
    mask = torch.arange(21) >= torch.tensor([[21], [13]])
    for key_padding_mask in (None, mask):
        expected = dense(query, key, value, key_padding_mask=key_padding_mask, average_attn_weights=False)
        found = attention(query, key, value, key_padding_mask=key_padding_mask, average_attn_weights=False)
        assert_close(found, expected)


def test_result_is_attention_over_the_pooled_clusters() -> None:
    attention = make_attention()
    key, value, query = torch.randn(1, 30, 32), torch.randn(1, 30, 32), torch.randn(1, 7, 32)
    clusters = attention.clusters(key)
    dense = nn.MultiheadAttention(32, 4, batch_first=True)
    state = attention.state_dict()
    dense.load_state_dict({name: state[name] for name in dense.state_dict()})
    expected = dense(query, clusters.pool(key), clusters.pool(value))[0]
    assert_close(attention(query, key, value)[0], expected)
    assert clusters.num_clusters < 30


@pytest.mark.parametrize("variant", ["paper", "official"])
@pytest.mark.parametrize("padded", [False, True])
def test_the_returned_map_reproduces_the_result(variant: str, padded: bool) -> None:
    """The map over keys, applied to the projected values, is what the fused kernel computes over clusters."""
    attention = make_attention(variant)
    key = value = torch.randn(2, 24, 32)
    mask = torch.arange(24) >= torch.tensor([[24], [17]]) if padded else None
    found, weights = attention(key, key, value, key_padding_mask=mask, average_attn_weights=False)
    assert weights is not None
    projection, bias = attention.in_proj_weight.chunk(3)[2], attention.in_proj_bias.chunk(3)[2]
    heads = (value @ projection.T).unflatten(-1, (4, 8)).transpose(1, 2)
    mass = weights.sum(-1, keepdim=True)
    expected = (weights @ heads + mass * bias.view(4, 1, 8)).transpose(1, 2).flatten(2)
    assert_close(found, attention.out_proj(expected), atol=1e-5, rtol=1e-4)
    if variant == "paper":
        assert_close(mass, torch.ones_like(mass))


def test_padding_anywhere_never_changes_a_real_token() -> None:
    attention, tokens = make_attention(), torch.randn(3, 40, 32)
    expected = attention(tokens, tokens, tokens, need_weights=False)[0]
    padded, mask = pad(tokens, 77)
    found = attention(padded, padded, padded, key_padding_mask=mask, need_weights=False)[0]
    assert_close(found[~mask].view(3, 40, 32), expected, atol=1e-6, rtol=1e-5)


def test_batch_mates_never_change_an_image() -> None:
    attention, tokens = make_attention(), torch.randn(3, 40, 32)
    tokens[1] = torch.randn(1, 32).expand(40, 32)  # a flat image has far fewer clusters
    mask = torch.arange(40) >= torch.tensor([[40], [40], [25]])
    together = attention(tokens, tokens, tokens, key_padding_mask=mask, need_weights=False)[0]
    for image in range(3):
        one = tokens[image : image + 1, : int((~mask[image]).sum())]
        alone = attention(one, one, one, need_weights=False)[0]
        assert_close(together[image : image + 1, : one.shape[1]], alone, atol=1e-6, rtol=1e-5)


def test_official_depends_on_padding_as_published() -> None:
    attention, tokens = make_attention("official"), torch.randn(1, 40, 32)
    padded, mask = pad(tokens, 60)
    found = attention(padded, padded, padded, key_padding_mask=mask, need_weights=False)[0]
    expected = attention(padded, padded, padded, need_weights=False)[0]
    assert_close(found, expected)


def test_an_image_of_padding_alone_stays_finite() -> None:
    attention, tokens = make_attention(), torch.randn(2, 10, 32)
    mask = torch.tensor([[False] * 10, [True] * 10])
    found = attention(tokens, tokens, tokens, key_padding_mask=mask)[0]
    assert found.isfinite().all()


def test_gradients_match_finite_differences() -> None:
    attention = EnactAttention(8, 2, batch_first=True).double()
    tokens = torch.randn(2, 14, 8, dtype=torch.float64, requires_grad=True)
    mask = torch.arange(14) >= torch.tensor([[14], [9]])

    def run(x: Tensor) -> Tensor:
        result: Tensor = attention(x, x, x, key_padding_mask=mask, need_weights=False)[0]
        return result

    assert torch.autograd.gradcheck(run, (tokens,))


def test_every_parameter_learns() -> None:
    attention, tokens = make_attention(), torch.randn(2, 40, 32)
    attention(tokens, tokens, tokens, need_weights=False)[0].square().sum().backward()
    silent = [name for name, p in attention.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    assert silent == []


def test_sequence_first_is_the_transpose_of_batch_first() -> None:
    first, second = make_attention(), EnactAttention(32, 4)
    second.load_state_dict(first.state_dict())
    tokens = torch.randn(2, 20, 32)
    mask = torch.arange(20) >= torch.tensor([[20], [11]])
    expected, expected_map = first(tokens, tokens, tokens, key_padding_mask=mask)
    turned = tokens.transpose(0, 1)
    found, found_map = second(turned, turned, turned, key_padding_mask=mask)
    assert_close(found.transpose(0, 1), expected)
    assert_close(found_map, expected_map)


def test_attention_dropout_acts_in_training_only() -> None:
    attention, tokens = make_attention(dropout=0.5), torch.randn(1, 20, 32)
    once, twice = (attention(tokens, tokens, tokens, need_weights=False)[0] for _ in range(2))
    assert (once - twice).abs().max() > 1e-3
    attention.eval()
    once, twice = (attention(tokens, tokens, tokens, need_weights=False)[0] for _ in range(2))
    assert_close(once, twice, rtol=0, atol=0)


def test_masks_between_single_keys_are_refused() -> None:
    attention, tokens = make_attention(), torch.randn(1, 5, 32)
    with pytest.raises(ValueError, match="attn_mask"):
        attention(tokens, tokens, tokens, is_causal=True)


def test_an_unknown_variant_is_refused() -> None:
    with pytest.raises(ValueError, match="paper, official"):
        make_attention("best")


def draw(shape: tuple[int, ...], phase: float) -> Tensor:
    """The generator of spec 2.9."""
    index = torch.arange(1, torch.Size(shape).numel() + 1, dtype=torch.float64)
    u = 43758.5453123 * torch.sin(12.9898 * index + phase)
    return (2 * (u - u.floor()) - 1).float().view(shape)


PUBLISHED_VECTORS = [
    # N, B, sigma, chunk length, out[0, 0, 0:4], out[57, last, 100:104], out[last, last, last], sum, sum of magnitudes
    (121, 2, 3.0, 6, (0.004027, -0.089534, 0.018735, -0.044302), (-0.066721, -0.001231, -0.009079, 0.016592),
     -0.086378, -80.012, 3097.042),
    (121, 1, 3.0, 5, (0.080135, -0.024044, 0.011977, -0.124781), (0.003571, -0.049596, -0.012146, 0.008142),
     0.053702, -54.338, 1697.612),
    (200, 2, 5.0, 7, (0.025677, -0.056692, -0.029439, -0.037788), (-0.059727, -0.088756, -0.038562, 0.006746),
     -0.005878, 1.252, 4572.735),
]  # fmt: skip


@pytest.mark.parametrize(
    ("n", "b", "sigma", "length", "first", "middle", "last", "total", "magnitude"), PUBLISHED_VECTORS
)
@torch.no_grad()
def test_official_gives_the_published_vectors(
    n: int, b: int, sigma: float, length: int,
    first: tuple[float, ...], middle: tuple[float, ...], last: float, total: float, magnitude: float,
) -> None:  # fmt: skip
    attention = EnactAttention(256, 8, smoothing_sigma=sigma, variant="official").eval()
    square = (256, 256)
    attention.information.probability.weight.copy_(0.15 * draw((1, 256), 1))
    attention.information.probability.bias.copy_(0.1 * draw((1,), 2))
    gains_and_phases = ((0.108, 3, 4), (0.108, 5, 6), (0.8, 7, 8))
    attention.in_proj_weight.copy_(torch.cat([gain * draw(square, phase) for gain, phase, _ in gains_and_phases]))
    attention.in_proj_bias.copy_(torch.cat([0.06 * draw((256,), phase) for _, _, phase in gains_and_phases]))
    attention.out_proj.weight.copy_(0.108 * draw(square, 9))
    attention.out_proj.bias.copy_(0.06 * draw((256,), 10))
    query, value = (1.7 * draw((n, b, 256), phase) for phase in (11, 12))
    assert_close(query[0, 0, :3], torch.tensor([1.516429, -0.514283, -0.564616]), atol=1e-6, rtol=0)
    found = attention(query, query, value)[0]
    clusters = attention.clusters(query.transpose(0, 1))
    assert clusters.num_clusters == n // length
    assert_close(found[0, 0, :4], torch.tensor(first), atol=1e-5, rtol=0)
    assert_close(found[57, -1, 100:104], torch.tensor(middle), atol=1e-5, rtol=0)
    assert_close(found[-1, -1, -1], torch.tensor(last), atol=1e-5, rtol=0)
    assert found.sum().item() == pytest.approx(total, abs=2e-2)
    assert found.abs().sum().item() == pytest.approx(magnitude, abs=2e-2)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize(
    "options", [{}, {"kdim": 20, "vdim": 12}, {"add_bias_kv": True}, {"add_zero_attn": True}, {"bias": False}], ids=str
)
def test_with_a_cluster_a_token_it_is_multihead_attention_in_every_form(options: Any, batch_first: bool) -> None:
    """Batches and single sequences, a bool and a float mask, the result and the map."""
    dense = nn.MultiheadAttention(32, 4, batch_first=batch_first, **options)
    attention = EnactAttention(32, 4, batch_first=batch_first, **options)
    missing, unexpected = attention.load_state_dict(dense.state_dict(), strict=False)
    assert (missing, unexpected) == (["information.probability.weight", "information.probability.bias"], [])
    attention.method = Method(regions="tokens")
    query, key, value = (torch.randn(2, count, width) for count, width in ((9, 32), (21, dense.kdim), (21, dense.vdim)))
    mask = torch.arange(21) >= torch.tensor([[21], [13]])
    as_float = torch.zeros(2, 21).masked_fill(mask, float("-inf"))
    batch = [tensor if batch_first else tensor.transpose(0, 1) for tensor in (query, key, value)]
    expected = dense(*batch, key_padding_mask=mask, average_attn_weights=False)
    for key_padding_mask in (mask, as_float):
        found = attention(*batch, key_padding_mask=key_padding_mask, average_attn_weights=False)
        assert_close(found, expected, atol=1e-5, rtol=1e-5)
    for image in range(2):
        single = [tensor[image] for tensor in (query, key, value)]
        expected = dense(*single, key_padding_mask=mask[image])
        assert_close(attention(*single, key_padding_mask=mask[image]), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("extra", [{}, {"add_bias_kv": True}, {"add_zero_attn": True}])
def test_packed_tokens_are_attended_to_as_padded_ones(variant: Any, extra: dict[str, bool]) -> None:
    """Learned and zero keys included."""
    attention = EnactAttention(16, 4, batch_first=True, variant=variant, **extra)
    lengths = (40, 23, 31)
    slots = rows_of(lengths, max(lengths))
    tokens, position = torch.randn(2, sum(lengths), 16)
    padded, padded_position = (unpack(x, slots, len(lengths), max(lengths)) for x in (tokens, position))
    mask = torch.arange(max(lengths)) >= torch.tensor(lengths).unsqueeze(1)
    located = padded + padded_position
    expected = attention(located, located, padded, key_padding_mask=mask, need_weights=False)[0]
    found = attention.attend_packed(tokens, tokens, tokens, lengths, slots, position)
    assert_close(found, expected[~mask], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("scale", [1.0, 0.3])
def test_a_bias_is_added_to_the_logits_of_its_cluster(scale: float) -> None:
    """The extra channel against the formula, gradients of the bias included."""
    query, key, value = torch.randn(2, 3, 5, 8), torch.randn(2, 3, 7, 8), torch.randn(2, 3, 7, 6)
    bias = torch.randn(2, 7).requires_grad_()
    expected = (query @ key.transpose(2, 3) * scale + bias[:, None, None]).softmax(-1) @ value
    found = biased_attention(query, key, value, bias, dropout=0.0, scale=scale)
    assert_close(found, expected)
    assert_close(*(torch.autograd.grad(result.square().sum(), bias)[0] for result in (found, expected)))


@pytest.mark.parametrize("memberships", [1, 2])
def test_pooling_of_packed_tokens_has_the_gradient_of_its_formula(memberships: int) -> None:
    index = [torch.tensor([0, 0, 2, 3, 2]), torch.tensor([1, 3, 3, 3, 0])][:memberships]  # 3: of no cluster

    def pool(tokens: Tensor, *weights: Tensor) -> Tensor:
        shares = [Shared(*pair) for pair in zip(index, weights, strict=True)]
        return PackedClusters(shares, (1, 2), None).pool(tokens)

    tokens, *weights = torch.randn(5, 4).double(), *torch.rand(memberships, 5).double()
    expected = torch.zeros(4, 4).double()
    for token in range(5):
        for rows, weight in zip(index, weights, strict=True):
            expected[rows[token]] += weight[token] * tokens[token]
    assert_close(pool(tokens, *weights), expected[:3])
    assert torch.autograd.gradcheck(pool, [x.requires_grad_() for x in (tokens, *weights)])


def test_pooling_of_packed_tokens_keeps_them_alone() -> None:
    kept = []
    tokens, weight = torch.randn(50, 64, requires_grad=True), torch.rand(50, requires_grad=True)
    clusters = PackedClusters([Shared(torch.arange(50) // 5, weight)], (4, 6), None)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        clusters.pool(tokens)
    assert {x.data_ptr() for x in kept if x.dim() == 2} == {tokens.data_ptr()}
