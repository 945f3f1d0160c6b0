"""Everything that a run must keep to go on later as if it had never stopped."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from util import checkpoint, distributed
from util.logs import Record

LoadWeights = Callable[[nn.Module, Mapping[str, Tensor]], None]


@dataclass
class TrainingState:
    """Weights, optimizer, schedule, and what happened so far.

    model: the detector itself, not its `DistributedDataParallel`.
    records: one for each epoch that was trained; the epochs done are their number.
    """

    model: nn.Module
    optimizer: Optimizer
    scheduler: LRScheduler
    records: list[Record] = field(default_factory=list)

    @property
    def epochs_done(self) -> int:
        return len(self.records)

    def save(self, path: Path, config: Mapping[str, Any]) -> None:
        """Write a checkpoint (a collective call; the main process writes)."""
        random_states = distributed.gather_objects(_random_state())
        if not distributed.is_main():
            return
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "lr_scheduler": self.scheduler.state_dict(),
            "epoch": self.epochs_done - 1,  # DETR counts the finished epochs from 0
            "records": self.records,
            "random_states": random_states,
            "config": dict(config),
        }
        checkpoint.save(state, path)

    def restore(self, state: Mapping[str, Any], load_weights: LoadWeights) -> None:
        """Take over a checkpoint that `save` wrote.

        Raises:
            ValueError: it does not fit this run.
        """
        load_weights(self.model, state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["lr_scheduler"])
        self.records = list(state["records"])
        if len(state["random_states"]) == distributed.world_size():
            _set_random_state(state["random_states"][distributed.rank()])


def _random_state() -> dict[str, Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _set_random_state(state: Mapping[str, Tensor]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
