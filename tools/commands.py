"""What the commands share: errors of the person at the keyboard, and the flag of the device."""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable
from typing import ParamSpec

from util.errors import InputError

_Arguments = ParamSpec("_Arguments")


def one_line_errors(main: Callable[_Arguments, int]) -> Callable[_Arguments, int]:
    """A command's `main`, whose `InputError` becomes one line and exit status 2."""

    @functools.wraps(main)
    def run(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> int:
        try:
            return main(*args, **kwargs)
        except InputError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2

    return run


def add_device_flag(parser: argparse.ArgumentParser) -> None:
    """--device, for `inference_device`."""
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps (default: cuda where there is one)")
