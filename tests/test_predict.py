"""tools/predict.py: the function and the command, on images, videos and what is neither."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import io
import json
import runpy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from pycocotools.coco import COCO
from test_clusters_view import TINY
from torch import Tensor, nn
from torch.testing import assert_close
from torchvision.transforms.v2.functional import pil_to_tensor

from configs.schema import recipe
from datasets import collate, eval_transform, normalize
from models import build_model_from, build_postprocessor
from tools import predict
from tools.predict import Detector
from util.errors import InputError

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.usefixtures("empty_folder")
NAMES = {1: "cat", 3: "dog"}
NUM_CLASSES = 5
SMALL: dict[str, Any] = {**TINY, "num_classes": NUM_CLASSES, "num_query_position": 6}


def save_checkpoint(name: str = "detr", enact: str | None = None, **fields: Any) -> nn.Module:
    """model.pth of a detector whose scores and boxes differ from query to query."""
    config = recipe(name, enact, **{**SMALL, **fields})
    torch.manual_seed(1)
    model = build_model_from(config).eval()
    for head in (model.get_parameter("class_embed.weight"), model.get_parameter("bbox_embed.layers.2.weight")):
        nn.init.normal_(head, std=0.3)
    nn.init.zeros_(model.get_parameter("class_embed.bias"))
    torch.save({"model": model.state_dict(), "config": dataclasses.asdict(config), "class_names": NAMES}, "model.pth")
    return model


def picture(height: int = 60, width: int = 80, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height // 10, width // 10, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)


def save_picture(name: str, height: int = 60, width: int = 80, seed: int = 0, orientation: int = 1) -> Path:
    path = Path(name)
    path.parent.mkdir(exist_ok=True, parents=True)
    image = picture(height, width, seed)
    exif = image.getexif()
    exif[0x0112] = orientation
    image.save(path, exif=exif)
    return path


@torch.no_grad()
def slow_detections(model: nn.Module, name: str, image: Image.Image, score: float) -> list[tuple[float, int, Tensor]]:
    """One image, the way of the evaluation."""
    config = recipe(name, None, **SMALL)
    pixels = eval_transform(config.eval_short_side, config.max_long_side)(image)
    batch = collate([(pixels, {})])
    outputs = model(normalize(batch.images, batch.pad_mask), batch.pad_mask)
    [found] = build_postprocessor(name)(outputs, torch.tensor([[image.height, image.width]]))
    rows = zip(found["scores"].tolist(), found["labels"].tolist(), found["boxes"], strict=True)
    return sorted((row for row in rows if row[0] >= score), key=lambda row: -row[0])


def assert_found(found: Any, expected: list[tuple[float, int, Tensor]]) -> None:
    assert expected
    assert_close(found["scores"], torch.tensor([row[0] for row in expected]), atol=1e-5, rtol=0)
    assert found["labels"].tolist() == [row[1] for row in expected]
    assert_close(found["boxes"], torch.stack([row[2] for row in expected]), atol=1e-3, rtol=0)
    assert found["names"] == [NAMES.get(row[1], str(row[1])) for row in expected]


@pytest.mark.parametrize(("name", "enact"), [("detr", "paper"), ("conditional_detr", None), ("anchor_detr", "plus")])
def test_the_function_finds_what_the_evaluation_finds(name: str, enact: str | None) -> None:
    model, path = save_checkpoint(name, enact), save_picture("duck.png")
    score = 0.3
    expected = slow_detections(model, name, picture(), score)
    detector = Detector.from_checkpoint("model.pth", device="cpu", score=score)
    for image in (path, str(path), picture(), pil_to_tensor(picture())):
        assert_found(detector(image), expected)
    pictures = [picture(), picture(40, 120), picture(60, 80, seed=1)]
    for found, image in zip(detector(pictures), pictures, strict=True):
        assert_found(found, slow_detections(model, name, image, score))
    assert detector([]) == []


@pytest.mark.parametrize(("name", "enact"), [("detr", None), ("detr", "official"), ("anchor_detr", "paper")])
def test_an_image_gets_the_same_detections_alone_and_in_company(name: str, enact: str | None) -> None:
    save_checkpoint(name, enact)
    sizes = [(60, 80), (80, 60), (60, 80), (60, 90), (120, 160), (60, 80)]
    pictures = [picture(*size, seed=seed) for seed, size in enumerate(sizes)]
    detector = Detector.from_checkpoint("model.pth", device="cpu", score=0.0, batch_size=3)
    for found, image in zip(detector(pictures), pictures, strict=True):
        alone = detector(image)
        assert_close(found["scores"], alone["scores"], atol=1e-5, rtol=0)
        assert_close(found["boxes"], alone["boxes"], atol=1e-3, rtol=0)
    assert max(map(len, detector.batches(sizes))) == (1 if enact == "official" else 3)


def test_only_images_that_are_resized_to_one_size_share_a_batch() -> None:
    save_checkpoint(eval_short_side=40, max_long_side=60)
    detector = Detector.from_checkpoint("model.pth", device="cpu", batch_size=2)
    sizes = [(60, 80), (80, 60), (120, 160), (60, 80), (61, 80), (600, 800)]
    assert list(detector.batches(sizes)) == [[0, 2], [3, 5], [1], [4]]


def test_a_tensor_of_another_form_is_refused() -> None:
    save_checkpoint()
    detector = Detector.from_checkpoint("model.pth", device="cpu")
    for tensor in (torch.rand(3, 8, 8), torch.zeros(8, 8, 3, dtype=torch.uint8), torch.zeros(8, 8, dtype=torch.uint8)):
        with pytest.raises(ValueError, match=r"uint8 \(3, H, W\)"):
            detector(tensor)
    with pytest.raises(InputError, match=r"nowhere\.jpg: image cannot be read"):
        detector("nowhere.jpg")


def run(*words: str) -> int:
    device = () if "--device" in words else ("--device", "cpu")
    return predict.main([*words, *device, "--checkpoint", "model.pth"])


def table(folder: str = "predictions") -> list[dict[str, str]]:
    with (Path(folder) / "detections.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_command_writes_pictures_and_tables(capsys: pytest.CaptureFixture[str]) -> None:
    model = save_checkpoint("conditional_detr", "paper")
    save_picture("folder/7.png", seed=7)
    save_picture("folder/12.jpg", 90, 70)
    assert run("folder", "--score", "0.2", "--output", "out/put") == 0
    assert "detections in 2 of 2 files" in capsys.readouterr().err
    assert {path.name for path in Path("out/put").iterdir()} == {"7.jpg", "12.jpg", "detections.json", "detections.csv"}
    results = json.loads(Path("out/put/detections.json").read_text())
    rows = table("out/put")
    assert len(rows) == len(results) > 0
    for image, file in ((12, "folder/12.jpg"), (7, "folder/7.png")):
        expected = slow_detections(model, "conditional_detr", Image.open(file).convert("RGB"), 0.2)
        assert_found(
            {
                "scores": torch.tensor([float(row["score"]) for row in rows if row["file"] == file]),
                "labels": torch.tensor([int(row["label"]) for row in rows if row["file"] == file]),
                "names": [row["name"] for row in rows if row["file"] == file],
                "boxes": torch.tensor(
                    [[float(row[side]) for side in ("left", "top", "right", "bottom")] for row in rows
                     if row["file"] == file]
                ),
            },
            expected,
        )  # fmt: skip
        boxes = [entry["bbox"] for entry in results if entry["image_id"] == image]
        for (left, top, width, height), row in zip(boxes, expected, strict=True):
            assert_close(torch.tensor([left, top, left + width, top + height]), row[2], atol=1e-3, rtol=0)
    assert [row["image_id"] for row in rows] == [str(entry["image_id"]) for entry in results]


def test_coco_reads_the_results() -> None:
    save_checkpoint()
    for number in (5, 9):
        save_picture(f"photos/{number:012}.png", seed=number)
    assert run("photos", "--score", "0", "--no_pictures") == 0
    assert {path.name for path in Path("predictions").iterdir()} == {"detections.json", "detections.csv"}
    truth = COCO()
    truth.dataset = {"images": [{"id": 5}, {"id": 9}], "annotations": [], "categories": [{"id": 1}]}
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
        loaded = truth.loadRes("predictions/detections.json")
    assert len(loaded.getAnnIds(imgIds=[9])) == SMALL["num_queries"]


def test_files_without_numbers_are_counted() -> None:
    save_checkpoint()
    save_picture("b/1.png")
    save_picture("a/duck.png")
    assert run("b/1.png", "a", "--score", "0") == 0
    assert {(row["file"], row["image_id"]) for row in table()} == {("b/1.png", "1"), ("a/duck.png", "2")}


def test_a_picture_shows_boxes_and_names() -> None:
    save_checkpoint()
    save_picture("plain.png", 400, 600)
    assert run("plain.png", "--score", "0") == 0
    with Image.open("predictions/plain.jpg") as drawn:
        assert drawn.size == (600, 400)
        change = np.abs(np.asarray(drawn, dtype=int) - np.asarray(picture(400, 600), dtype=int)).max(-1)
    assert 0.01 < (change > 60).mean() < 0.6
    assert run("plain.png", "--score", "1") == 0
    with Image.open("predictions/plain.jpg") as drawn:
        change = np.abs(np.asarray(drawn, dtype=int) - np.asarray(picture(400, 600), dtype=int)).max(-1)
    assert (change > 60).mean() < 0.001
    assert table() == []


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_boxes_are_in_pixels_of_the_upright_picture(orientation: int) -> None:
    model = save_checkpoint()
    path = save_picture("turned.png", 50, 90, orientation=orientation)
    with Image.open(path) as image:
        upright = ImageOps.exif_transpose(image)
    save_picture("straight.png", 50, 90)
    assert run("turned.png", "straight.png", "--score", "0") == 0
    rows = [row for row in table() if row["file"] == "turned.png"]
    boxes = torch.tensor([[float(row[side]) for side in ("left", "top", "right", "bottom")] for row in rows])
    expected = slow_detections(model, "detr", upright, 0.0)
    assert_close(boxes, torch.stack([row[2] for row in expected]), atol=1e-3, rtol=0)
    with Image.open("predictions/turned.jpg") as drawn:
        assert drawn.size == upright.size


def test_an_image_that_cannot_be_read_is_reported_and_the_others_go_on(capsys: pytest.CaptureFixture[str]) -> None:
    save_checkpoint()
    save_picture("folder/a.png")
    save_picture("folder/c.png")
    whole = save_picture("folder/b.png", 200, 300).read_bytes()
    Path("folder/b.png").write_bytes(whole[: len(whole) // 2])
    Path("folder/letter.jpg").write_text("Dear reader")
    assert run("folder", "nowhere.png", "--score", "0") == 0
    said = capsys.readouterr().err
    assert "skipped: folder/b.png: image cannot be read" in said
    assert "skipped: folder/letter.jpg: image cannot be read" in said
    assert "skipped: nowhere.png: image cannot be read (No such file" in said
    assert "in 2 of 5 files, 3 skipped" in said
    assert {row["file"] for row in table()} == {"folder/a.png", "folder/c.png"}
    assert run("folder/letter.jpg") == 1
    assert table() == []


def test_a_score_that_nothing_reaches_is_pointed_out(capsys: pytest.CaptureFixture[str]) -> None:
    save_checkpoint()
    save_picture("duck.png")
    hint = "nothing has a score of 1 or more"
    assert run("duck.png", "--score", "1") == 0
    assert hint in capsys.readouterr().err
    assert run("duck.png", "--score", "0") == 0
    assert hint not in capsys.readouterr().err


def test_patterns_and_repeated_names_are_understood() -> None:
    save_checkpoint()
    for name in ("p/a.png", "p/q/a.png", "p/q/b.jpg"):
        save_picture(name)
    assert run("p/**/a.png", "p/q", "--score", "0") == 0
    assert list(dict.fromkeys(row["file"] for row in table())) == ["p/a.png", "p/q/a.png", "p/q/b.jpg"]
    assert {path.name for path in Path("predictions").glob("*.jpg")} == {"a.jpg", "a_2.jpg", "b.jpg"}


def broken(text: str, *words: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The command fails with one line that says `text`."""
    capsys.readouterr()
    assert run(*words) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert text in error


def test_bad_input_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    save_picture("duck.png")
    broken("no checkpoint at model.pth", "duck.png", capsys=capsys)
    save_checkpoint()
    broken("https://a.b/duck.png is a URL, and nothing is fetched here", "https://a.b/duck.png", capsys=capsys)
    broken("no file matches *.gif", "*.gif", capsys=capsys)
    Path("empty").mkdir()
    broken("there are no images or videos in empty", "empty", capsys=capsys)
    broken("--batch_size must be 1 or more", "duck.png", "--batch_size", "0", capsys=capsys)
    broken("cannot write duck.png", "duck.png", "--output", "duck.png", capsys=capsys)
    broken("holds what is to be looked at", "duck.png", "--output", ".", capsys=capsys)
    broken("no such device", "duck.png", "--device", "abacus", capsys=capsys)
    if not torch.backends.mps.is_available():
        broken("sees no Apple GPU", "duck.png", "--device", "mps", capsys=capsys)
    Path("bad.yaml").write_text("colour: red")
    broken("bad.yaml must hold fields of the config", "duck.png", "--config", "bad.yaml", capsys=capsys)
    broken("cannot read the config no.yaml", "duck.png", "--config", "no.yaml", capsys=capsys)
    assert Path("duck.png").stat().st_size > 0


def test_the_command_finds_the_project_from_anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """As `python tools/predict.py`, for which Python looks for modules in tools/ only."""
    for name in [name for name in sys.modules if name.split(".")[0] == "tools"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path and Path(path).resolve() != ROOT])
    assert "main" in runpy.run_path(str(ROOT / "tools" / "predict.py"), run_name="predict")
