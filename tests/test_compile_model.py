"""models.compile_model: few graphs for all sizes, the eager result, and eager where nothing compiles."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from test_models import SMALL, batch_of
from torch import nn
from torch._dynamo.utils import counters
from torch.testing import assert_close

from models import build_model, compile_model

# Canvases: square, wide, tall, and then others of these kinds.
FIRST = [((64, 96), (96, 32)), ((96, 128), (64, 160)), ((160, 64), (128, 96))]
OTHERS = [((128, 160), (160, 96)), ((160, 96), (96, 224)), ((192, 64), (96, 128))]


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def detector(name: str, enact: str | None) -> nn.Module:
    return build_model(name, enact, **SMALL, dilation=False, dropout=0.0)


def graphs() -> int:
    return int(counters["stats"]["unique_graphs"])


def losses(model: nn.Module, *sizes: tuple[int, int]) -> torch.Tensor:
    outputs = model(*batch_of(*sizes))
    return outputs["pred_logits"].square().mean() + outputs["pred_boxes"].square().mean()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "enact"), [("detr", "plus"), ("conditional_detr", "paper"), ("anchor_detr", None)]
)
def test_no_new_graph_for_a_new_size_in_training_and_evaluation(name: str, enact: str | None) -> None:
    model = compile_model(detector(name, enact), backend="aot_eager")

    def train_and_evaluate(sizes: Any) -> None:
        losses(model.train(), *sizes).backward()
        with torch.no_grad():
            losses(model.eval(), *sizes)

    for sizes in FIRST:
        train_and_evaluate(sizes)
    found = graphs()
    assert found > 0
    for sizes in OTHERS:
        train_and_evaluate(sizes)
    assert graphs() == found


@pytest.mark.parametrize("enact", [None, pytest.param("paper", marks=pytest.mark.slow)])
def test_compiled_is_eager(enact: str | None) -> None:
    """Losses and gradients; names of parameters and modules stay."""
    model = detector("detr", enact)
    names = list(model.state_dict())
    found = []
    for compiled in (False, True):
        if compiled:
            compile_model(model, backend="aot_eager")
        torch.manual_seed(0)
        loss = losses(model, *FIRST[0])
        parameters = {key: p for key, p in model.named_parameters() if p.requires_grad}
        gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        found.append((loss, dict(zip(parameters, gradients, strict=True))))
    assert graphs() > 0
    assert list(model.state_dict()) == names
    assert_close(found[1][0], found[0][0])
    for key, gradient in found[0][1].items():
        if gradient is not None and not key.endswith("probability.bias"):  # whose true gradient is zero
            scale = float(gradient.abs().max())
            assert_close(found[1][1][key], gradient, atol=2e-3 * scale + 1e-6, rtol=1e-3, msg=key)


def test_what_does_not_compile_runs_eager_after_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    def fails(graph: Any, inputs: Any) -> Callable[..., Any]:
        raise RuntimeError("no compiler here")

    model = detector("detr", "paper")
    expected = model.eval()(*(batch := batch_of(*FIRST[0])))
    with caplog.at_level(logging.WARNING, "models.compilation"):
        outputs = compile_model(model, backend=fails)(*batch)  # type: ignore[arg-type]
        model(*batch)
    assert_close(outputs, expected)
    assert [record.message for record in caplog.records if "torch.compile does not work" in record.message] != []
    assert sum(record.name == "models.compilation" for record in caplog.records) == 1
    with pytest.raises(torch._dynamo.exc.TorchDynamoException, match="no compiler here"):
        compile_model(detector("detr", "paper"), backend=fails, fall_back=False)(*batch)  # type: ignore[arg-type]
