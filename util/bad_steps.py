"""Steps that were not finite, kept whole so that tools/replay.py can make them again."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from util import checkpoint, distributed

FOLDER = "bad_steps"
MOST_FILES = 5  # of a process


def describe(numbers: Mapping[str, float]) -> str:
    """Which numbers are not finite, the first few; without them, that another process has some."""
    wrong = [
        f"{key} is {value}"
        for key, value in numbers.items()
        if not key.endswith("_unscaled") and not math.isfinite(value)
    ]
    return ", ".join(wrong[:4]) or "numbers of another process are not finite"


def keep(state: Mapping[str, Any], folder: Path, step: int) -> Path | None:
    """Write what a step was made of; None if this process has written enough of them.

    Args:
        state: with the weights as "model".
        folder: of the run.
        step: of the run, from 0.
    """
    folder = folder / FOLDER
    own = f"rank{distributed.rank()}.pth"
    if len(list(folder.glob(f"step*_{own}"))) >= MOST_FILES:
        return None
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step{step:08d}_{own}"
    checkpoint.save(dict(state), path)
    return path
