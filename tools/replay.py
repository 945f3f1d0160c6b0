"""Make a training step again that was not finite, and say where it went wrong.

    python tools/replay.py outputs/detr/bad_steps/step00000123_rank0.pth

The file holds the weights before the step, its images and targets, and the random state. Printed are the numbers of the
step then and now, the first module whose output is not finite, and the parameters whose gradient is not. Losses are
divided by the objects of this file's process alone, so that those of a run of several processes differ by a factor.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import engine
from configs.schema import FIELD_NAMES, Config
from datasets import Batch
from models import build_criterion_from, build_model_from, load_weights
from preparation import pick_device
from tools.commands import one_line_errors
from util import checkpoint
from util.errors import InputError
from util.logs import set_up_console
from util.randomness import set_random_state

MOST_LINES = 12


@one_line_errors
def main(argv: Sequence[str] | None = None) -> int:
    """The command: 0 if the step was made again, whatever came of it; 2 if it could not be."""
    set_up_console()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="out of the folder bad_steps/ of a run")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default: cuda where there is one)")
    options = parser.parse_args(argv)
    for line in replay(options.file, pick_device(options.device)):
        print(line)
    return 0


def replay(path: Path, device: torch.device) -> list[str]:
    """What there is to say about a step, line by line (InputError: the file holds none)."""
    saved = checkpoint.load(path)
    missing = {"batches", "random_state", "numbers", "config", "image_ids"} - saved.keys()
    if missing:
        raise InputError(f"{path} holds no step: {', '.join(sorted(missing))} missing; name a file of bad_steps/")
    config = Config(**{name: value for name, value in saved["config"].items() if name in FIELD_NAMES})
    model = build_model_from(config).to(device).train()
    load_weights(model, saved["model"])
    weights = _first(
        f"{name} has {int((~value.isfinite()).sum())} values that are not finite"
        for name, value in saved["model"].items() if not value.isfinite().all()
    )  # fmt: skip
    outputs, numbers = _make_again(model, config, saved, device)
    gradients = _first(
        name for name, parameter in model.named_parameters()
        if parameter.grad is not None and not parameter.grad.isfinite().all()
    )  # fmt: skip
    return [
        f"step {saved['step']} of epoch {saved['epoch']}, learning rates {saved['learning_rates']}, "
        f"images {saved['image_ids']}",
        *_boxes(saved["batches"]),
        *(f"number    {line}" for line in _compared(saved["numbers"], numbers)),
        *(f"weights   {line}" for line in weights or ["all finite"]),
        *(f"output    {line}" for line in outputs[:1] or ["all finite"]),
        *(f"gradient  {line}" for line in gradients or ["all finite"]),
    ]


def _make_again(
    model: nn.Module, config: Config, saved: dict[str, Any], device: torch.device
) -> tuple[list[str], dict[str, float]]:
    """The modules whose output is not finite, in the order of their calls; the step's numbers."""
    found: list[str] = []
    for name, module in model.named_modules():
        module.register_forward_hook(_reporter(name or "the detector", found))
    batches = [Batch(**batch).to(device) for batch in saved["batches"]]
    set_random_state(saved["random_state"])
    values = engine.accumulate_gradients(model, build_criterion_from(config), batches, config.amp)
    norm = nn.utils.clip_grad_norm_(model.parameters(), math.inf)
    numbers = {key: float(value) / len(batches) for key, value in values.items()} | {"grad_norm": float(norm)}
    return found, numbers


def _reporter(name: str, found: list[str]) -> Any:
    def look(module: nn.Module, _: Any, output: Any) -> None:
        tensors = [value for value in _flat(output) if value.is_floating_point()]
        if any(not value.isfinite().all() for value in tensors):
            found.append(f"{name} ({type(module).__name__}) gives values that are not finite, the first to do so")

    return look


def _flat(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, dict):
        output = list(output.values())
    return [tensor for part in output for tensor in _flat(part)] if isinstance(output, list | tuple) else []


def _boxes(batches: Sequence[dict[str, Any]]) -> list[str]:
    """What is strange about the targets."""
    lines = []
    for batch in batches:
        for target in batch["targets"]:
            boxes = target["boxes"]
            if not boxes.isfinite().all() or bool((boxes[:, 2:] <= 0).any()):
                lines.append(f"boxes     image {int(target['image_id'])}: {boxes.tolist()}")
    return lines


def _compared(then: dict[str, float], now: dict[str, float]) -> list[str]:
    """Of the losses with a weight and of the gradient."""
    names = [name for name in then if not name.endswith("_unscaled")]
    return [f"{name}: {then[name]:.6g} then, {now.get(name, math.nan):.6g} now" for name in names]


def _first(lines: Any) -> list[str]:
    """The first few, and how many there are beyond."""
    every = list(lines)
    more = [f"and {len(every) - MOST_LINES} more"] if len(every) > MOST_LINES else []
    return every[:MOST_LINES] + more


if __name__ == "__main__":
    sys.exit(main())
