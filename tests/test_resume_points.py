"""Order and augmentation draws do not depend on where a run was stopped: no training needed to see that."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator

import pytest
import torch
from PIL import Image
from torchvision import tv_tensors

from datasets import EpochBatches, train_transform
from datasets.randomness import cpu_seed, mixed_seed

IMAGES, BATCH = 5003, 2  # the last, incomplete batch of an epoch is dropped
TRANSFORM = train_transform((8, 10, 12), 24, (9, 11), (6, 9))
PICTURE = Image.frombytes("RGB", (16, 12), bytes(range(192)) * 3)


def draws(key: tuple[int, int]) -> bytes:
    """What augmentation makes of one picture and its box at this place of the order."""
    box = torch.tensor([[2.0, 3.0, 9.0, 8.0]])
    target = {"boxes": tv_tensors.BoundingBoxes(box, format="XYXY", canvas_size=(12, 16)), "labels": torch.ones(1)}
    with cpu_seed(mixed_seed("augment", 42, *key)):
        image, target = TRANSFORM(PICTURE, target)
    return image.numpy().tobytes() + target["boxes"].numpy().tobytes() + bytes(image.shape)


def steps(epoch: int, start: int, count: int, augment: bool) -> Iterator[bytes]:
    """Digests of `count` steps of a run that goes on at a batch of an epoch."""
    sampler = EpochBatches(IMAGES, BATCH, seed=42, rank=0, world_size=1)
    while count > 0:
        sampler.set_epoch(epoch, start)
        for keys in sampler:
            content = repr(keys).encode() + b"".join(draws(key) for key in keys if augment)
            yield hashlib.blake2b(content, digest_size=8).digest()
            count -= 1
            if count == 0:
                return
        epoch, start = epoch + 1, 0


def compare(count: int, stops: int, augment: bool) -> None:
    whole = list(steps(0, 0, count, augment))
    assert len(set(whole)) == count  # every step is another one
    a_run = len(EpochBatches(IMAGES, BATCH, 42, 0, 1))
    places = sorted(random.Random(5).sample(range(1, count), stops))
    pieces: list[bytes] = []
    for first, last in zip([0, *places], [*places, count], strict=True):
        torch.manual_seed(first)  # whatever a new process starts with
        pieces += steps(*divmod(first, a_run), last - first, augment)
    assert pieces == whole


def test_a_stopped_run_goes_on_in_the_same_order_with_the_same_draws() -> None:
    compare(1_000, 20, augment=True)


@pytest.mark.slow
def test_a_hundred_thousand_steps_are_the_same_over_resume_points() -> None:
    compare(100_000, 200, augment=False)
    compare(20_000, 50, augment=True)  # all of them take minutes
