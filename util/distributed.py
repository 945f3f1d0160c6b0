"""Several processes: start-up from torchrun's environment, and the few collectives that we use.

Every function also works in a single process without a process group.
"""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous


def is_launched() -> bool:
    """Whether torchrun (or a launcher that sets the same variables) started this process."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def initialize(device_type: str, timeout_minutes: float) -> None:
    """Join the process group that torchrun describes; without torchrun do nothing.

    Args:
        device_type: "cuda" (NCCL) or "cpu" (gloo).
        timeout_minutes: how long a collective may wait for the slowest process.
    """
    if not is_launched():
        return
    if device_type == "cuda":
        torch.cuda.set_device(local_rank())
    backend, timeout = "nccl" if device_type == "cuda" else "gloo", datetime.timedelta(minutes=timeout_minutes)
    store, rank, world_size = next(rendezvous("env://", timeout=timeout))
    if os.environ.get("GROUP_WORLD_SIZE", "1") == "1":
        # On one machine torchrun keeps its store when it starts processes again, and in it the addresses of the dead.
        start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        store = dist.PrefixStore(f"start_{start}", store)  # type: ignore[attr-defined]
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)


def shut_down() -> None:
    """Leave the process group, if there is one."""
    if is_active():
        dist.destroy_process_group()


def is_active() -> bool:
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    return dist.get_rank() if is_active() else 0


def world_size() -> int:
    return dist.get_world_size() if is_active() else 1


def local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", 0))


def prefix() -> str:
    """What a message begins with, so that one sees whose it is."""
    return f"[rank {rank()}] " if world_size() > 1 else ""


def is_main() -> bool:
    return rank() == 0


def barrier() -> None:
    if is_active():
        dist.barrier()


@contextlib.contextmanager
def node_leader_first() -> Iterator[None]:
    """Let one process of each machine run the block before the others do, as for something that it fetches or draws."""
    if local_rank() != 0:
        barrier()
    try:
        yield
    finally:
        if local_rank() == 0:
            barrier()


def sum_over_processes(values: Tensor) -> Tensor:
    """The elementwise sum of `values` over all processes, as a new tensor on the same device."""
    total = values.detach().clone()
    if is_active():
        dist.all_reduce(total)
    return total


def gather_objects(value: Any) -> list[Any]:
    """`value` of every process, in rank order, on every process (pickled between our own processes only)."""
    if not is_active():
        return [value]
    gathered: list[Any] = [None] * world_size()
    dist.all_gather_object(gathered, value)
    return gathered
