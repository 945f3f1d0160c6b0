"""Attention of sequences of unequal lengths: by one kernel, what a call for each gives."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from test_models import SMALL, batch_of
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.testing import assert_close

import enact.attention
import enact.clustering
import enact.kernels
import enact.packing
import enact.row_column
from enact import EnactAttention, EnactRowColumnAttention
from enact.kernels import DenseAttention, one_kernel, packed_attention, starts_of
from models import build_model
from models.packing import Packing, attend_packed

LENGTHS, COUNTS = (5, 1, 3), (4, 2, 3)

needs_kernel = pytest.mark.skipif(enact.kernels.VARLEN_ATTN is None, reason="torch has the kernel from 2.11 on")
needs_fakes = pytest.mark.skipif(torch.__version__ < "2.9", reason="fake tensors of older versions ask for a real GPU")


@pytest.fixture(autouse=True)
def _not_tried_yet() -> Iterator[None]:
    """What one test finds out about the kernel is not for another."""
    enact.kernels._kernel_runs.cache_clear()
    yield
    enact.kernels._kernel_runs.cache_clear()


def reference(
    query: Tensor, key: Tensor, value: Tensor, starts_q: Tensor, starts_k: Tensor, max_q: int, max_k: int, *,
    scale: float,
) -> Tensor:
    """What torch's `varlen_attn` documents."""
    assert starts_q.dtype == starts_k.dtype == torch.int32
    assert key.shape[-1] == value.shape[-1] == query.shape[-1]
    pieces = []
    for image in range(len(starts_q) - 1):
        (first_q, last_q), (first_k, last_k) = (starts[image : image + 2].tolist() for starts in (starts_q, starts_k))
        assert 0 < last_q - first_q <= max_q
        assert 0 < last_k - first_k <= max_k
        logits = torch.einsum("qhd,khd->hqk", query[first_q:last_q], key[first_k:last_k]) * scale
        pieces.append(torch.einsum("hqk,khd->qhd", logits.softmax(-1), value[first_k:last_k]))
    return torch.cat(pieces)


def pretend(patch: pytest.MonkeyPatch, counts_known: bool) -> list[list[int]]:
    """A CPU that has the kernel; where the keys of each image begin, for every call to come."""
    calls = []

    def kernel(*arguments: Any, scale: float) -> Tensor:
        calls.append(arguments[4].tolist())
        return reference(*arguments, scale=scale)

    patch.setattr(enact.kernels, "VARLEN_ATTN", kernel)
    for module in (enact.attention, enact.kernels, enact.row_column):
        patch.setattr(module, "one_kernel", lambda query, dropout: dropout == 0)
    if not counts_known:
        for module in (enact.clustering, enact.packing):
            patch.setattr(module, "free_to_read", lambda tensor: False)
    return calls


@pytest.mark.parametrize("spare", [0, 3])
@pytest.mark.parametrize("biased", [False, True])
def test_one_kernel_gives_what_calls_for_each_sequence_give(
    biased: bool, spare: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Results and gradients, also with rows behind the last sequence's and values narrower than keys."""
    monkeypatch.setattr(enact.kernels, "VARLEN_ATTN", reference)
    output = nn.Linear(2 * 6, 10)
    query, key, value = (torch.randn(rows, 2, width) for rows, width in ((9, 8), (9 + spare, 8), (9 + spare, 6)))
    bias = torch.randn(9 + spare) if biased else None
    inputs = [x.requires_grad_() for x in (query, key, value, bias) if x is not None]
    starts = starts_of(COUNTS, key.device)
    assert starts.tolist() == [0, 4, 6, 9]
    at_once = packed_attention((query, key, value), bias, LENGTHS, (7, 7, 7), starts, output, 0.0, 0.3)
    heads = query, key[:9], value[:9]
    one_by_one = packed_attention(heads, bias[:9] if biased else None, LENGTHS, COUNTS, None, output, 0.0, 0.3)
    assert_close(at_once, one_by_one)
    assert_close(*(torch.autograd.grad(result.square().sum(), inputs) for result in (at_once, one_by_one)))


@pytest.mark.parametrize("counts_known", [True, False])
@pytest.mark.parametrize(("name", "variant", "choices"), [
    ("detr", None, {}), ("detr", "paper", {}), ("detr", "plus", {}), ("detr", "paper", {"cluster_bias": "size"}),
    ("detr", "paper", {"regions": "tokens"}), ("detr", "paper", {"max_clusters": 3}), ("conditional_detr", "plus", {}),
    ("anchor_detr", "paper", {}), ("anchor_detr", "plus", {}),
])  # fmt: skip
def test_detectors_give_the_same_by_one_kernel(
    name: str, variant: str | None, choices: dict[str, Any], counts_known: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Results and gradients, with as many rows of clusters as there are or as there may be."""
    model: Any = build_model(name, variant, **SMALL, dropout=0.0, **choices)
    images, pad_mask = batch_of((256, 384), (384, 128), (32, 32))

    def run() -> tuple[Tensor, dict[str, Tensor]]:
        logits = model(images, pad_mask)["pred_logits"]
        model.zero_grad()
        logits.square().sum().backward()
        return logits, {key: p.grad for key, p in model.named_parameters() if p.grad is not None}

    expected, expected_gradients = run()
    calls = pretend(monkeypatch, counts_known)
    found, gradients = run()
    assert len(calls) == len(model.encoder.layers)
    if variant is not None:
        assert all(2 < starts[1] < starts[2] - 2 < starts[3] - 2 for starts in calls)
    assert_close(found, expected, atol=1e-5, rtol=1e-4)
    for key, gradient in expected_gradients.items():
        if not key.endswith("probability.bias"):  # its true gradient is zero
            assert_close(gradients[key], gradient, atol=2e-3 * float(gradient.abs().max()) + 1e-5, rtol=1e-3, msg=key)


@needs_fakes
def test_the_kernel_is_for_half_precision_on_gpus_that_run_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def too_old(*arguments: Any, **named: Any) -> Tensor:
        raise RuntimeError("FlashAttention only supports Ampere GPUs or newer.")

    monkeypatch.setattr(enact.kernels, "VARLEN_ATTN", lambda query, *arguments, **named: query)
    assert not one_kernel(torch.zeros(9, 2, 32, dtype=torch.bfloat16), 0.0)
    with FakeTensorMode():
        query = torch.zeros(9, 2, 32, dtype=torch.bfloat16, device="cuda")
        assert one_kernel(query, 0.0)
        assert one_kernel(query.half(), 0.0)
        assert not one_kernel(query.float(), 0.0)
        assert not one_kernel(query, 0.1)
        assert not one_kernel(query[..., :30], 0.0)
        assert not one_kernel(torch.zeros(9, 2, 256, dtype=torch.bfloat16, device="cuda"), 0.0)
        with sdpa_kernel(SDPBackend.MATH):
            assert not one_kernel(query, 0.0)
        for kernel in (None, too_old):
            enact.kernels._kernel_runs.cache_clear()
            monkeypatch.setattr(enact.kernels, "VARLEN_ATTN", kernel)
            assert not one_kernel(query, 0.0)


def three_images() -> Packing:
    pad_mask = torch.ones(3, 12, 20, dtype=torch.bool)
    for image, (height, length) in enumerate(((12, 15), (7, 20), (1, 3))):
        pad_mask[image, :height, :length] = False
    return Packing(pad_mask, torch.device("cpu"))


def move(packing: Packing, width: int, device: str) -> tuple[Tensor, Tensor]:
    """The packing to a device, for which there are tokens and positions then."""
    packing.slots = packing.slots.to(device)
    shape = (sum(packing.lengths), width)
    tokens, position = (torch.randn(shape, device=device, dtype=torch.bfloat16) for _ in range(2))
    return tokens, position


def self_attentions(width: int, device: str) -> list[nn.Module]:
    kinds: list[dict[str, Any]] = [{}, {"variant": "plus"}, {"cluster_bias": "size"}]
    place: dict[str, Any] = {"device": device, "dtype": torch.bfloat16}
    return [
        DenseAttention(width, 4, batch_first=True, **place),
        *(EnactAttention(width, 4, batch_first=True, **kind, **place) for kind in kinds),
        *(EnactRowColumnAttention(width, 4, **kind, **place) for kind in kinds),
    ]


def attend(attention: nn.Module, tokens: Tensor, position: Tensor, packing: Packing) -> Tensor:
    if isinstance(attention, EnactRowColumnAttention):
        inputs, added = (tokens + position, tokens + position, tokens, tokens, tokens), None
    else:
        inputs, added = (tokens, tokens, tokens), position
    return attend_packed(attention, *inputs, packing=packing, position=added)


@needs_fakes
@needs_kernel
def test_torchs_kernel_takes_what_it_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """On tensors that pretend to be on a GPU and hold no values, so that nothing can be read."""
    calls, kernel = [], enact.kernels.VARLEN_ATTN
    monkeypatch.setattr(enact.kernels, "VARLEN_ATTN", lambda *args, **named: calls.append(1) or kernel(*args, **named))
    packing = three_images()
    with FakeTensorMode(allow_non_fake_inputs=True):
        tokens, position = move(packing, 64, "cuda")
        attentions = self_attentions(64, "cuda")
        for attention in attentions:
            result = attend(attention, tokens, position, packing)
            assert (result.shape, result.dtype) == (tokens.shape, torch.bfloat16)
    assert len(calls) == len(attentions) + 1  # once to find out whether it runs


@pytest.mark.gpu
@needs_kernel
def test_the_gpus_kernel_gives_what_calls_for_each_image_give() -> None:
    """Results and gradients in bf16, whose numbers have three digits."""
    packing = three_images()
    tokens, position = move(packing, 64, "cuda")
    tokens.requires_grad_()
    for attention in self_attentions(64, "cuda"):
        found = []
        for kernel in (enact.kernels.VARLEN_ATTN, None):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(enact.kernels, "VARLEN_ATTN", kernel)
                result = attend(attention, tokens, position, packing)
            found.append((result, torch.autograd.grad(result.float().square().sum(), tokens)[0]))
        for one, other in zip(*found, strict=True):
            assert_close(one.float(), other.float(), atol=0.02 * float(other.abs().max()), rtol=0)
