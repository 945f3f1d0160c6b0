"""util/logs.py: TensorBoard, and Weights & Biases where it is asked for."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_main import log_of, run

pytestmark = pytest.mark.usefixtures("empty_folder")


def scalars(folder: str, name: str) -> list[tuple[int, float]]:
    events = EventAccumulator(folder)
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


def test_curves_hold_every_epoch_once_over_a_run_that_went_on() -> None:
    assert run("--output_dir", "run", "--epochs", "2") == 0
    assert run("--output_dir", "run", "--epochs", "3", "--resume", "auto") == 0
    for name, key in (("train/loss", "train_loss"), ("test/loss", "test_loss")):
        expected = [(epoch, pytest.approx(record[key])) for epoch, record in enumerate(log_of("run"))]
        assert scalars("run", name) == expected
    assert [step for step, _ in scalars("run", "test/AP50")] == [0, 1, 2]


def test_weights_and_biases_are_kept_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    assert run("--output_dir", "run", "--epochs", "1", "--wandb", "detectors") == 0
    assert run("--output_dir", "run", "--epochs", "2", "--wandb", "detectors", "--resume", "auto") == 0
    files = list(Path("run/wandb").glob("offline-run-*/run-*.wandb"))
    assert len({file.stem for file in files}) == 1  # one run, whatever the number of its parts
    assert all(b"train/loss" in file.read_bytes() for file in files)


def test_without_the_package_the_error_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert run("--output_dir", "run", "--wandb", "detectors") == 2
    assert "pip install wandb" in capsys.readouterr().err
