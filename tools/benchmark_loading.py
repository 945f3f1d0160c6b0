"""Reading images: 8-bit until they are on the device, beside DETR's way, floats from the loader on.

Both decode and augment with PIL, so that they see the same pixels.

Shapes: B images, H x W the largest of a batch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional

from configs.schema import Config
from datasets import CocoDetection, collate, normalize
from datasets.coco import Target
from datasets.transforms import IMAGENET_MEAN, IMAGENET_STD
from preparation import build_data
from tools.benchmark_measure import Subject
from util.errors import InputError

BYTES, FLOATS = "8-bit", "float, as published"
WAYS = (BYTES, FLOATS)

Sample = tuple[Tensor, Target]


class Loaded(NamedTuple):
    """Images of a batch, uint8 or float32 (B, 3, H, W), and its mask, bool (B, H, W), True where padded."""

    images: Tensor
    pad_mask: Tensor


def loading_subject(way: str, batch: int, config: Config, device: torch.device) -> Subject:
    """What a loader process does for a batch, training or evaluation, and what is left to do on the device.

    Raises:
        InputError: the data set is missing, or smaller than a batch.
    """
    train_set, val_set = build_data(config)
    for dataset in (train_set, val_set):
        if len(dataset) < batch:
            raise InputError(f"{dataset.source}: {len(dataset)} images are fewer than a batch; give a --batch_size")
    load = load_bytes if way == BYTES else load_floats
    loaded = load([train_set[0, index] for index in range(batch)])

    def finish() -> Tensor:
        images = loaded.images.to(device)
        return normalize(images, loaded.pad_mask) if way == BYTES else images

    steps: dict[str, Callable[[], object]] = {
        "train": lambda: _read(train_set, batch, load),
        "inference": lambda: _read(val_set, batch, load),
        "device": finish,
    }
    return Subject(steps, {"bytes": loaded.images.nbytes})


def load_bytes(samples: list[Sample]) -> Loaded:
    """As our loader does."""
    images, pad_mask, _ = collate(samples)
    return Loaded(images, pad_mask)


def load_floats(samples: list[Sample]) -> Loaded:
    """As DETR's does: each image standardised, then copied into a batch of zeros."""
    floats = [
        functional.normalize(functional.to_dtype(image, torch.float32, scale=True), IMAGENET_MEAN, IMAGENET_STD)
        for image, _ in samples
    ]
    height, width = (max(image.shape[axis] for image in floats) for axis in (1, 2))
    images = torch.zeros(len(floats), 3, height, width)
    pad_mask = torch.ones(len(floats), height, width, dtype=torch.bool)
    for row, image in enumerate(floats):
        images[row, :, : image.shape[1], : image.shape[2]] = image
        pad_mask[row, : image.shape[1], : image.shape[2]] = False
    return Loaded(images, pad_mask)


def _read(dataset: CocoDetection, batch: int, load: Callable[[list[Sample]], Loaded]) -> Loaded:
    with _one_thread():
        return load([dataset[0, index] for index in range(batch)])


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """As loader processes run."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
