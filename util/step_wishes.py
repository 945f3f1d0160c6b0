"""What a process wishes to do after a step: save because it is time, stop because a signal came."""

from __future__ import annotations

import time
from typing import NamedTuple

from util import distributed
from util.signals import StopSignals


class Wishes(NamedTuple):
    """What this process wishes all of them to do after a step: stop training, save a checkpoint."""

    stop: bool = False
    save: bool = False


class StepWishes:
    """What `engine.train_one_epoch` asks before each step: whether to stop or to save after it.

    Args:
        signals: that ask to stop.
        minutes: between checkpoints, by the main process's clock; 0: none for their time.
        steps: between checkpoints; 0: none for their number.
    """

    def __init__(self, signals: StopSignals, minutes: float, steps: int) -> None:
        self._signals, self._minutes, self._steps = signals, minutes, steps
        self.saved()

    def saved(self) -> None:
        """Begin to count anew."""
        self._since, self._steps_since = time.monotonic(), 0

    def __call__(self) -> Wishes:
        """For the step that comes now."""
        self._steps_since += 1
        late = distributed.is_main() and 0 < 60 * self._minutes <= time.monotonic() - self._since
        return Wishes(stop=self._signals.requested, save=late or 0 < self._steps <= self._steps_since)
