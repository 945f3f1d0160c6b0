"""util/step_guard.py: no step that is not finite reaches the weights, whether the host reads at once or a step late."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from util.step_guard import Outcome, StepGuard

STEPS = 8


def weights(optimizer: torch.optim.Optimizer) -> Tensor:
    return optimizer.param_groups[0]["params"][0].detach().clone()  # type: ignore[no-any-return]


def train(
    late: bool, bad: frozenset[int], wishes: dict[int, dict[str, bool]] | None = None
) -> tuple[list[Any], list[Tensor]]:
    """The outcomes of `STEPS` steps with the weights when each was known, and the weights after each call."""
    torch.manual_seed(0)
    parameter = nn.Parameter(torch.randn(5))
    optimizer = torch.optim.AdamW([parameter], lr=0.1, fused=True)
    guard: StepGuard[int] = StepGuard(optimizer, late)
    outcomes: list[tuple[Outcome[int], Tensor]] = []
    after = []
    for step in range(STEPS):
        parameter.grad = torch.randn(5) * (math.nan if step in bad else 1)
        numbers = {"loss": parameter.grad.sum(), "grad_norm": parameter.grad.norm()}
        known = guard.take(numbers, step, **(wishes or {}).get(step, {}))
        outcomes += [(outcome, weights(optimizer)) for outcome in known]
        after.append(weights(optimizer))
    outcomes += [(outcome, weights(optimizer)) for outcome in guard.drain()]
    return outcomes, after


@pytest.mark.parametrize("late", [False, True])
def test_every_step_has_one_outcome_in_order(late: bool) -> None:
    outcomes, _ = train(late, frozenset({3}), {1: {"save": True}, 5: {"stop": True}})
    assert [outcome.work for outcome, _ in outcomes] == list(range(STEPS))
    assert [outcome.work for outcome, _ in outcomes if outcome.bad] == [3]
    assert math.isnan(outcomes[3][0].numbers["loss"])


def test_finite_steps_are_the_same_early_and_late() -> None:
    (_, early), (_, late) = train(False, frozenset()), train(True, frozenset())
    assert_close(late, early, rtol=0, atol=0)


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("bad", [0, 3, STEPS - 1])
def test_weights_are_those_before_a_bad_step_when_it_is_known(late: bool, bad: int) -> None:
    outcomes, after = train(late, frozenset({bad}))
    [(outcome, known)] = [one for one in outcomes if one[0].bad]
    assert outcome.work == bad
    before = after[bad - 1] if bad else train(late, frozenset(range(STEPS)))[1][0]
    assert_close(known, before, rtol=0, atol=0)
    assert all(value.isfinite().all() for value in after)


def test_a_late_guard_goes_on_after_the_step_behind_a_bad_one() -> None:
    _, after = train(True, frozenset({3}))
    assert_close(after[4], after[2], rtol=0, atol=0)
    assert not torch.equal(after[5], after[4])


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("wish", ["stop", "save"])
def test_a_wish_is_told_with_the_step_that_the_weights_are_after(late: bool, wish: str) -> None:
    outcomes, after = train(late, frozenset(), {2: {wish: True}})
    [(outcome, known)] = [one for one in outcomes if getattr(one[0], wish)]
    assert outcome.work == (3 if late else 2)
    assert_close(known, after[outcome.work], rtol=0, atol=0)


@pytest.mark.parametrize("late", [False, True])
def test_a_wish_in_the_last_step_is_told_too(late: bool) -> None:
    outcomes, _ = train(late, frozenset(), {STEPS - 1: {"stop": True}})
    assert [outcome.work for outcome, _ in outcomes if outcome.stop] == [STEPS - 1]


@pytest.mark.gpu
def test_a_step_on_a_gpu_never_waits_for_it() -> None:
    parameter = nn.Parameter(torch.randn(5, device="cuda"))
    guard: StepGuard[int] = StepGuard(torch.optim.AdamW([parameter], fused=True), late=True)
    before = torch.cuda.get_sync_debug_mode()
    try:
        for step in range(4):
            parameter.grad = torch.ones_like(parameter)
            if step == 1:
                torch.cuda.set_sync_debug_mode("error")
            guard.take({"loss": parameter.grad.sum()}, step, save=step == 2)
    finally:
        torch.cuda.set_sync_debug_mode(before)
