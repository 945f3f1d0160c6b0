"""Functions of the sum of two tensors, tokens and their positions, that keep the two for backward and not the sum.

Both are kept anyway, the positions once for all layers, and adding them again costs next to nothing.

Shapes: S tokens, C channels.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def linear_of_sum(x: Tensor, y: Tensor | None, weight: Tensor, bias: Tensor | None) -> Tensor:
    """F.linear of x + y, both (S, C); of x if y is None."""
    result: Tensor = F.linear(x, weight, bias) if y is None else _LinearOfSum.apply(x, y, weight, bias)
    return result


def weighted_sum(tokens: Tensor, addend: Tensor | None, weight: Tensor, index: Tensor, rows: int) -> Tensor:
    """Sums (rows, C) of tokens (S, C) plus `addend` (S, C) times weights (S,), each where its index (S,) says."""
    result: Tensor = _WeightedSum.apply(tokens, addend, weight, index, rows)
    return result


class _LinearOfSum(torch.autograd.Function):
    """As `linear_of_sum`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, y, weight)
        return F.linear(x + y, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, y, weight = ctx.saved_tensors
        of_sum = (gradient @ weight.to(gradient.dtype)).to(x.dtype)
        of_weight = gradient.t() @ (x + y).to(gradient.dtype)
        of_bias = gradient.sum(0).to(weight.dtype) if ctx.needs_input_grad[3] else None
        return of_sum, of_sum if ctx.needs_input_grad[1] else None, of_weight.to(weight.dtype), of_bias


class _WeightedSum(torch.autograd.Function):
    """As `weighted_sum`; autograd would keep the sum of tokens and addend, and its products with the weights too."""

    @staticmethod
    def forward(
        ctx: Any, tokens: Tensor, addend: Tensor | None, weight: Tensor, index: Tensor, rows: int
    ) -> Tensor:
        ctx.save_for_backward(tokens, addend, weight, index)
        dtype = torch.promote_types(tokens.dtype, weight.dtype)
        sums = tokens.new_zeros(rows, tokens.shape[1], dtype=dtype)
        return sums.index_add_(0, index, _plus(tokens, addend) * weight.unsqueeze(1)).to(tokens.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        tokens, addend, weight, index = ctx.saved_tensors
        of_rows = gradient.to(weight.dtype).index_select(0, index)
        of_weight = (of_rows * _plus(tokens, addend)).sum(1) if ctx.needs_input_grad[2] else None
        of_tokens = of_rows.mul_(weight.unsqueeze(1)).to(tokens.dtype)
        return of_tokens, of_tokens if ctx.needs_input_grad[1] else None, of_weight, None, None


def _plus(x: Tensor, y: Tensor | None) -> Tensor:
    return x if y is None else x + y
