"""The first losses of each of the nine detectors, on fixed seeds: a change that is to change no number changes none.

    python tests/test_golden_losses.py      writes them anew, after a change that is meant to
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.testing import assert_close

sys.path.insert(0, str(Path(__file__).parents[1]))

from configs.schema import recipe
from datasets import Batch, normalize
from models import build_criterion_from, build_model_from
from preparation import build_optimizer

FILE = Path(__file__).parent / "golden_losses.json"
STEPS = 20
NAMES = ("detr", "conditional_detr", "anchor_detr")
MODELS = [(name, enact) for name in NAMES for enact in (None, "paper", "official")]
SMALL: dict[str, Any] = {
    "backbone": "resnet10", "backbone_weights": None, "backbone_stage": 1, "backbone_frozen_stages": 0,
    "backbone_norm": "group", "dilation": False, "hidden_dim": 32, "nheads": 4, "dim_feedforward": 64, "enc_layers": 2,
    "dec_layers": 2, "num_queries": 8, "num_query_position": 4, "num_query_pattern": 2, "num_classes": 5,
    "dropout": 0.0, "lr": 1e-4, "lr_backbone": 1e-4,
}  # fmt: skip


def batch_of(draws: np.random.RandomState) -> Batch:
    """Three images of different sizes with 0, 1 and 2 objects."""
    images = torch.from_numpy(draws.randint(0, 256, (3, 3, 40, 48)).astype(np.uint8))
    pad_mask = torch.zeros(3, 40, 48, dtype=torch.bool)
    pad_mask[1, 24:], pad_mask[2, :, 32:] = True, True
    targets = [
        {"labels": torch.from_numpy(draws.randint(1, 5, count)).long(),
         "boxes": torch.from_numpy(draws.uniform(0.2, 0.4, (count, 4))).float()}
        for count in range(3)
    ]  # fmt: skip
    return Batch(images, pad_mask, targets)


@torch.no_grad()
def draw_weights(detector: nn.Module, draws: np.random.RandomState) -> None:
    """Every matrix and bias from numpy's frozen generator: torch's draws differ between its versions."""
    for name, parameter in detector.named_parameters():
        width = parameter[0].numel() ** -0.5 if parameter.dim() > 1 else 0.05
        low, high = (0.1, 0.9) if name == "position.weight" else (-width, width)
        if parameter.dim() > 1 or name.endswith("bias"):
            parameter.copy_(torch.from_numpy(draws.uniform(low, high, tuple(parameter.shape))))


def losses_of(model: str, enact: str | None) -> list[float]:
    """The loss of each of the first steps."""
    draws = np.random.RandomState(7)  # the one that numpy promises never to change
    config = recipe(model, enact, **SMALL)
    detector, criterion = build_model_from(config).train(), build_criterion_from(config)
    draw_weights(detector, draws)
    optimizer = build_optimizer(detector, config)
    losses = []
    for _ in range(STEPS):
        batch = batch_of(draws)
        values = criterion(detector(normalize(batch.images, batch.pad_mask), batch.pad_mask), batch.targets)
        loss = torch.stack([values[key] * weight for key, weight in criterion.weight_dict.items()]).sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(detector.parameters(), 0.1)
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize(("model", "enact"), MODELS)
def test_first_losses_are_those_of_the_file(model: str, enact: str | None) -> None:
    expected = json.loads(FILE.read_text())[f"{model} {enact}"]
    assert len(expected) == STEPS
    assert_close(torch.tensor(losses_of(model, enact)), torch.tensor(expected), rtol=1e-4, atol=0)


if __name__ == "__main__":
    golden = {f"{model} {enact}": losses_of(model, enact) for model, enact in MODELS}
    FILE.write_text(json.dumps(golden, indent=1) + "\n")
