"""Means of named numbers, over steps and processes."""

from __future__ import annotations

from collections.abc import Mapping

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
