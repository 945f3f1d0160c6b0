"""main.py, whose second process has a loss that is not a number in its third step."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import engine
import main as command
from util import distributed

weighted, calls = engine._weighted, [0]


def poisoned(*arguments: Any) -> dict[str, Any]:
    values = weighted(*arguments)
    calls[0] += 1
    if distributed.rank() == 1 and calls[0] == 3:
        values["loss"] = values["loss"] * float("nan")
    return values


if __name__ == "__main__":
    engine._weighted = poisoned
    sys.exit(command.main())
