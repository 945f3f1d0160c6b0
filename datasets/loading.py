"""Which images a process sees in which batch, and the loader that fetches them."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from datasets.coco import Batch, CocoDetection, Target, collate
from datasets.randomness import mixed_seed
from util.errors import InputError
from util.signals import leave_signals_to_parent

Key = tuple[int, int]  # (epoch, index)


class EpochBatches(Sampler[list[Key]]):
    """Training batches: the order is a pure function of (seed, epoch), and the processes share each global batch.

    Global batch k is permutation[k*G : (k+1)*G] with G = batch_size * world_size, and each process takes its contiguous
    part. The last, incomplete global batch is dropped; a smaller data set is repeated to fill exactly one.

    Args:
        dataset_size: number of images, at least 1.
        batch_size: images a process and batch.
        seed: of the permutations.
        rank, world_size: this process and the number of processes.
        shuffle: False keeps the data set's order.
    """

    def __init__(
        self, dataset_size: int, batch_size: int, seed: int, rank: int, world_size: int, shuffle: bool = True
    ) -> None:
        self._dataset_size = dataset_size
        self._batch_size = batch_size
        self._seed = seed
        self._rank = rank
        self._global_size = batch_size * world_size
        self._shuffle = shuffle
        self._epoch = 0
        self._start = 0

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Choose the epoch of the iterations that follow, and the batch that they begin with, to go on inside it."""
        self._epoch, self._start = epoch, start

    def __len__(self) -> int:
        """Batches of a whole epoch, wherever iterations start."""
        return max(1, self._dataset_size // self._global_size)

    def __iter__(self) -> Iterator[list[Key]]:
        epoch, order = self._epoch, self._order(self._epoch)
        for batch in range(self._start, len(self)):
            first = batch * self._global_size + self._rank * self._batch_size
            yield [(epoch, index) for index in order[first : first + self._batch_size].tolist()]

    def _order(self, epoch: int) -> Tensor:
        order = torch.arange(self._dataset_size)
        if self._shuffle:
            generator = torch.Generator().manual_seed(mixed_seed("order", self._seed, epoch))
            order = torch.randperm(self._dataset_size, generator=generator)
        repeats = -(-self._global_size // self._dataset_size)
        return order.repeat(repeats)


class EvalBatches(Sampler[list[Key]]):
    """Evaluation batches: every image once over all processes, always of epoch 0.

    Process r takes the images r, r + world_size, ...; its last batch may be smaller, and it may have none at all.
    """

    def __init__(self, dataset_size: int, batch_size: int, rank: int, world_size: int) -> None:
        self._indices = range(rank, dataset_size, world_size)
        self._batch_size = batch_size

    def __len__(self) -> int:
        return -(-len(self._indices) // self._batch_size)

    def __iter__(self) -> Iterator[list[Key]]:
        for first in range(0, len(self._indices), self._batch_size):
            yield [(0, index) for index in self._indices[first : first + self._batch_size]]


class BatchLoader(DataLoader[tuple[Tensor, Target]]):
    """A DataLoader of `Batch` that keeps an `InputError` of a worker to its one line."""

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        try:
            yield from super().__iter__()
        except InputError as error:
            # A worker's error comes with the worker's traceback as its message; the last line is the message itself.
            last_line = str(error).splitlines()[-1]
            raise InputError(last_line.removeprefix(f"{InputError.__module__}.{InputError.__qualname__}: ")) from None


def build_loader(
    dataset: CocoDetection, batch_sampler: Sampler[list[Key]], num_workers: int, pin_memory: bool
) -> BatchLoader:
    """A loader of `Batch`.

    Args:
        num_workers: processes that read ahead and stay alive between epochs, each on one thread (torch sees to that);
            0: read in this process.
        pin_memory: page-locked batches, for `Batch.to` a CUDA device.
    """
    return BatchLoader(
        dataset,
        batch_sampler=batch_sampler,
        collate_fn=collate,
        worker_init_fn=leave_signals_to_parent,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        pin_memory=pin_memory,
        # Its own generator, so that iterating takes nothing from the default one, which dropout draws from.
        generator=torch.Generator(),
    )
