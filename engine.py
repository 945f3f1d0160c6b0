"""The two loops: train for an epoch, evaluate."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from tqdm import tqdm

from datasets import Batch, CocoEvaluator, CocoSummary, normalize
from models.criterion import Criterion, Normalizers
from models.postprocess import Postprocessor
from util import distributed
from util.meters import Averages
from util.randomness import random_state
from util.step_guard import Outcome, StepGuard
from util.step_wishes import Wishes


class StepOptions(NamedTuple):
    """How a training step is done; the fields of `Config` of the same names."""

    accumulate: int
    clip_max_norm: float
    amp: bool


class Work(NamedTuple):
    """What a step was made of: enough to make it again, with the weights before it.

    batches: on the device, as many as were accumulated.
    rates: learning rate of each group of parameters.
    random_state: before the first batch's forward.
    """

    batches: list[Batch]
    rates: list[float]
    random_state: dict[str, Any]

    @property
    def image_ids(self) -> list[int]:
        """Of all batches."""
        return [int(target["image_id"]) for batch in self.batches for target in batch.targets]


def train_one_epoch(
    model: nn.Module,
    criterion: Criterion,
    loader: Iterable[Batch],
    optimizer: Optimizer,
    device: torch.device,
    options: StepOptions,
    wishes: Callable[[], Wishes] = Wishes,
) -> Iterator[Outcome[Work]]:
    """Train on every batch of `loader` once.

    Args:
        model: a detector, or one in `DistributedDataParallel`.
        optimizer: a fused one on a GPU.
        wishes: asked before each step.

    Yields:
        What came of each step, on a GPU a step late. Its numbers are means over its batches: "loss", "grad_norm", each
        weighted loss, "class_error" and, with the suffix "_unscaled", each unweighted loss.
    """
    model.train()
    guard: StepGuard[Work] = StepGuard(optimizer, late=device.type == "cuda")
    for group in _groups(loader, options.accumulate):
        work = Work([batch.to(device) for batch in group], [g["lr"] for g in optimizer.param_groups], random_state())
        values = accumulate_gradients(model, criterion, work.batches, options.amp)
        norm = nn.utils.clip_grad_norm_(model.parameters(), options.clip_max_norm or math.inf)
        numbers = {key: value / len(group) for key, value in values.items()} | {"grad_norm": norm}
        outcomes = guard.take(numbers, work, **wishes()._asdict())
        optimizer.zero_grad(set_to_none=True)
        yield from outcomes
    yield from guard.drain()


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    criterion: Criterion,
    postprocess: Postprocessor,
    loader: Iterable[Batch],
    evaluator: CocoEvaluator,
    device: torch.device,
    amp: bool,
) -> tuple[dict[str, float], CocoSummary]:
    """Detect on every image of `loader` and score the detections of all processes.

    Returns:
        The mean losses an image, and the COCO figures.
    """
    model.eval()
    averages = Averages()
    for batch in tqdm(loader, desc="evaluate", unit="batch", leave=False, disable=not distributed.is_main()):
        batch = batch.to(device)
        outputs = forward(model, batch, amp)
        losses = criterion(outputs, batch.targets, _local_normalizers(criterion, batch, outputs))
        averages.add(_to_host(_weighted(criterion, losses)), weight=len(batch.targets))
        sizes = torch.stack([target["orig_size"] for target in batch.targets])
        evaluator.update([int(target["image_id"]) for target in batch.targets], postprocess(outputs, sizes))
    evaluator.synchronize()
    return averages.over_processes(device), evaluator.summarize()


def accumulate_gradients(
    model: nn.Module, criterion: Criterion, batches: Sequence[Batch], amp: bool
) -> dict[str, Tensor]:
    """Forward and backward of each batch.

    Returns:
        The sums over the batches of what `train_one_epoch` calls numbers, but for "grad_norm".
    """
    num_queries: Any = getattr(model, "module", model).num_queries
    normalizers = criterion.normalizers([batch.targets for batch in batches], num_queries)
    sums: dict[str, Tensor] = {}
    for batch in batches:
        with _gradient_exchange(model, batch is batches[-1]):
            values = _weighted(criterion, criterion(forward(model, batch, amp), batch.targets, normalizers))
            torch.autograd.backward(values["loss"] / len(batches))
        sums = {key: sums.get(key, 0) + value.detach() for key, value in values.items()}
    return sums


def _gradient_exchange(model: nn.Module, wanted: bool) -> contextlib.AbstractContextManager[Any]:
    """Processes exchange gradients once a step, with the last accumulated batch."""
    if isinstance(model, DistributedDataParallel) and not wanted:
        return model.no_sync()
    return contextlib.nullcontext()


def forward(model: nn.Module, batch: Batch, amp: bool) -> dict[str, Any]:
    """Normalise the images of a batch on their device and run the model, with bf16 autocast if `amp`."""
    images = normalize(batch.images, batch.pad_mask)
    with torch.autocast(images.device.type, torch.bfloat16, enabled=amp):
        outputs: dict[str, Any] = model(images, batch.pad_mask)
    return outputs


def _local_normalizers(criterion: Criterion, batch: Batch, outputs: dict[str, Any]) -> Normalizers:
    """Of this process alone, since in evaluation processes have different numbers of batches."""
    return criterion.normalizers([batch.targets], outputs["pred_logits"].shape[1], over_processes=False)


def _weighted(criterion: Criterion, losses: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weighted losses, their sum "loss", and all values as they are with the suffix "_unscaled"."""
    weighted = {key: losses[key] * weight for key, weight in criterion.weight_dict.items()}
    total = torch.stack(list(weighted.values())).sum()
    monitors = {"class_error": losses["class_error"]}
    return {"loss": total, **weighted, **monitors, **{f"{key}_unscaled": value for key, value in losses.items()}}


def _groups(batches: Iterable[Batch], size: int) -> Iterator[list[Batch]]:
    iterator = iter(batches)
    while group := list(islice(iterator, size)):
        yield group


def _to_host(values: dict[str, Tensor]) -> dict[str, float]:
    """Read scalars in one transfer."""
    return dict(zip(values, torch.stack(list(values.values())).detach().tolist(), strict=True))
