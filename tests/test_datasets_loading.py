"""Which process sees which image in which batch."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import Dataset

from datasets.coco import Batch
from datasets.loading import EpochBatches, EvalBatches, build_loader


class Numbers(Dataset):
    """Stands in for images: sample (epoch, index) is an image of one pixel that holds the index."""

    def __getitem__(self, key: tuple[int, int]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        epoch, index = key
        threads = torch.tensor(torch.get_num_threads())
        return torch.full((3, 1, 1), index, dtype=torch.uint8), {"epoch": torch.tensor(epoch), "threads": threads}


def whole_epoch(size: int, batch_size: int, world_size: int, epoch: int = 0, seed: int = 0) -> list[list[list[int]]]:
    """[batch][rank] -> indices."""
    ranks = []
    for rank in range(world_size):
        sampler = EpochBatches(size, batch_size, seed, rank, world_size)
        sampler.set_epoch(epoch)
        ranks.append([[index for _, index in batch] for batch in sampler])
    return [list(batch) for batch in zip(*ranks, strict=True)]


def test_two_processes_see_together_what_one_sees() -> None:
    alone = whole_epoch(size=23, batch_size=4, world_size=1, epoch=3)
    together = whole_epoch(size=23, batch_size=2, world_size=2, epoch=3)
    assert [first + second for first, second in together] == [only for (only,) in alone]


@pytest.mark.parametrize(("batch_size", "world_size"), [(1, 1), (3, 1), (1, 3), (2, 2), (4, 3)])
@pytest.mark.parametrize("size", [1, 2, 3, 5, 11, 12, 13, 24, 25])
def test_epoch_is_full_global_batches_without_repeats(size: int, batch_size: int, world_size: int) -> None:
    batches = whole_epoch(size, batch_size, world_size, epoch=2)
    seen = [index for batch in batches for part in batch for index in part]
    global_size = batch_size * world_size
    assert all(len(part) == batch_size for batch in batches for part in batch)
    assert set(seen) <= set(range(size))
    if size >= global_size:
        assert len(set(seen)) == len(seen) == size // global_size * global_size
    else:
        assert len(seen) == global_size
        assert set(seen) == set(range(size))
    assert len(EpochBatches(size, batch_size, 0, 0, world_size)) == len(batches)


def test_order_depends_on_epoch_and_seed_only() -> None:
    assert whole_epoch(50, 5, 1, epoch=1) == whole_epoch(50, 5, 1, epoch=1)
    assert whole_epoch(50, 5, 1, epoch=1) != whole_epoch(50, 5, 1, epoch=2)
    assert whole_epoch(50, 5, 1, epoch=1) != whole_epoch(50, 5, 1, epoch=1, seed=1)


def test_keys_carry_the_epoch_and_order_can_be_kept() -> None:
    sampler = EpochBatches(5, 2, seed=0, rank=0, world_size=1, shuffle=False)
    sampler.set_epoch(7)
    assert list(sampler) == [[(7, 0), (7, 1)], [(7, 2), (7, 3)]]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_start_skips_batches_until_the_next_epoch(num_workers: int) -> None:
    sampler = EpochBatches(20, 3, seed=0, rank=0, world_size=1)
    whole = list(sampler)
    sampler.set_epoch(0, start=4)
    assert len(sampler) == len(whole) == 6
    loader = build_loader(Numbers(), sampler, num_workers, pin_memory=False)
    seen = [batch.images[:, 0, 0, 0].tolist() for batch in loader]
    assert seen == [[index for _, index in keys] for keys in whole[4:]]
    sampler.set_epoch(1)
    assert len(list(loader)) == len(list(sampler)) == 6


@pytest.mark.parametrize(("batch_size", "world_size"), [(1, 1), (3, 1), (1, 3), (2, 2), (4, 3)])
@pytest.mark.parametrize("size", [1, 2, 3, 5, 11, 12, 13, 24, 25])
def test_evaluation_sees_every_image_once(size: int, batch_size: int, world_size: int) -> None:
    samplers = [EvalBatches(size, batch_size, rank, world_size) for rank in range(world_size)]
    batches = [batch for sampler in samplers for batch in sampler]
    assert sorted(key for batch in batches for key in batch) == [(0, index) for index in range(size)]
    assert all(1 <= len(batch) <= batch_size for batch in batches)
    assert [len(sampler) for sampler in samplers] == [len(list(sampler)) for sampler in samplers]


def test_process_without_images_evaluates_nothing() -> None:
    assert list(EvalBatches(2, 4, rank=3, world_size=4)) == []


@pytest.mark.parametrize("num_workers", [0, 2])
def test_loader_follows_the_sampler_through_epochs(num_workers: int) -> None:
    sampler = EpochBatches(12, 4, seed=0, rank=0, world_size=1)
    loader = build_loader(Numbers(), sampler, num_workers, pin_memory=False)
    for epoch in range(2):
        sampler.set_epoch(epoch)
        batches = list(loader)
        assert len(batches) == len(loader) == 3
        assert all(isinstance(batch, Batch) for batch in batches)
        assert {int(target["epoch"]) for batch in batches for target in batch.targets} == {epoch}
        seen = [batch.images[:, 0, 0, 0].tolist() for batch in batches]
        assert seen == [[index for _, index in batch] for batch in sampler]


def test_workers_use_one_thread_each() -> None:
    (batch,) = build_loader(Numbers(), EvalBatches(2, 2, 0, 1), 1, pin_memory=False)
    assert [int(target["threads"]) for target in batch.targets] == [1, 1]


def test_iterating_takes_nothing_from_the_default_generator() -> None:
    state = torch.get_rng_state()
    list(build_loader(Numbers(), EvalBatches(2, 2, 0, 1), 1, pin_memory=False))
    torch.testing.assert_close(torch.get_rng_state(), state)
