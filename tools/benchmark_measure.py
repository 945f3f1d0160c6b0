"""Seconds and bytes, measured so that they can be compared.

Cells of one group take turns, run by run, so that a machine that gets slower or faster does so for all of them.
"""

from __future__ import annotations

import contextlib
import gc
import os
import re
import statistics
import sys
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch._dynamo.exc import TorchDynamoException
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

OUT_OF_MEMORY = "out of memory"
WARM_UP_RUNS = 2
GIB = 2**30
# What a step spends its time on, and the names of torch's operations that do it; the first that fits counts.
KINDS = {
    "fused attention": re.compile(r"scaled_dot_product|_(flash|efficient|cudnn|varlen)_att"),
    "matrix products": re.compile(r"aten::(mm|addmm|bmm|baddbmm)_?$"),
    "softmax": re.compile(r"softmax"),
    "random draws": re.compile(r"aten::(random_|bernoulli_?|native_dropout|uniform_)$"),
    "copies": re.compile(r"aten::(copy_|cat|index_select|index_add_|index_copy_|scatter_add_|fill_|zero_)$"),
}
OTHER_KIND = "the rest"

Step = Callable[[], object]
CellT = TypeVar("CellT", bound=Hashable)
T = TypeVar("T")


@dataclass
class Subject:
    """What is measured: steps, and what is known of it without a clock.

    Args:
        steps: by name; each is warmed up.
        facts: plain values for the report.
    """

    steps: dict[str, Step]
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Attempt(Generic[T]):
    """A result, or the reason why there is none."""

    result: T | None
    error: str | None = None


def attempt(action: Callable[[], T]) -> Attempt[T]:
    """Do something that may need more memory than there is, or that may not compile."""
    try:
        return Attempt(action())
    except (RuntimeError, MemoryError) as error:
        reason = _reason(error)
        if reason is None:
            raise
    gc.collect()  # what the failed run held, now that its frames are gone
    torch.cuda.empty_cache()  # does nothing where there is no GPU
    return Attempt(None, reason)


def _reason(error: Exception) -> str | None:
    """What a cell says in place of figures; None for an error that is nobody's but ours."""
    if isinstance(error, TorchDynamoException):
        return f"does not compile: {str(error).strip().splitlines()[0]}"
    said = any(text in str(error) for text in ("can't allocate memory", "bad_alloc"))
    if said or isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return OUT_OF_MEMORY
    return None


def measure(
    cells: Sequence[CellT],
    build: Callable[[CellT], Subject],
    device: torch.device,
    repeats: int,
    bar: tqdm[Any],
) -> dict[CellT, dict[str, Any]]:
    """Measure cells side by side.

    Args:
        cells: that are compared.
        build: makes what a cell stands for.
        repeats: timed runs of every step of every cell.
        bar: is moved on `repeats` + 1 times for each cell.

    Returns:
        For each cell its facts, for each step the seconds of `summary`, and "error", a reason or None.
    """
    subjects: dict[CellT, Subject] = {}
    results: dict[CellT, dict[str, Any]] = {}
    for cell in cells:
        bar.set_postfix_str(str(cell))
        built = attempt(lambda cell=cell: _warmed_up(build(cell), device))  # type: ignore[misc]
        results[cell] = {**(built.result.facts if built.result else {}), "error": built.error}
        if built.result:
            subjects[cell] = built.result
        bar.update(1 if built.result else 1 + repeats)
    for cell, seconds in _rounds(subjects, results, device, repeats, bar).items():
        results[cell] |= {name: summary(runs) for name, runs in seconds.items()}
    return results


def _warmed_up(subject: Subject, device: torch.device) -> Subject:
    for step in subject.steps.values():
        for _ in range(WARM_UP_RUNS):
            seconds_of(step, device)
    return subject


def _rounds(
    subjects: dict[CellT, Subject],
    results: dict[CellT, dict[str, Any]],
    device: torch.device,
    repeats: int,
    bar: tqdm[Any],
) -> dict[CellT, dict[str, list[float]]]:
    """Seconds of every run by cell and step; a cell that runs out of memory is dropped, and says so."""
    seconds: dict[CellT, dict[str, list[float]]]
    seconds = {cell: {name: [] for name in subject.steps} for cell, subject in subjects.items()}
    for turn in range(repeats):
        for cell in _rotated(list(subjects), turn):
            bar.set_postfix_str(f"{cell}, run {turn + 1} of {repeats}")
            timed = attempt(lambda steps=subjects[cell].steps: {  # type: ignore[misc]
                name: seconds_of(step, device) for name, step in steps.items()
            })
            if timed.result is None:
                del subjects[cell], seconds[cell]
                results[cell]["error"] = timed.error
                bar.update(repeats - turn)
                continue
            for name, value in timed.result.items():
                seconds[cell][name].append(value)
            bar.update()
    return seconds


def _rotated(cells: list[CellT], by: int) -> list[CellT]:
    """Whoever follows another cell finds its cache cold: let that be somebody else in every round."""
    first = by % len(cells) if cells else 0
    return cells[first:] + cells[:first]


def seconds_of(step: Step, device: torch.device) -> float:
    """The time of one run, with nothing of it or of what came before left on the device."""
    _synchronize(device)
    start = time.perf_counter()
    step()
    _synchronize(device)
    return time.perf_counter() - start


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def summary(runs: Sequence[float]) -> dict[str, Any]:
    """The median, the lowest and the highest of some runs, and all of them."""
    return {"median": statistics.median(runs), "lowest": min(runs), "highest": max(runs), "runs": list(runs)}


def time_shares(step: Step, device: torch.device) -> dict[str, float]:
    """The parts of a run's time that `KINDS` of operations take on the device, as torch's profiler sees it; sum 1."""
    on_gpu = device.type == "cuda"
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # a build for GPUs says on a CPU that there is none, as an error
    with profile(activities=[ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * on_gpu]) as profiler:
        seconds_of(step, device)
    spent = dict.fromkeys([*KINDS, OTHER_KIND], 0.0)
    for event in profiler.key_averages():  # of the operations; what runs on a GPU is theirs too
        if event.device_type == torch.autograd.DeviceType.CPU:  # type: ignore[attr-defined]
            kind = next((kind for kind, names in KINDS.items() if names.search(event.key)), OTHER_KIND)
            spent[kind] += event.self_device_time_total if on_gpu else event.self_cpu_time_total
    whole = sum(spent.values())
    return {kind: share / whole for kind, share in spent.items()}


def resident_bytes(device: torch.device) -> int:
    """What tensors hold on a CUDA device; 0 elsewhere."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def peak_bytes(step: Step, device: torch.device, own: nn.Module, others: int) -> int:
    """The memory of one run of a training step.

    Args:
        step: forward, backward, and an optimizer's step if there is one.
        device: on CUDA, the most that tensors held at any moment, weights and optimizer included. On a CPU, the most
            that autograd kept for backward at any moment, each storage once, weights and buffers left out.
        own: the module whose weights and buffers they are.
        others: bytes on the device that belong to something else.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        step()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - others
    with KeptBytes(own) as kept:
        step()
    return kept.peak


class KeptBytes:
    """What autograd keeps for backward inside a `with` block, each storage once.

    Args:
        module: weights and buffers of it do not count, since they are there anyway.

    Attributes:
        now: bytes.
        peak: the most of them.
    """

    def __init__(self, module: nn.Module) -> None:
        self._left_out = {_storage(tensor) for tensor in (*module.parameters(), *module.buffers())}
        self._users: dict[int, int] = {}
        self.now = self.peak = 0
        self._hooks = saved_tensors_hooks(lambda tensor: _Kept(tensor, self), lambda kept: kept.tensor)

    def __enter__(self) -> KeptBytes:
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._hooks.__exit__(*error)

    def add(self, tensor: Tensor) -> None:
        """Somebody keeps a tensor."""
        storage = _storage(tensor)
        self._users[storage] = self._users.get(storage, 0) + 1
        if self._users[storage] == 1 and storage not in self._left_out:
            self.now += tensor.untyped_storage().nbytes()
            self.peak = max(self.peak, self.now)

    def remove(self, tensor: Tensor) -> None:
        """Somebody keeps it no longer."""
        storage = _storage(tensor)
        self._users[storage] -= 1
        if self._users[storage] == 0 and storage not in self._left_out:
            self.now -= tensor.untyped_storage().nbytes()


class _Kept:
    """A tensor in the hands of autograd, which drops it when it has no more use for it."""

    def __init__(self, tensor: Tensor, ledger: KeptBytes) -> None:
        self.tensor, self._ledger = tensor, ledger
        ledger.add(tensor)

    def __del__(self) -> None:
        self._ledger.remove(self.tensor)


def _storage(tensor: Tensor) -> int:
    """The same for all views of one storage, while it lives; fake tensors have one too."""
    return int(tensor.untyped_storage()._cdata)


def matrix_product(device: torch.device, dtype: torch.dtype, size: int) -> Subject:
    """A product of square matrices, which tells the rate of the machine."""
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return Subject({"product": lambda: left @ right}, {"operations": 2 * size**3})


@contextlib.contextmanager
def memory_limit(gib: float | None, device: torch.device) -> Iterator[None]:
    """Let allocations beyond a limit fail as "out of memory" rather than bring the machine down.

    Args:
        gib: of tensors, beyond what is held now; None: on Linux without a GPU four fifths of what is free, else all.
        device: on CUDA the limit is that of its allocator; on a CPU that of the process, which only Linux enforces.
    """
    if device.type == "cuda":
        if gib is not None:
            total = torch.cuda.get_device_properties(device).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, gib * GIB / total), device)
        yield
        return
    if not sys.platform.startswith("linux"):
        yield
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    allowed = 0.8 * _kibibytes("/proc/meminfo", "MemAvailable") * 1024 if gib is None else gib * GIB
    resource.setrlimit(resource.RLIMIT_DATA, (int(_kibibytes("/proc/self/status", "VmData") * 1024 + allowed), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def _kibibytes(file: str, name: str) -> int:
    """A line "NAME: 123 kB" of a file under /proc."""
    line = next(line for line in Path(file).read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1])
