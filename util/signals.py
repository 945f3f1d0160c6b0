"""Signals that ask a run to stop: Ctrl-C, a scheduler that needs the machine, SLURM before the time is up.

    signals = StopSignals()
    with signals.remembered():      # a signal is noted, and signals.requested tells; a second one stops at once
        ...
    if signals.requested:
        raise signals.stopped()
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

# Signal -> exit status. SIGUSR1, SLURM's warning, ends a run as SIGTERM does.
STATUSES = {
    getattr(signal, name): status
    for name, status in (("SIGTERM", 143), ("SIGUSR1", 143), ("SIGINT", 130))
    if hasattr(signal, name)
}


class Stopped(BaseException):  # not an Exception: nothing that handles errors may take it for one
    """A signal ended the run.

    Args:
        number: of the signal; None: another process had it.
    """

    def __init__(self, number: int | None = None) -> None:
        self.status = 143 if number is None else STATUSES[signal.Signals(number)]
        name = "another process" if number is None else signal.Signals(number).name
        super().__init__(f"stopped by {name}")


class StopSignals:
    """Whether a signal has asked this process to stop.

    Outside the block of `remembered` signals have their usual effect, at once even where a process waits for others.
    """

    def __init__(self) -> None:
        self._number: int | None = None

    @property
    def requested(self) -> bool:
        """Whether a signal came that was only noted."""
        return self._number is not None

    def stopped(self) -> Stopped:
        """What to raise once the work is safe."""
        return Stopped(self._number)

    @contextlib.contextmanager
    def remembered(self) -> Iterator[None]:
        """Inside the block the first signal is only noted, the second raises `Stopped`; then look at `requested`."""
        before: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():  # Python allows no other to take them
            before = {number: signal.signal(number, self._receive) for number in STATUSES}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _receive(self, number: int, _: FrameType | None) -> None:
        if self._number is not None:
            raise Stopped(number)
        self._number = number


def leave_signals_to_parent(_: int = 0) -> None:
    """For a loader process: a signal to the whole group is the parent's to answer. A second SIGTERM does end it."""
    for number in STATUSES:
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))
