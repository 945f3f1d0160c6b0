"""The published models' outputs on known weights (tests/parity holds copies of the fixtures)."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from models import build_criterion, build_model, build_postprocessor, load_weights

FOLDER = Path(__file__).parent / "parity"
sys.path.insert(0, str(FOLDER))
from fill import fill, images  # noqa: E402

# The published models themselves move by up to 1e-5 when their input moves by one part in a million.
TOLERANCE = {"atol": 1e-4, "rtol": 0.0}
FIXTURES = sorted(path.stem for path in FOLDER.glob("*.json"))


def published_weights(spec: dict[str, Any]) -> dict[str, Tensor]:
    aliases = spec["aliases"]
    return {key: torch.from_numpy(fill(aliases.get(key, key), tuple(shape))) for key, shape in spec["keys"].items()}


@pytest.mark.parametrize("name", FIXTURES)
@torch.no_grad()
def test_outputs_losses_and_scores_equal_the_published_ones(name: str) -> None:
    spec = json.loads((FOLDER / f"{name}.json").read_text())
    published = {key: torch.from_numpy(value) for key, value in np.load(FOLDER / f"{name}.npz").items()}
    options = dict(spec["build"])
    model_name = options.pop("name")
    model = build_model(model_name, **options).eval()
    load_weights(model, published_weights(spec))
    batch, pad_mask = (torch.from_numpy(array) for array in images(spec["image_sizes"], spec["seed"]))
    outputs = model(batch, pad_mask)
    stride, first = spec["query_stride"], outputs["aux_outputs"][0]
    assert_close(outputs["pred_logits"][:, ::stride], published["pred_logits"], **TOLERANCE)
    assert_close(outputs["pred_boxes"][:, ::stride], published["pred_boxes"], **TOLERANCE)
    assert_close(first["pred_logits"][:, ::stride], published["aux0_logits"], **TOLERANCE)
    assert_close(first["pred_boxes"][:, ::stride], published["aux0_boxes"], **TOLERANCE)

    targets = [{key: torch.tensor(value) for key, value in target.items()} for target in spec["targets"]]
    criterion = build_criterion(model_name, num_classes=91)
    losses = criterion(outputs, targets)
    assert criterion.weight_dict == spec["loss_weights"]
    for key in criterion.weight_dict:
        assert losses[key].item() == pytest.approx(spec["losses"][key], rel=1e-4, abs=1e-4), key
    assert losses["class_error"].item() == pytest.approx(spec["losses"]["class_error"], abs=1e-3)

    results = build_postprocessor(model_name)(outputs, torch.tensor([[480, 640]] * len(batch)))
    for index, result in enumerate(results):
        expected = published[f"post{index}_scores"].sort().values
        assert_close(result["scores"].sort().values, expected, **TOLERANCE)
