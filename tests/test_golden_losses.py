"""The first losses of each of the nine detectors, on fixed seeds: a change that is to change no number changes none.

    python tests/test_golden_losses.py      writes them anew, after a change that is meant to
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
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
    "dropout": 0.1, "lr": 1e-4, "lr_backbone": 1e-4,
}  # fmt: skip


def batch_of(step: int) -> Batch:
    """Three images of different sizes with 0, 1 and 2 objects, drawn from the step's seed."""
    generator = torch.Generator().manual_seed(step)
    images = torch.randint(0, 256, (3, 3, 40, 48), generator=generator, dtype=torch.uint8)
    pad_mask = torch.zeros(3, 40, 48, dtype=torch.bool)
    pad_mask[1, 24:], pad_mask[2, :, 32:] = True, True
    targets = [
        {"labels": torch.randint(1, 5, (count,), generator=generator),
         "boxes": 0.2 + 0.2 * torch.rand(count, 4, generator=generator)}
        for count in range(3)
    ]  # fmt: skip
    return Batch(images, pad_mask, targets)


def losses_of(model: str, enact: str | None) -> list[float]:
    """The loss of each of the first steps."""
    torch.manual_seed(7)
    config = recipe(model, enact, **SMALL)
    detector, criterion = build_model_from(config).train(), build_criterion_from(config)
    optimizer = build_optimizer(detector, config)
    losses = []
    for step in range(STEPS):
        batch = batch_of(step)
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
