"""What a run says and leaves behind: console messages, log.txt, TensorBoard."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from util import distributed

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
    """TensorBoard events of the main process; does nothing in the others.

    Args:
        folder: of the run.
        first_epoch: what an earlier process wrote of this epoch and of later ones does not count.
    """

    def __init__(self, folder: Path, first_epoch: int = 0) -> None:
        purge = first_epoch if first_epoch > 0 else None
        self._writer = SummaryWriter(str(folder), purge_step=purge) if distributed.is_main() else None

    def add(self, epoch: int, numbers: Mapping[str, Any]) -> None:
        """Write every number of an epoch's record; train_loss -> train/loss."""
        if self._writer is None:
            return
        for key, value in numbers.items():
            group, _, name = key.partition("_")
            if isinstance(value, int | float) and group in ("train", "test"):
                self._writer.add_scalar(f"{group}/{name}", value, epoch)
        self._writer.flush()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
