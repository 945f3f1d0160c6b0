"""Checkpoint files: written whole or not at all, read without executing anything."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import shutil
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import torch

from util.archives import demand_plain_archive
from util.errors import InputError

logger = logging.getLogger(__name__)

LATEST = "checkpoint.pth"
PREVIOUS = "checkpoint_previous.pth"
BEST = "checkpoint_best.pth"
TEMPORARY = ".{}.{}.tmp"


def save(state: dict[str, Any], path: Path) -> None:
    """Write `state` (tensors and plain values) so that `path` always holds a complete file.

    The file is written beside its place, flushed to the disk, and renamed. One that stood there as `LATEST` is kept as
    `PREVIOUS`.

    Raises:
        InputError: it cannot be written; what stood there stands there still.
    """
    temporary: Path | None = None
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        temporary = Path(name)
        with os.fdopen(handle, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        if path.name == LATEST and path.exists():
            give_name(path, path.with_name(PREVIOUS))
        temporary.replace(path)
        _sync_folder(path.parent)
    except (OSError, RuntimeError) as error:
        hidden = error.__context__  # by torch's writer, of a full disk
        cause = hidden if isinstance(hidden, OSError) else error
        reason = getattr(cause, "strerror", None) or str(cause).splitlines()[0]
        raise InputError(
            f"cannot write {path} ({reason}); what was saved before is whole: make room, go on with --resume auto"
        ) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def give_name(path: Path, name: Path) -> None:
    """Let the file at `path` be found as `name` too, at once and whatever stood there.

    A hard link, since no checkpoint is ever written into; a copy where there are no links.
    """
    temporary = name.with_name(TEMPORARY.format(name.name, os.getpid()))
    temporary.unlink(missing_ok=True)
    try:
        temporary.hardlink_to(path)
    except OSError:
        shutil.copyfile(path, temporary)
    temporary.replace(name)
    temporary.unlink(missing_ok=True)  # a rename onto another link of the same file does nothing


def remove_leftovers(folder: Path) -> None:
    """Remove what a process that died while it wrote has left in `folder`."""
    for name in (LATEST, PREVIOUS, BEST, "checkpoint[0-9]*.pth"):
        for leftover in folder.glob(TEMPORARY.format(name, "*")):
            with contextlib.suppress(OSError):
                leftover.unlink()


def newest(folder: Path) -> Path | None:
    """The newest whole checkpoint of a run; None if it has none.

    A damaged one is passed over for the one before, with a warning.

    Raises:
        InputError: there are some, but none is whole.
    """
    reasons = []
    for path in (folder / LATEST, folder / PREVIOUS):
        if not path.exists():
            continue
        try:
            load(path)
        except InputError as error:
            reasons.append(str(error))
            logger.warning("passed over: %s", error)
        else:
            return path
    if reasons:
        raise InputError(f"no checkpoint of {folder} is whole ({reasons[0]}); name one with --resume, or start anew")
    return None


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint of ours, or one that DETR's, Conditional DETR's or Anchor DETR's code wrote.

    Those hold an `argparse.Namespace`, which is allowed; no other class is, and no code of the file is run.

    Raises:
        InputError: there is no such file, it is no checkpoint, or it is damaged.
    """
    state = read_safely(path)
    if not isinstance(state, dict) or not isinstance(state.get("model"), dict):
        raise InputError(f'{path} is not a checkpoint of a detector: it has no "model" entry')
    return state


def read_safely(path: Path) -> Any:
    """What `torch.save` wrote to `path`: tensors, plain values, an `argparse.Namespace`; on the CPU.

    Raises:
        InputError: whatever is wrong with the file, in one line.
    """
    try:
        demand_plain_archive(path)
        _demand_checksums(path)  # which torch.load does not look at
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"no checkpoint at {path}; check its name") from None
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    except Exception as error:  # the unpickler raises many kinds, whatever the damage
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise InputError(f"{path} is not a checkpoint that can be read safely: {reason[0]}") from None


def _demand_checksums(path: Path) -> None:
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise InputError(f"{path} is damaged: the checksum of its entry {damaged} is wrong")


def _sync_folder(folder: Path) -> None:
    """Make a rename in `folder` durable, where the system can."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
