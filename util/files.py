"""Files that come from elsewhere: only regular ones, only inside their folder, only of a size that fits into memory."""

from __future__ import annotations

import os
import stat
import unicodedata
from collections.abc import Sequence
from pathlib import Path

from util.errors import InputError

KINDS = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
LONGEST_NAME = 4096
# Control characters, halves of surrogate pairs, line and paragraph separators: each would break a line of a message.
UNPRINTABLE = frozenset({"Cc", "Cs", "Zl", "Zp"})


def regular_size(path: Path, largest: int | None = None) -> int:
    """Bytes of a regular file; reading a pipe or a device could go on for ever.

    Raises:
        InputError: `path` is something else, or has more than `largest` bytes.
        OSError: as `Path.stat`.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        kind = KINDS.get(stat.S_IFMT(status.st_mode), "a device")
        raise InputError(f"{path}: this is {kind}, not a file; correct its name")
    if largest is not None and status.st_size > largest:
        raise InputError(f"{path}: {status.st_size:,} bytes are more than the {largest:,} that are read of such a file")
    return status.st_size


def demand_inside(path: Path, roots: Sequence[Path]) -> None:
    """Follow every link of `path`; what it is in the end must lie in one of the folders `roots`, links followed too.

    Raises:
        InputError: it does not.
    """
    real = Path(os.path.realpath(path))
    if not any(real.is_relative_to(os.path.realpath(root)) for root in roots):
        raise InputError(
            f"{path}: this leads to {real}, outside the data folder; copy the file, or link the whole folder around it"
        )


def unprintable(text: str) -> bool:
    """Whether `text` is too long for a name, or would break a line of a message."""
    if len(text) > LONGEST_NAME:
        return True
    return not text.isprintable() and any(unicodedata.category(character) in UNPRINTABLE for character in text)
