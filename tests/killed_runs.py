"""Train, and be killed at random moments: python tests/killed_runs.py SIGNAL KILLS SEED FLAGS...

Every run is a fork of one process that has imported everything, so that starting again costs little. Each goes on from
what the one before left, until the training is done. Prints the exit statuses as JSON, negative for a signal that ended
a process from outside.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

import main as command

LONGEST = 2.5  # seconds until a run is killed


def start(flags: Sequence[str]) -> int:
    """A run in a process of its own; its id."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        torch.set_num_threads(1)
        log = os.open("killed_runs.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        status = command.main([*flags, "--resume", "auto"])
    finally:
        os._exit(status)


def run_for(flags: Sequence[str], seconds: float, number: int) -> int:
    """The exit status of a run that is sent the signal `number` after so many seconds, unless it is done."""
    child, deadline = start(flags), time.monotonic() + seconds
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(child, number)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main(number: int, kills: int, seed: int, flags: Sequence[str]) -> list[int]:
    """Statuses of all runs; the last is 0."""
    moments, statuses = random.Random(seed), []
    while not statuses or statuses[-1] != 0:
        seconds = moments.uniform(0, LONGEST) if len(statuses) < kills else 600.0
        statuses.append(run_for(flags, seconds, number))
        if statuses[-1] in (1, 2):
            raise SystemExit(Path("killed_runs.log").read_text()[-3000:])
    return statuses


if __name__ == "__main__":
    print(json.dumps(main(signal.Signals[sys.argv[1]], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])))
