"""Steps that are not finite: stopped or skipped before the weights, kept in a file, made again by tools/replay.py."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from test_main import ROOT, log_of, run, torchrun, weights
from torch.testing import assert_close

import engine
import main as command
from datasets import Batch
from tools import replay
from util import bad_steps, checkpoint

pytestmark = pytest.mark.usefixtures("empty_folder")
EPOCH = 4  # steps of an epoch of 16 scenes


@pytest.fixture
def poisoned_image(monkeypatch: pytest.MonkeyPatch) -> int:
    """The model gives NaN for this image; it is one of the second step's of the first epoch."""
    forward, seen = engine.forward, []

    def poisoned(model: torch.nn.Module, batch: Batch, amp: bool) -> dict[str, Any]:
        outputs = forward(model, batch, amp)
        ids = [int(target["image_id"]) for target in batch.targets]
        if model.training:
            seen.append(ids)
            if len(seen) >= 2 and seen[1][0] in ids:
                outputs["pred_boxes"] = outputs["pred_boxes"].clone()
                outputs["pred_boxes"][ids.index(seen[1][0])] *= math.nan
        return outputs

    monkeypatch.setattr(engine, "forward", poisoned)
    return EPOCH


def test_an_image_with_a_loss_that_is_not_finite_stops_before_the_weights(
    poisoned_image: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    models: list[torch.nn.Module] = []
    build = command.build_model_from
    monkeypatch.setattr(command, "build_model_from", lambda config: models.append(build(config)) or models[0])
    assert run("--output_dir", "ill", "--checkpoint_steps", "1") == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: step 1, epoch 0: loss is nan")
    assert "stopped before this step changed the weights" in error
    assert_close(models[0].state_dict(), weights("ill"), rtol=0, atol=0)  # those of the checkpoint after step 0
    [file] = Path("ill/bad_steps").iterdir()
    assert file.name in error
    saved = checkpoint.load(file)
    assert (saved["step"], saved["epoch"], len(saved["image_ids"]), len(saved["batches"])) == (1, 0, 4, 1)
    assert math.isnan(saved["numbers"]["loss_bbox"])
    assert saved["learning_rates"] == [5e-4, 5e-4]
    assert str(saved["image_ids"]) in error
    assert_close(saved["model"], weights("ill"), rtol=0, atol=0)


def test_as_many_bad_steps_are_skipped_as_the_flag_says(
    poisoned_image: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--output_dir", "run", "--max_bad_steps", "2", "--epochs", "2") == 0
    said = [line for line in capsys.readouterr().err.splitlines() if "skipped" in line]
    assert [line.partition("skipped, ")[2][:14] for line in said] == ["1 of at most 2", "2 of at most 2"]
    assert all(math.isfinite(record["train_loss"]) for record in log_of("run"))
    state = torch.load("run/checkpoint.pth", weights_only=True)
    assert (state["steps"], state["bad_steps"]) == (2 * EPOCH, 2)
    assert {float(one["step"]) for one in state["optimizer"]["state"].values()} == {2 * EPOCH - 2}
    assert run("--output_dir", "other", "--max_bad_steps", "1", "--epochs", "2") == 2


def test_files_of_bad_steps_are_few(tmp_path: Path) -> None:
    kept = [bad_steps.keep({"model": {}}, tmp_path, step) for step in range(bad_steps.MOST_FILES + 3)]
    assert kept[bad_steps.MOST_FILES :] == [None] * 3
    assert len(list((tmp_path / bad_steps.FOLDER).iterdir())) == bad_steps.MOST_FILES


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("class_embed.bias", math.nan, ["weights   class_embed.bias has 1 values that are not finite",
                                        "output    class_embed (Linear) gives values that are not finite"]),
        ("encoder.layers.1.linear1.bias", 3e38, ["weights   all finite",
                                                 "output    encoder.layers.1.linear2 (Linear) gives"]),
    ],
)  # fmt: skip
def test_a_step_made_again_shows_where_it_went_wrong(
    name: str, value: float, expected: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    build = command.build_model_from

    def poisoned(config: Any) -> torch.nn.Module:
        model = build(config)
        with torch.no_grad():
            model.get_parameter(name)[2] = value
        return model

    with monkeypatch.context() as patched:
        patched.setattr(command, "build_model_from", poisoned)
        assert run("--output_dir", "ill", "--dropout", "0.3", "--accumulate", "2") == 2
    [file] = Path("ill/bad_steps").iterdir()
    capsys.readouterr()
    assert replay.main([str(file), "--device", "cpu"]) == 0
    said = capsys.readouterr().out
    for text in expected:
        assert text in said
    numbers = [line for line in said.splitlines() if line.startswith("number ")]
    assert len(numbers) > 3
    for line in numbers:  # dropout and all
        then, now = (word.strip().split()[0] for word in line.partition(": ")[2].split(","))
        assert then == now, line


def test_other_files_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--output_dir", "run", "--epochs", "1") == 0
    capsys.readouterr()
    assert replay.main(["run/checkpoint.pth"]) == 2
    assert "holds no step" in capsys.readouterr().err
    assert replay.main(["nowhere.pth"]) == 2


@pytest.mark.slow
def test_a_loss_of_one_process_stops_all_before_the_weights() -> None:
    done = torchrun(2, "--output_dir", "two", "--batch_size", "2", "--checkpoint_steps", "1",
                    script=ROOT / "tests" / "poisoned_main.py")  # fmt: skip
    assert done.returncode != 0
    assert "[rank 1] error: step 2, epoch 0: loss is nan" in done.stderr
    assert "[rank 0] error: step 2, epoch 0: " in done.stderr
    files = sorted(Path("two/bad_steps").iterdir())
    assert [file.name for file in files] == ["step00000002_rank0.pth", "step00000002_rank1.pth"]
    for file in files:
        assert_close(checkpoint.load(file)["model"], weights("two"), rtol=0, atol=0)
