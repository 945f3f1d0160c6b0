"""The last look before a step changes the weights: all processes together take it or leave it.

On a GPU the host reads of a step only once the next is on its way, so that it never waits. The weights are safe all the
same: the optimizer itself skips a step that is not finite, and the one after it, since the host does not know yet.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from util import distributed

T = TypeVar("T")


@dataclass(frozen=True)
class Outcome(Generic[T]):
    """What came of a step.

    numbers: those that it was judged by.
    bad: one of them was not finite, in whichever process; the weights are what they were before it.
    stop, save: what a process wished; true only where the weights are those after this very step.
    work: what was handed over with it.
    """

    numbers: dict[str, float]
    bad: bool
    stop: bool
    save: bool
    work: T


@dataclass(frozen=True)
class _Pending(Generic[T]):
    """A step of which the host knows nothing yet: `figures` are its numbers, then bad, stop and save."""

    names: tuple[str, ...]
    figures: Tensor
    ready: torch.cuda.Event | None
    work: T

    def read(self) -> Outcome[T]:
        if self.ready is not None:
            self.ready.synchronize()
        *numbers, bad, stop, save = self.figures.tolist()
        return Outcome(dict(zip(self.names, numbers, strict=True)), bad > 0, stop > 0, save > 0, self.work)


class StepGuard(Generic[T]):
    """Takes the steps of an optimizer that are finite.

    Args:
        optimizer: a fused one if `late`.
        late: whether the host reads a step after it has started the next.
    """

    def __init__(self, optimizer: Optimizer, late: bool) -> None:
        self._optimizer: Any = optimizer
        self._late = late
        self._waiting: _Pending[T] | None = None
        self._bad_before: Tensor | None = None

    def take(
        self, numbers: Mapping[str, Tensor], work: T, *, stop: bool = False, save: bool = False
    ) -> list[Outcome[T]]:
        """Step if the numbers are finite in every process (a collective call).

        Args:
            numbers: scalars on one device, in the same order in every process.
            work: comes back with the outcome.
            stop, save: what this process wishes to do after a step; all do it after the same one.

        Returns:
            The steps that are known now, in order: this one, or if the guard is late up to two.
        """
        figures = torch.stack([value.detach().float() for value in numbers.values()])
        flags = _agree(~figures.isfinite().all(), stop, save)
        pending = _start_reading(tuple(numbers), torch.cat((figures, flags)), work)
        if not self._late:
            outcome = pending.read()
            if not outcome.bad:
                self._optimizer.step()
            return [outcome]
        self._step_on_device(flags[0])
        before, self._waiting = self._waiting, pending
        outcomes = [before.read()] if before is not None else []
        if not any(outcome.stop or outcome.save for outcome in outcomes):
            return outcomes
        wished = outcomes[0]
        return [replace(wished, stop=False, save=False), *self._settled(wished)]

    def drain(self) -> list[Outcome[T]]:
        """The step that is still to be read, if there is one."""
        waiting, self._waiting = self._waiting, None
        return [waiting.read()] if waiting is not None else []

    def _settled(self, wished: Outcome[T]) -> list[Outcome[T]]:
        """The step on its way, which has changed the weights already, with the wishes of the one before."""
        return [replace(last, stop=last.stop or wished.stop, save=last.save or wished.save) for last in self.drain()]

    def _step_on_device(self, bad: Tensor) -> None:
        self._optimizer.found_inf = bad if self._bad_before is None else torch.maximum(bad, self._bad_before)
        self._optimizer.step()
        self._bad_before = bad


def _agree(bad: Tensor, stop: bool, save: bool) -> Tensor:
    """(3,) float: whether any process has bad, stop, save."""
    flags = torch.zeros(3, device=bad.device)
    flags[0] = bad
    for place, wish in ((1, stop), (2, save)):
        if wish:
            flags[place].fill_(1.0)
    return distributed.sum_over_processes(flags).clamp_(max=1.0)


def _start_reading(names: tuple[str, ...], figures: Tensor, work: T) -> _Pending[T]:
    """Copy to the host without waiting for it."""
    if figures.device.type != "cuda":
        return _Pending(names, figures, None, work)
    on_host = torch.empty(figures.shape, dtype=figures.dtype, pin_memory=True).copy_(figures, non_blocking=True)
    ready = torch.cuda.Event()  # type: ignore[no-untyped-call]
    ready.record()
    return _Pending(names, on_host, ready, work)
