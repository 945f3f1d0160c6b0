"""enact.sums against the sum itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from enact.sums import linear_of_sum, weighted_sum

INDEX = torch.tensor([0, 0, 2, 3, 2])


def pooled(x: Tensor, y: Tensor | None, weight: Tensor) -> Tensor:
    return weighted_sum(x, y, weight, INDEX, 4)


def inputs_of(function: Callable[..., Tensor], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    others = [torch.randn(5)] if function is pooled else [torch.randn(3, 4), torch.randn(3)]
    return [x.to(dtype).requires_grad_() for x in (torch.randn(5, 4), torch.randn(5, 4), *others)]


@pytest.mark.parametrize("function", [linear_of_sum, pooled])
def test_value_and_gradient_are_those_of_the_sum(function: Callable[..., Tensor]) -> None:
    x, y, *others = inputs_of(function)
    assert_close(function(x, y, *others), function(x + y, None, *others), atol=0, rtol=0)
    assert torch.autograd.gradcheck(function, (x, y, *others))
    assert torch.autograd.gradcheck(lambda x, *others: function(x, None, *others), (x, *others))


@pytest.mark.parametrize("function", [linear_of_sum, pooled])
def test_the_sum_is_not_kept(function: Callable[..., Tensor]) -> None:
    kept: list[Tensor] = []
    x, y, *others = inputs_of(function)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        function(x, y, *others)
    expected = {tensor.data_ptr() for tensor in (x, y, *others, INDEX)}
    assert {x.data_ptr(), y.data_ptr()} <= {tensor.data_ptr() for tensor in kept} <= expected


def test_half_precision_gives_gradients_in_the_precision_of_the_weights() -> None:
    gradients: list[Any] = []
    inputs = inputs_of(linear_of_sum, torch.float32)
    for summed in (False, True):
        with torch.autocast("cpu", torch.bfloat16):
            x, y, *others = inputs
            result = F.linear(x + y, *others) if summed else linear_of_sum(x, y, *others)
        assert result.dtype == torch.bfloat16
        gradients.append(torch.autograd.grad(result.float().square().sum(), inputs))
    for found, expected in zip(*gradients, strict=True):
        assert found.dtype == torch.float32
        assert_close(found, expected, atol=2e-2, rtol=2e-2)
