"""Everything that a run must keep to go on later as if it had never stopped."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from util import checkpoint, distributed, environment
from util.logs import Record
from util.meters import Averages
from util.randomness import random_state, set_random_state

logger = logging.getLogger(__name__)

LoadWeights = Callable[[nn.Module, Mapping[str, Tensor]], None]
# Of what a checkpoint holds. 1, without a number: no position inside an epoch; it loads.
LAYOUT = 2


@dataclass
class Position:
    """How far an epoch is.

    batches: that every process has trained on.
    seconds: that it took.
    averages: of what this process has logged in it.
    """

    batches: int = 0
    seconds: float = 0.0
    averages: Averages = field(default_factory=Averages)


@dataclass
class TrainingState:
    """Weights, optimizer, schedule, and what happened so far.

    model: the detector itself, not its `DistributedDataParallel`.
    records: one for each epoch that was trained; the epochs done are their number.
    position: in the epoch after those.
    steps: of the optimizer, those that were skipped counted too.
    bad_steps: skipped, since a loss or the gradient was not finite.
    """

    model: nn.Module
    optimizer: Optimizer
    scheduler: LRScheduler
    records: list[Record] = field(default_factory=list)
    position: Position = field(default_factory=Position)
    steps: int = 0
    bad_steps: int = 0

    @property
    def epochs_done(self) -> int:
        return len(self.records)

    def end_epoch(self, record: Record) -> None:
        """Note a finished epoch; the next has not begun."""
        self.records.append(record)
        self.position = Position()

    def save(self, path: Path, config: Mapping[str, Any], **more: Any) -> None:
        """Write a checkpoint (a collective call; the main process writes, and the others wait).

        Args:
            more: entries for those who read the file, such as "class_names".

        Raises:
            InputError: in the main process, it cannot be written.
        """
        own = {"random_state": random_state(), "averages": self.position.averages.state()}
        processes = distributed.gather_objects(own)
        if distributed.is_main():
            state = {
                "layout": LAYOUT,
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "lr_scheduler": self.scheduler.state_dict(),
                "epoch": self.epochs_done - 1,  # DETR counts the finished epochs from 0
                "position": {"batches": self.position.batches, "seconds": self.position.seconds},
                "steps": self.steps,
                "bad_steps": self.bad_steps,
                "records": self.records,
                "random_states": [process["random_state"] for process in processes],
                "averages": [process["averages"] for process in processes],
                "config": dict(config),
                "commit": environment.commit(),
                **more,
            }
            checkpoint.save(state, path)
        distributed.barrier()  # a process that ends may have the others ended by its launcher

    def restore(self, state: Mapping[str, Any], load_weights: LoadWeights, global_batch: int) -> None:
        """Take over a checkpoint that `save` wrote.

        Args:
            state: as read.
            load_weights: puts weights into the model.
            global_batch: images of all processes in a batch now; if it was another, data come in another order.

        Raises:
            ValueError: it does not fit this run.
        """
        layout = state.get("layout", 1)
        if not isinstance(layout, int) or not 1 <= layout <= LAYOUT:
            raise ValueError(f"it has the layout {layout!r}, this code knows those up to {LAYOUT}; update the code")
        load_weights(self.model, state["model"])
        try:
            self.optimizer.load_state_dict(state["optimizer"])
            self.scheduler.load_state_dict(state["lr_scheduler"])
            self.records = [dict(record) for record in state["records"]]
            self.steps, self.bad_steps = int(state.get("steps", 0)), int(state.get("bad_steps", 0))
            self._restore_processes(state, global_batch)
        except (KeyError, TypeError, AttributeError, IndexError, RuntimeError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise ValueError(f"its training state is not one of this code's ({reason})") from None

    def _restore_processes(self, state: Mapping[str, Any], global_batch: int) -> None:
        rank, world_size = distributed.rank(), distributed.world_size()
        random_states = state["random_states"]
        if "position" in state:
            then = len(random_states) * int(state["config"]["batch_size"])
            batches = int(state["position"]["batches"]) * then // global_batch
            averages = Averages.of_process(state["averages"], rank, world_size)
            self.position = Position(batches, float(state["position"]["seconds"]), averages)
            if then != global_batch and distributed.is_main():
                logger.warning("batches have %d images over all processes, they had %d: data come in another order "
                               "than in an uninterrupted run", global_batch, then)  # fmt: skip
        if rank < len(random_states):
            set_random_state(random_states[rank])
