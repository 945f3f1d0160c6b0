"""Checkpoint files: written whole or not at all, read without executing anything."""

from __future__ import annotations

import argparse
import contextlib
import os
import tempfile
from pathlib import Path
from typing import Any

import torch

from util.errors import InputError

LATEST = "checkpoint.pth"


def save(state: dict[str, Any], path: Path) -> None:
    """Write `state` (tensors and plain values) so that `path` always holds a complete file.

    The file is written beside its place, flushed to the disk, and renamed.
    """
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            Path(temporary).unlink()
        raise
    _sync_folder(path.parent)


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint of ours, or one that DETR's, Conditional DETR's or Anchor DETR's code wrote.

    Those hold an `argparse.Namespace`, which is allowed; no other class is, and no code of the file is run.

    Raises:
        InputError: there is no such file, or it is no checkpoint.
    """
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"no checkpoint at {path}; check --resume") from None
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    except Exception as error:  # the unpickler raises many kinds, whatever the damage
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise InputError(f"{path} is not a checkpoint that can be read safely: {reason[0]}") from None
    if not isinstance(state, dict) or not isinstance(state.get("model"), dict):
        raise InputError(f'{path} is not a checkpoint of a detector: it has no "model" entry')
    return state


def _sync_folder(folder: Path) -> None:
    """Make a rename in `folder` durable, where the system can."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
