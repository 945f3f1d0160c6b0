"""What a run says and leaves behind: console messages, log.txt, TensorBoard."""

from __future__ import annotations

import hashlib
import json
import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from util import distributed
from util.errors import InputError

LOG_NAME = "log.txt"
Record = dict[str, Any]


class _AboveBars(logging.Handler):
    """Writes messages to stderr, above the progress bars."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stderr)


def set_up_console() -> None:
    """Messages of the main process from INFO on, of the others only warnings; progress bars stay whole."""
    handler = _AboveBars()
    handler.setFormatter(logging.Formatter(f"{distributed.prefix()}%(message)s"))
    level = logging.INFO if distributed.is_main() else logging.WARNING
    logging.basicConfig(level=level, handlers=[handler], force=True)


def write_log(records: Sequence[Record], folder: Path) -> None:
    """log.txt: one JSON line an epoch, with DETR's keys."""
    temporary = folder / f".{LOG_NAME}.tmp"
    temporary.write_text("".join(json.dumps(record) + "\n" for record in records))
    temporary.replace(folder / LOG_NAME)


class Curves:
    """TensorBoard events of the main process, and a run of Weights & Biases if asked for; nothing in the others.

    Args:
        folder: of the run.
        first_epoch: what an earlier process wrote of this epoch and of later ones does not count.
        wandb_project: to log to as well; WANDB_MODE=offline keeps it in `folder`.
        config: of the run, for Weights & Biases.

    Raises:
        InputError: Weights & Biases is not installed, or does not start.
    """

    def __init__(
        self,
        folder: Path,
        first_epoch: int = 0,
        wandb_project: str | None = None,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        self._writer: SummaryWriter | None = None
        self._run: Any = None
        if distributed.is_main():
            self._writer = SummaryWriter(str(folder), purge_step=first_epoch if first_epoch > 0 else None)
            if wandb_project is not None:
                self._run = _start_wandb(wandb_project, folder, dict(config or {}))

    def add(self, epoch: int, numbers: Mapping[str, Any]) -> None:
        """Write every number of an epoch's record; train_loss -> train/loss."""
        parts = ((key.partition("_"), value) for key, value in numbers.items() if isinstance(value, int | float))
        scalars = {f"{group}/{name}": value for (group, _, name), value in parts if group in ("train", "test")}
        if self._writer is not None:
            for name, value in scalars.items():
                self._writer.add_scalar(name, value, epoch)
            self._writer.flush()
        if self._run is not None:
            self._run.log(scalars, step=epoch)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
        if self._run is not None:
            self._run.finish()


def _start_wandb(project: str, folder: Path, config: dict[str, Any]) -> Any:
    """A run of Weights & Biases, the same one again when the training in `folder` goes on."""
    try:
        import wandb
    except ImportError:
        raise InputError("--wandb needs Weights & Biases, which is not installed; pip install wandb") from None
    identity = hashlib.blake2b(str(folder.resolve()).encode(), digest_size=8).hexdigest()
    settings: dict[str, Any] = {
        "dir": str(folder), "id": identity, "name": folder.name, "resume": "allow", "config": config,
    }  # fmt: skip
    try:
        return wandb.init(project=project, **settings)
    except wandb.errors.Error as error:
        reason = " ".join(str(error).split())
        raise InputError(f"--wandb does not start ({reason}); log in, or set WANDB_MODE=offline") from None
