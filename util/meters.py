"""Means of named numbers, over steps and processes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from util import distributed


class Averages:
    """Weighted means of named numbers."""

    def __init__(self) -> None:
        self._sums: dict[str, float] = {}
        self._weight = 0.0

    def add(self, numbers: Mapping[str, float], weight: float) -> None:
        """Count `numbers` with `weight`; the same names each time."""
        for key, value in numbers.items():
            self._sums[key] = self._sums.get(key, 0.0) + weight * value
        self._weight += weight

    def over_processes(self, device: torch.device) -> dict[str, float]:
        """The means over everything that any process has added (a collective call).

        A process that added nothing takes part; the names are those of the processes that did.
        """
        names: list[str] = next((keys for keys in distributed.gather_objects(list(self._sums)) if keys), [])
        numbers = torch.tensor([self._sums.get(key, 0.0) for key in names] + [self._weight], dtype=torch.float64)
        if distributed.is_active():
            numbers = distributed.sum_over_processes(numbers.to(device))
        *sums, weight = numbers.tolist()
        return {key: value / weight for key, value in zip(names, sums, strict=True)}

    def state(self) -> dict[str, Any]:
        """What this process has added so far, as plain values."""
        return {"sums": dict(self._sums), "weight": self._weight}

    @classmethod
    def of_process(cls, states: Sequence[Mapping[str, Any]], rank: int, world_size: int) -> Averages:
        """Go on from what every process had added; what others than today's had is the first one's."""
        averages = cls()
        own = states[rank : rank + 1] if rank else [*states[:1], *states[world_size:]]
        for state in own:
            for key, value in state["sums"].items():
                averages._sums[key] = averages._sums.get(key, 0.0) + float(value)
            averages._weight += float(state["weight"])
        return averages
