"""The two loops: train for an epoch, evaluate."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Sequence
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
from util import distributed, memory
from util.errors import InputError
from util.meters import Averages


class StepOptions(NamedTuple):
    """How a training step is done; the fields of `Config` of the same names."""

    accumulate: int
    clip_max_norm: float
    amp: bool


def train_one_epoch(
    model: nn.Module,
    criterion: Criterion,
    loader: Iterable[Batch],
    optimizer: Optimizer,
    bar: tqdm[Any],
    device: torch.device,
    options: StepOptions,
) -> dict[str, float]:
    """Train on every batch of `loader` once.

    Args:
        model: a detector, or one in `DistributedDataParallel`.
        bar: a progress bar that counts batches.

    Returns:
        Means over the steps and processes: "loss", "grad_norm", each weighted loss and, with the suffix "_unscaled",
        each unweighted one.

    Raises:
        InputError: a loss or the gradient is not finite; the weights are those before the step.
    """
    model.train()
    averages = Averages()
    for group in _groups(loader, options.accumulate):
        batches = [batch.to(device) for batch in group]
        values = _accumulate_gradients(model, criterion, batches, options.amp)
        norm = nn.utils.clip_grad_norm_(model.parameters(), options.clip_max_norm or math.inf)
        step = {key: value / len(batches) for key, value in values.items()} | {"grad_norm": norm}
        numbers = _to_host(step)
        _demand_finite(numbers, batches)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        averages.add(numbers, weight=1)
        bar.set_postfix(_postfix(numbers, optimizer, bar, device, batches), refresh=False)
        bar.update(len(batches))
    return averages.over_processes(device)


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


def _accumulate_gradients(
    model: nn.Module, criterion: Criterion, batches: Sequence[Batch], amp: bool
) -> dict[str, Tensor]:
    """Forward and backward of each batch; the sums of the losses."""
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


def _demand_finite(numbers: dict[str, float], batches: Sequence[Batch]) -> None:
    wrong = [key for key, value in numbers.items() if not key.endswith("_unscaled") and not math.isfinite(value)]
    if not wrong:
        return
    images = [int(target["image_id"]) for batch in batches for target in batch.targets]
    raise InputError(
        f"{', '.join(f'{key} is {numbers[key]}' for key in wrong[:4])} on the images {images}; training stopped before "
        "this step changed the weights. Lower --lr, check these images' boxes, or turn --amp off"
    )


def _postfix(
    numbers: dict[str, float], optimizer: Optimizer, bar: tqdm[Any], device: torch.device, batches: Sequence[Batch]
) -> dict[str, str]:
    """What the progress bar shows beside time: loss, learning rate, images a second of all processes, peak memory."""
    rate = bar.format_dict["rate"] or 0.0
    return {
        "loss": f"{numbers['loss']:.3f}",
        "lr": f"{optimizer.param_groups[0]['lr']:.1e}",
        "img/s": f"{rate * len(batches[0].targets) * distributed.world_size():.1f}",
        "mem": f"{memory.peak_gib(device):.1f}GiB",
    }
