"""The command itself, on a data set of a few drawn scenes and a model of a few thousand parameters."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from torch import Tensor
from torch.testing import assert_close

import main as command
from models.checkpoints import to_published
from util import checkpoint

ROOT = Path(__file__).parents[1]
TINY = [
    "--backbone", "resnet10", "--backbone_stage", "1", "--hidden_dim", "16", "--nheads", "2", "--dim_feedforward", "32",
    "--enc_layers", "2", "--dec_layers", "2", "--num_queries", "6", "--train_short_sides", "[32,40]",
    "--eval_short_side", "32", "--max_long_side", "64", "--num_workers", "0", "--device", "cpu", "--epochs", "2",
    "--batch_size", "4", "--clip_max_norm", "0.1", "--shapes_train", "16", "--shapes_val", "6", "--accumulate", "1",
    "--eval_every", "1",
]  # fmt: skip
Run = Callable[..., int]
pytestmark = pytest.mark.usefixtures("empty_folder")


def run(*flags: str) -> int:
    return command.main([*TINY, *flags])


def weights(folder: str | Path) -> dict[str, Tensor]:
    return torch.load(Path(folder) / checkpoint.LATEST, weights_only=True)["model"]  # type: ignore[no-any-return]


def assert_same_training(one: str, other: str) -> None:
    """Losses and weights agree to 1e-5.

    Left out are the biases of keys and of ENACT's probability: a softmax does not see them, so their gradient is
    rounding noise, and Adam makes steps of full length of it.
    """
    for first, second in zip(log_of(one), log_of(other), strict=True):
        assert first["train_loss"] == pytest.approx(second["train_loss"], abs=1e-5)
    first_weights, second_weights = weights(one), weights(other)
    for key, found in first_weights.items():
        expected = second_weights[key]
        if key.endswith("in_proj_bias"):
            found, expected = (torch.cat(bias.chunk(3)[::2]) for bias in (found, expected))
        if not key.endswith("probability.bias"):
            assert_close(found, expected, rtol=0, atol=1e-5, msg=lambda text, key=key: f"{key}: {text}")


def log_of(folder: str | Path) -> list[dict[str, Any]]:
    """The records of log.txt, without the time that they took."""
    records = [json.loads(line) for line in (Path(folder) / "log.txt").read_text().splitlines()]
    assert all(record.pop("train_seconds") > 0 for record in records)
    return records


def test_training_leaves_what_the_readme_names(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--enact") == 0
    folder = Path("outputs/detr_enact")
    names = {path.name for path in folder.iterdir()}
    assert {"checkpoint.pth", "log.txt", "config.yaml", "environment.json", "curves.png", "detections.png",
            "report.html"} <= names  # fmt: skip
    assert any(name.startswith("events.out.tfevents") for name in names)
    assert "Average Precision" in capsys.readouterr().err
    records = log_of(folder)
    assert [record["epoch"] for record in records] == [0, 1]
    for key in ("train_lr", "train_loss", "train_loss_ce", "train_loss_bbox_0_unscaled", "test_loss_giou",
                "train_class_error", "n_parameters", "test_cardinality_error_unscaled"):  # fmt: skip
        assert isinstance(records[-1][key], float | int), key
    assert len(records[-1]["test_coco_eval_bbox"]) == 12
    saved = torch.load(folder / "checkpoint.pth", weights_only=True)
    assert saved["epoch"] == 1
    assert saved["config"]["enact"] == "paper"
    assert yaml.safe_load((folder / "config.yaml").read_text())["hidden_dim"] == 16
    assert not list(folder.glob(".*tmp"))


@pytest.mark.parametrize("enact", [[], ["--enact"]])
def test_stopping_after_an_epoch_and_resuming_is_an_uninterrupted_run(
    enact: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With dropout, augmentation, accumulation, workers, and a learning rate that drops in the second epoch."""
    flags = [*enact, "--dropout", "0.2", "--accumulate", "2", "--lr_drop", "1", "--num_workers", "1"]
    assert run("--output_dir", "whole", *flags) == 0

    train_one_epoch, epochs = command.Run.train_one_epoch, []

    def train_once(self: command.Run, *arguments: Any) -> None:
        if epochs:
            raise KeyboardInterrupt
        epochs.append(1)
        train_one_epoch(self, *arguments)

    with monkeypatch.context() as patched:
        patched.setattr(command.Run, "train_one_epoch", train_once)
        assert run("--output_dir", "stopped", *flags) == 130
    torch.manual_seed(1234)  # whatever happened in between
    assert run("--output_dir", "stopped", "--resume", "auto", *flags) == 0
    assert_close(weights("stopped"), weights("whole"), rtol=0, atol=0)
    assert log_of("stopped") == log_of("whole")


def test_a_run_stopped_before_its_evaluation_evaluates_first(monkeypatch: pytest.MonkeyPatch) -> None:
    assert run("--output_dir", "whole", "--epochs", "1") == 0

    def fail(self: command.Run) -> dict[str, Any]:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(command.Run, "evaluate", fail)
        assert run("--output_dir", "stopped", "--epochs", "1") == 130
    assert run("--output_dir", "stopped", "--epochs", "1", "--resume", "auto") == 0
    assert log_of("stopped") == log_of("whole")


def square_data(cache: Path, where: Path) -> list[str]:
    """The drawn scenes squeezed to one size, and the flags that use them: the canvas is the same in every batch.

    A convolutional backbone sees how far the canvas reaches beyond an image, so batches are only comparable then.
    """
    data = coco_copy(cache, where)
    for split in ("train2017", "val2017"):
        file = data / "annotations" / f"instances_{split}.json"
        content = json.loads(file.read_text())
        scale = {image["id"]: (64 / image["width"], 64 / image["height"]) for image in content["images"]}
        for image in content["images"]:
            photograph = data / split / image["file_name"]
            Image.open(photograph).resize((64, 64)).save(photograph)
            image["width"] = image["height"] = 64
        for annotation in content["annotations"]:
            across, down = scale[annotation["image_id"]]
            annotation["bbox"] = [side * by for side, by in zip(annotation["bbox"], (across, down) * 2, strict=True)]
        file.write_text(json.dumps(content))
    small = yaml.safe_load((ROOT / "configs/shapes.yaml").read_text())
    Path("small.yaml").write_text(yaml.safe_dump(small | {"train_short_sides": [40]}))
    return ["--coco_path", str(data), "--config", "small.yaml", "--train_short_sides", "[40]"]


def test_accumulated_batches_are_one_large_batch(cache: Path) -> None:
    flags = ["--epochs", "1", "--lr", "1e-4", "--clip_max_norm", "0", *square_data(cache, Path("data"))]
    assert run("--output_dir", "large", "--batch_size", "8", *flags) == 0
    assert run("--output_dir", "small", "--batch_size", "4", "--accumulate", "2", *flags) == 0
    assert_same_training("small", "large")


def test_evaluation_of_a_checkpoint_repeats_its_figures() -> None:
    assert run("--output_dir", "trained") == 0
    assert run("--output_dir", "scored", "--eval", "--resume", "trained/checkpoint.pth") == 0
    scored = json.loads(Path("scored/eval.json").read_text())
    last = log_of("trained")[-1]
    assert scored["test_coco_eval_bbox"] == last["test_coco_eval_bbox"]
    assert scored["test_loss"] == pytest.approx(last["test_loss"])
    assert not Path("scored/checkpoint.pth").exists()
    detections = json.loads(Path("scored/detections.json").read_text())
    assert {found["image_id"] for found in detections} == set(range(1, 7))
    assert "the last evaluation, of 6 validation images" in Path("scored/report.html").read_text()


def torchrun(
    processes: int, *flags: str, script: Path = ROOT / "main.py"
) -> subprocess.CompletedProcess[str]:
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *launch, str(script), *TINY, *flags],
        capture_output=True, text=True, timeout=240, env=environment, check=False,
    )  # fmt: skip


@pytest.mark.parametrize("enact", [[], ["--enact"]])
def test_two_processes_with_half_the_batch_are_one_with_the_whole(enact: list[str], cache: Path) -> None:
    """Same losses, weights and COCO figures, with dropout off."""
    flags = ["--epochs", "2", *enact, *square_data(cache, Path("data"))]
    done = torchrun(2, "--output_dir", "two", "--batch_size", "4", *flags)
    assert done.returncode == 0, done.stderr[-2000:]
    assert run("--output_dir", "one", "--batch_size", "8", *flags) == 0
    assert_same_training("two", "one")
    for two, one in zip(log_of("two"), log_of("one"), strict=True):
        assert two["test_coco_eval_bbox"] == pytest.approx(one["test_coco_eval_bbox"], abs=1e-6)


def test_an_error_in_every_process_is_said_and_ends_the_run() -> None:
    done = torchrun(2, "--coco_path", "nowhere")
    assert done.returncode != 0
    assert "nowhere" in done.stderr


def broken(text: str, *flags: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The command fails with one line that says `text`, and leaves nothing behind."""
    before = {path: path.stat().st_mtime_ns for path in Path().rglob("*")}
    capsys.readouterr()
    assert run(*flags) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert text in error
    assert {path: path.stat().st_mtime_ns for path in Path().rglob("*")} == before


def coco_copy(cache: Path, where: Path) -> Path:
    source = next(folder for folder in cache.iterdir() if folder.name.startswith("shapes"))
    shutil.copytree(source, where)
    return where


def test_bad_input_is_one_line_and_damages_nothing(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = coco_copy(cache, Path("data"))
    annotations = data / "annotations" / "instances_val2017.json"
    whole = annotations.read_text()
    Path("letter.txt").write_text("Dear reader")
    torch.save({"weights": torch.zeros(1)}, "other.pth")
    torch.save({"model": {"layer.weight": torch.zeros(1)}}, "foreign.pth")
    broken("nowhere", "--coco_path", "nowhere", capsys=capsys)
    annotations.unlink()
    broken("instances_val2017.json", "--coco_path", "data", capsys=capsys)
    annotations.write_text(whole[: len(whole) // 2])
    broken("instances_val2017.json", "--coco_path", "data", capsys=capsys)
    annotations.write_text(whole)
    broken("no checkpoint at nowhere.pth", "--resume", "nowhere.pth", capsys=capsys)
    broken("letter.txt is not a checkpoint", "--resume", "letter.txt", capsys=capsys)
    broken('other.pth is not a checkpoint of a detector: it has no "model"', "--resume", "other.pth", capsys=capsys)
    broken("foreign.pth: the weights do not fit", "--resume", "foreign.pth", capsys=capsys)
    broken("lerning_rate", "--lerning_rate", "1", capsys=capsys)
    broken("batch_size", "--batch_size", "two", capsys=capsys)
    broken("no such device", "--device", "abacus", capsys=capsys)
    broken("give --num_classes 6", "--num_classes", "3", capsys=capsys)


def test_ordinary_dirt_in_the_data_trains_and_evaluates(cache: Path) -> None:
    """Category ids with gaps, images without objects, boxes of no size or outside, grey-scale and CMYK pictures."""
    data = coco_copy(cache, Path("data"))
    for split in ("train2017", "val2017"):
        file = data / "annotations" / f"instances_{split}.json"
        content = json.loads(file.read_text())
        for entry in content["categories"]:
            entry["id"] = 10 * entry["id"] + 3
        for annotation in content["annotations"]:
            annotation["category_id"] = 10 * annotation["category_id"] + 3
        first, second, *others = sorted({annotation["image_id"] for annotation in content["annotations"]})
        content["annotations"] = [entry for entry in content["annotations"] if entry["image_id"] != first]
        dirt = {"category_id": 13, "image_id": others[0], "iscrowd": 0, "area": 0}
        content["annotations"] += [
            {**dirt, "id": 90001, "bbox": [5, 5, 0, 0]},
            {**dirt, "id": 90002, "bbox": [500, 500, 20, 20]},
            {**dirt, "id": 90003, "bbox": [-10, -10, 25, 25]},
            {**dirt, "id": 90004, "bbox": [1, 1, 9, 9], "iscrowd": 1},
        ]
        names = {image["id"]: data / split / image["file_name"] for image in content["images"]}
        for image_id, mode in ((second, "L"), (others[0], "CMYK")):
            Image.open(names[image_id]).convert(mode).save(names[image_id])
        file.write_text(json.dumps(content))
    small = ["--config", str(ROOT / "configs/shapes.yaml")]
    assert command.main([*small, *TINY, "--coco_path", "data", "--output_dir", "run", "--enact"]) == 0
    assert torch.load("run/checkpoint.pth", weights_only=True)["config"]["num_classes"] == 54
    assert 0 < log_of("run")[-1]["train_loss"] < 100


def test_a_broken_photograph_stops_with_its_name(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = coco_copy(cache, Path("data"))
    photograph = sorted((data / "train2017").iterdir())[3]
    whole = photograph.read_bytes()
    photograph.write_bytes(whole[: len(whole) // 2])
    assert run("--coco_path", "data", "--config", str(ROOT / "configs/shapes.yaml"), *TINY) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert photograph.name in error


def test_a_broken_photograph_is_replaced_where_that_is_allowed(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = coco_copy(cache, Path("data"))
    photograph = sorted((data / "train2017").iterdir())[3]
    photograph.write_bytes(photograph.read_bytes()[:300])
    flags = ["--coco_path", "data", "--config", str(ROOT / "configs/shapes.yaml"), *TINY, "--max_bad_images", "1"]
    assert command.main([*flags, "--output_dir", "run", "--num_workers", "1"]) == 0
    said = capsys.readouterr().err
    assert said.count(f"{photograph.name}: ") == 1
    assert "the next image takes its place (1 of at most 1)" in said
    assert len(log_of("run")) == 2


def test_an_existing_run_is_never_written_over(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--output_dir", "mine", "--epochs", "1") == 0
    broken("mine holds a run already", "--output_dir", "mine", capsys=capsys)


def test_a_checkpoint_elsewhere_is_a_start_and_not_written_over(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--output_dir", "dense", "--epochs", "1") == 0
    before = Path("dense/checkpoint.pth").read_bytes()
    assert run("--enact", "--output_dir", "clustered", "--resume", "dense/checkpoint.pth", "--epochs", "1") == 0
    assert "2 layers of ENACT are new" in capsys.readouterr().err
    assert len(log_of("clustered")) == 1
    again = ("--output_dir", "clustered", "--resume", "dense/checkpoint.pth")
    broken("clustered holds a run already", *again, capsys=capsys)
    assert Path("dense/checkpoint.pth").read_bytes() == before


def test_a_published_file_evaluates_and_code_in_a_file_never_runs(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--output_dir", "mine", "--epochs", "1") == 0
    saved = torch.load("mine/checkpoint.pth", weights_only=True)
    published = {**saved, "model": to_published(saved["model"]), "args": argparse.Namespace(lr=1e-4)}
    del published["config"], published["records"]
    torch.save(published, "published.pth")
    assert run("--output_dir", "scored", "--eval", "--resume", "published.pth") == 0
    scored = json.loads(Path("scored/eval.json").read_text())
    assert scored["test_coco_eval_bbox"] == log_of("mine")[0]["test_coco_eval_bbox"]

    torch.save({**saved, "args": Touch()}, "malicious.pth")
    broken("malicious.pth is not a checkpoint that can be read safely", "--resume", "malicious.pth", capsys=capsys)
    assert not Path("touched").exists()


class Touch:
    """Unpickling it makes a file."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("touched"),)


def test_a_loss_that_is_not_finite_stops_before_the_weights(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    build, models = command.build_model_from, []

    def poisoned(*arguments: Any) -> torch.nn.Module:
        model = build(*arguments)
        with torch.no_grad():
            model.class_embed.bias[2] = float("nan")
        models.append(model)
        return model

    monkeypatch.setattr(command, "build_model_from", poisoned)
    assert run("--output_dir", "ill") == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "loss_ce" in error
    assert "nan" in error
    assert models[0].query_embed.weight.isfinite().all()
    assert not Path("ill/checkpoint.pth").exists()


def test_mixed_precision_trains() -> None:
    assert run("--enact", "--amp", "--epochs", "1", "--output_dir", "half") == 0
    assert log_of("half")[0]["train_loss"] > 0
