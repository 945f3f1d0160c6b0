"""tools/without_training.py: a dense detector before and after `enact.apply`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from test_main import run

from tools import without_training

pytestmark = pytest.mark.usefixtures("empty_folder")


def measure(*flags: str) -> int:
    return without_training.main(["--device", "cpu", "--output", "found", "--draws", "1", *flags])


def test_it_scores_the_dense_model_and_then_every_kind_and_number_of_clusters() -> None:
    assert run("--epochs", "1") == 0
    flags = ["--kinds", "uniform", "paper", "plus, keys", "--sigmas", "0.5", "5"]
    assert measure("--checkpoint", "outputs/detr/checkpoint.pth", *flags) == 0
    rows = json.loads(Path("found.json").read_text())["rows"]
    assert [(row["kind"], row["sigma"]) for row in rows] == [
        ("dense", None), *((kind, sigma) for kind in ("uniform", "paper", "plus, keys") for sigma in (0.5, 5))
    ]  # fmt: skip
    lengths = [row["tokens a cluster"] for row in rows]
    assert lengths[0] == 1
    assert lengths[1] < lengths[2]
    assert lengths[1:3] == pytest.approx(lengths[3:5], rel=0.1)  # as many uniform ones, but for layer 2
    assert "| uniform | 0.5 |" in Path("found.md").read_text()
    assert Path("found.png").stat().st_size > 5000


def test_one_cluster_a_token_costs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(without_training.KINDS, "uniform", {"regions": "tokens"})
    scores = []
    evaluate = without_training.Run.evaluate
    monkeypatch.setattr(without_training.Run, "evaluate", lambda self: scores.append(evaluate(self)) or scores[-1])
    assert run("--epochs", "1") == 0
    assert measure("--checkpoint", "outputs/detr/checkpoint.pth", "--kinds", "uniform", "--sigmas", "3") == 0
    assert scores[-2]["test_loss"] == pytest.approx(scores[-1]["test_loss"], abs=1e-4)


def test_a_model_that_has_clusters_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--epochs", "1", "--enact") == 0
    assert measure("--checkpoint", "outputs/detr_enact/checkpoint.pth") == 2
    assert "is no dense DETR or Conditional DETR" in capsys.readouterr().err
