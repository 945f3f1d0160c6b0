"""What detectors keep for backward, and that keeping less changes nothing."""

from __future__ import annotations

import pytest
import torch
from test_models import SMALL, batch_of
from torch import Tensor, nn
from torch.testing import assert_close
from torchvision.ops import FrozenBatchNorm2d

from models import build_model, layers
from models.backbone import Backbone, FrozenBatchNorm
from models.layers import Dropout, feed_forward


def test_feed_forward_keeps_one_tensor_between_its_layers() -> None:
    """Against autograd's own way with what was dropped; bytes of the hidden tensor, once."""
    first, second, dropout = nn.Linear(8, 64), nn.Linear(64, 8), nn.Dropout(0.25)
    x = torch.randn(50, 8, requires_grad=True)
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.shape == (50, 64):
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = feed_forward(x, first, second, dropout)
    (hidden,) = kept.values()
    positive = first(x).relu()
    assert 0.7 < (hidden > 0).sum() / (positive > 0).sum() < 0.8
    expected = second(positive * (hidden > 0) / 0.75)
    for one, other in zip(*(
        [found, *torch.autograd.grad(found.square().sum(), [x, *first.parameters(), *second.parameters()])]
        for found in (result, expected)
    ), strict=True):
        assert_close(one, other)


@pytest.mark.parametrize("frozen", ["none", "first", "input"])
@pytest.mark.parametrize("amp", [False, True])
@pytest.mark.parametrize("rows", [16, 25, 1024])
def test_feed_forward_without_dropout_is_autograds(
    rows: int, amp: bool, frozen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layers, "ROWS", rows)
    first, second = nn.Linear(8, 64), nn.Linear(64, 8, bias=False)
    first.requires_grad_(frozen != "first")
    x = torch.randn(2, 25, 8, requires_grad=frozen != "input")
    learned = [tensor for tensor in (x, *first.parameters(), *second.parameters()) if tensor.requires_grad]
    with torch.autocast("cpu", torch.bfloat16, enabled=amp):
        results = feed_forward(x, first, second, nn.Dropout(0.25).eval()), second(first(x).relu())
    for one, other in zip(*(
        [found, *torch.autograd.grad(found.float().square().sum(), learned)] for found in results
    ), strict=True):
        assert_close(one, other, **({"atol": 2e-2, "rtol": 2e-2} if amp else {}))


def test_feed_forward_runs_layers_that_are_more_than_their_weights() -> None:
    first, second, seen = nn.Linear(8, 16), nn.Linear(16, 8), []
    first.register_forward_hook(lambda module, inputs, output: seen.append(output))
    for graph in (True, False):
        with torch.set_grad_enabled(graph):
            feed_forward(torch.randn(5, 8), first, second, nn.Dropout(0.1))
    assert len(seen) == 2
    assert all((output < 0).any() for output in seen)


@pytest.mark.parametrize("rate", [0.001, 0.1, 0.5, 0.999999])
def test_dropout_draws_at_its_rate(rate: float) -> None:
    dropped = Dropout(rate)(torch.ones(401, 1001))
    assert_close((dropped == 0).float().mean().item(), rate, atol=4e-3, rtol=0)
    assert dropped.isfinite().all()
    if rate < 0.9:
        assert_close(dropped.mean().item(), 1.0, atol=1e-2, rtol=0)
        assert (dropped[:-1] == dropped[1:]).float().mean() < 1 - 1.5 * rate * (1 - rate)  # rows are drawn apart


def test_dropout_is_torchs_and_keeps_a_byte_a_value() -> None:
    x, kept = torch.randn(1000, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.nbytes) or tensor, lambda t: t):
        dropped = Dropout(0.25)(x)
    assert sum(kept) <= 1000
    (gradient,) = torch.autograd.grad(dropped.sum(), x)
    assert_close(dropped, x * gradient)
    assert set(gradient.tolist()) == {0.0, torch.tensor(1 / 0.75).item()}
    assert 650 < int((gradient > 0).sum()) < 850
    assert_close(Dropout(0.25).eval()(x), x)


@pytest.mark.parametrize("enact", [None, "paper"])
@pytest.mark.parametrize("name", ["detr", "anchor_detr"])
def test_recomputed_activations_change_no_gradient_and_keep_less(name: str, enact: str | None) -> None:
    """With dropout, which must draw the same twice."""
    models = {
        where: build_model(name, enact, **SMALL, dropout=0.2, checkpoint_activations=where)
        for where in ("none", "encoder", "backbone", "all")
    }
    images, pad_mask = batch_of((64, 96), (96, 32))
    kept, found = {}, {}
    for where, model in models.items():
        model.load_state_dict(models["none"].state_dict())
        torch.manual_seed(0)
        bytes_of: dict[int, int] = {}

        def keep(tensor: Tensor, sizes: dict[int, int] = bytes_of) -> Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = model(images, pad_mask)["pred_logits"].square().sum()
        loss.backward()
        kept[where] = sum(bytes_of.values())
        found[where] = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
    assert max(kept["encoder"], kept["backbone"]) < kept["none"]
    assert kept["all"] < min(kept["encoder"], kept["backbone"])
    for where, gradients in found.items():
        assert_close(gradients, found["none"], atol=0, rtol=0, msg=where)


def test_frozen_batch_norm_is_torchvisions_in_the_precision_of_its_input() -> None:
    ours, theirs = FrozenBatchNorm(6), FrozenBatchNorm2d(6)
    state = {key: torch.rand_like(value) + 0.5 for key, value in theirs.state_dict().items()}
    for norm in (ours, theirs):
        norm.load_state_dict(state)
    x = torch.randn(2, 6, 5, 7)
    assert_close(ours(x), theirs(x))
    halved = ours(x.bfloat16())
    assert halved.dtype == torch.bfloat16
    assert_close(halved.float(), theirs(x), atol=2e-2, rtol=2e-2)


def test_a_backbone_in_bf16_keeps_half() -> None:
    """No map in both precisions."""
    kept = {}
    backbone, images = Backbone("resnet10"), torch.randn(1, 3, 64, 64)
    for amp in (False, True):
        sizes: dict[int, int] = {}

        def keep(tensor: Tensor, sizes: dict[int, int] = sizes) -> Tensor:
            if tensor.dim() == 4 and tensor.shape[0] == 1 and tensor.shape[2] > 1:
                sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
        with hooks, torch.autocast("cpu", torch.bfloat16, enabled=amp):
            features = backbone(images)
        assert features.requires_grad
        kept[amp] = sum(sizes.values())
    assert kept[True] <= 0.6 * kept[False]
