"""tools/export.py: files of ONNX and torch.export that find what the checkpoint finds, or are not written."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_predict import NAMES, SMALL, picture, save_checkpoint, save_picture, table
from torch import Tensor
from torch.testing import assert_close

from configs.schema import recipe
from models.postprocess import Detections
from tools import export, export_check, predict
from tools.detection_graph import Detect, DetectionGraph, ExportedGraph, Metadata, OnnxGraph
from tools.detector_files import load_detector
from tools.export_check import Inputs, compare, prepare
from tools.predict import Detector
from util.errors import InputError

pytestmark = pytest.mark.usefixtures("empty_folder")
CPU = torch.device("cpu")
FORMATS = {".onnx": "onnx", ".pt2": "torch_export"}
PHOTOGRAPHS = 6


def export_to(output: str, *words: str, images: tuple[str, ...] = ("photos",)) -> int:
    kind = FORMATS[Path(output).suffix]
    command = ["--checkpoint", "model.pth", "--output", output, "--format", kind, "--images", *images, *words]
    return export.main(command)


def save_photos() -> None:
    """Of three shapes."""
    for number, (height, width) in enumerate([(60, 80), (90, 60), (50, 120)]):
        save_picture(f"photos/{number}.png", height, width, seed=number)


def predicted(checkpoint: str, photographs: str, score: str = "0.2") -> list[dict[str, str]]:
    """The rows of detections.csv that the command writes."""
    folder = f"found_{Path(checkpoint).suffix[1:]}"
    words = [photographs, "--checkpoint", checkpoint, "--output", folder, "--score", score, "--no_pictures"]
    assert predict.main([*words, "--device", "cpu"]) == 0
    return table(folder)


def assert_same_rows(found: list[dict[str, str]], expected: list[dict[str, str]], pixels: float) -> None:
    """Partners have one file and label; scores that are equal but for rounding may stand in either order."""

    def ordered(rows: list[dict[str, str]]) -> list[dict[str, str]]:
        return sorted(rows, key=lambda row: (row["file"], int(row["label"]), float(row["left"]), float(row["top"])))

    assert len(found) == len(expected) > 0
    for one, other in zip(ordered(found), ordered(expected), strict=True):
        assert [one[key] for key in ("file", "label", "name")] == [other[key] for key in ("file", "label", "name")]
        assert float(one["score"]) == pytest.approx(float(other["score"]), abs=1e-4)
        for side in ("left", "top", "right", "bottom"):
            assert float(one[side]) == pytest.approx(float(other[side]), abs=pixels)


@pytest.mark.slow
def test_a_file_of_torch_export_finds_what_the_checkpoint_finds(capsys: pytest.CaptureFixture[str]) -> None:
    save_checkpoint("detr", "plus")
    save_photos()
    assert export_to("out/model.pt2") == 0
    said = capsys.readouterr().err
    assert "out/model.pt2: " in said
    assert "on 3 images, alone and in one batch, agree with PyTorch's within" in said
    assert "median of 10: pytorch" in said
    assert_same_rows(predicted("out/model.pt2", "photos"), predicted("model.pth", "photos"), 1e-3)
    report = json.loads(Path("out/model.pt2.json").read_text())
    assert report["images"] == [*(f"photos/{number}.png" for number in range(3)), "the batch of all 3"]
    assert 0 <= report["boxes_px"] < 1e-3
    assert report["pytorch"] == sorted(report["pytorch"])
    assert report["torch"] == torch.__version__
    assert {path.name for path in Path("out").iterdir()} == {"model.pt2", "model.pt2.json"}
    detector = Detector.from_checkpoint("out/model.pt2", score=0.0)
    expected = Detector.from_checkpoint("model.pth", score=0.0, device="cpu")
    assert detector.metadata == expected.metadata
    pictures = [picture(), picture(40, 120), picture(seed=1)]
    for found, wanted in zip(detector(pictures), expected(pictures), strict=True):
        assert_close(found["boxes"], wanted["boxes"], atol=1e-3, rtol=0)
        assert found["names"] == wanted["names"]


@pytest.mark.slow
def test_an_onnx_file_finds_what_the_checkpoint_finds() -> None:
    for module in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(module)
    save_checkpoint("detr", "paper")
    save_photos()
    assert export_to("model.onnx") == 0
    assert_same_rows(predicted("model.onnx", "photos"), predicted("model.pth", "photos"), 1e-3)
    batch = prepare(sorted(Path("photos").iterdir()), OnnxGraph(Path("model.onnx"), CPU).metadata)[-1]
    assert batch.images.shape[0] == 3  # a padded batch, of another size than in the export


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "enact", "suffix"),
    [("detr", None, ".onnx"), ("detr", "official", ".onnx"), ("detr", "plus", ".onnx"),
     ("conditional_detr", "paper", ".onnx"), ("anchor_detr", "plus", ".onnx"), ("anchor_detr", None, ".pt2")],
)  # fmt: skip
def test_on_photographs_every_model_predicts_the_same_boxes(
    tiny_coco: Path, name: str, enact: str | None, suffix: str
) -> None:
    if suffix == ".onnx":
        pytest.importorskip("onnxscript")
        pytest.importorskip("onnxruntime")
    save_checkpoint(name, enact, eval_short_side=120, max_long_side=200)
    Path("photos").mkdir()
    for file in sorted((tiny_coco / "val2017").iterdir())[:PHOTOGRAPHS]:
        Path("photos", file.name).symlink_to(file)
    assert export_to(f"model{suffix}") == 0
    assert_same_rows(predicted(f"model{suffix}", "photos"), predicted("model.pth", "photos"), 1e-3)


class Fake:
    """In the place of an exported file: the graph itself, its result changed by a function."""

    def __init__(self, graph: DetectionGraph, change: Callable[[Detections], Detections]) -> None:
        self.graph = graph
        self.change = change

    def __call__(self, *inputs: Tensor) -> Detections:
        return self.change(self.graph(*inputs))


def shifted(detections: Detections, pixels: float) -> Detections:
    return detections._replace(boxes=detections.boxes + pixels)


def pretend_to_write(monkeypatch: pytest.MonkeyPatch, change: Callable[[Detections], Detections]) -> None:
    """Exports nothing, but leaves a file."""

    def write(graph: DetectionGraph, metadata: Metadata, path: Path) -> Detect:
        path.write_text("exported")
        return Fake(graph, change)

    monkeypatch.setattr(export, "write", write)


def test_a_file_is_only_written_if_it_agrees(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save_checkpoint()
    save_photos()
    Path("out").mkdir()
    changes: list[Callable[[Detections], Detections]] = [
        lambda found: shifted(found, 0.5),
        lambda found: found._replace(boxes=torch.full_like(found.boxes, torch.nan)),
        lambda found: found._replace(labels=found.labels + 1),
        lambda found: found._replace(scores=found.scores + 0.01),
    ]
    for change in changes:
        pretend_to_write(monkeypatch, change)
        assert export_to("out/model.pt2") == 1
        assert "not written: on " in capsys.readouterr().err
        assert not list(Path("out").iterdir())
    pretend_to_write(monkeypatch, lambda found: shifted(found, 0.5))
    assert export_to("out/model.pt2", "--tolerance", "1") == 0
    assert Path("out/model.pt2").read_text() == "exported"
    assert json.loads(Path("out/model.pt2.json").read_text())["boxes_px"] == pytest.approx(0.5, abs=1e-4)


def test_the_images_are_those_of_the_validation_set_unless_others_are_given(
    monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    save_checkpoint()
    pretend_to_write(monkeypatch, lambda found: found)
    assert export.main(["--checkpoint", "model.pth", "--output", "model.pt2", "--format", "torch_export"]) == 0
    [root] = cache.iterdir()
    report = json.loads(Path("model.pt2.json").read_text())
    expected = [str(path) for path in sorted((root / "val2017").iterdir())[: export.VALIDATION_IMAGES]]
    assert [str(Path(name).resolve()) for name in report["images"][:-1]] == expected
    assert report["boxes_px"] == report["scores"] == 0


def test_clusters_can_be_bounded_at_export(monkeypatch: pytest.MonkeyPatch) -> None:
    save_checkpoint("detr", "paper")
    save_photos()
    graphs: list[DetectionGraph] = []

    def write(graph: DetectionGraph, metadata: Metadata, path: Path) -> Detect:
        graphs.append(graph)
        path.write_text("exported")
        return graph

    monkeypatch.setattr(export, "write", write)
    assert export_to("model.pt2", "--max_clusters", "5") == 0
    expected, _, _ = load_detector(Path("model.pth"), CPU, {"max_clusters": 5})
    [inputs, *_] = prepare([Path("photos/0.png")], Metadata.of(recipe("detr", "paper", **SMALL), {}))
    bounded = inputs.run(DetectionGraph(expected, "detr").eval())
    assert_close(inputs.run(graphs[0]), bounded)
    unbounded, _, _ = load_detector(Path("model.pth"), CPU)
    with pytest.raises(AssertionError):
        assert_close(inputs.run(DetectionGraph(unbounded, "detr").eval()), bounded)


def result(*detections: tuple[float, int, float]) -> Detections:
    """Of one image: scores, labels, and a number that the sides of the box start from."""
    scores, labels, places = zip(*detections, strict=True)
    boxes = torch.tensor(places).unsqueeze(-1) + torch.tensor([0.0, 0.0, 10.0, 10.0])
    return Detections(torch.tensor([scores]), torch.tensor([labels]), boxes.unsqueeze(0))


def difference(first: Detections, second: Detections) -> tuple[float, float]:
    nothing = Inputs("one", torch.zeros(1), torch.zeros(1), torch.zeros(1))
    found = compare(lambda *_: first, lambda *_: second, nothing)
    assert found.where == "one"
    return found.boxes, found.scores


def test_detections_are_compared_in_whatever_order_they_come() -> None:
    expected = result((0.9, 1, 5.0), (0.9, 1, 50.0), (0.7, 2, 5.0), (0.1, 1, 0.0))
    swapped = result((0.7, 2, 5.0), (0.9, 1, 50.25), (0.90002, 1, 5.0), (0.1, 1, 0.0))
    assert difference(expected, swapped) == pytest.approx((0.25, 2e-5), abs=1e-6)
    assert difference(expected, expected) == (0.0, 0.0)


@pytest.mark.parametrize(
    "other",
    [
        result((0.9, 3, 5.0), (0.7, 2, 5.0), (0.1, 1, 0.0)),  # another label
        result((0.8, 1, 5.0), (0.7, 2, 5.0), (0.1, 1, 0.0)),  # another score
        result((0.9, 1, 5.0), (0.9, 1, torch.nan), (0.1, 1, 0.0)),
        result((0.9, 1, 5.0), (0.9, 1, 5.0), (0.1, 1, 0.0)),  # one is missing
    ],
)
def test_a_detection_without_a_partner_is_infinitely_far(other: Detections) -> None:
    expected = result((0.9, 1, 5.0), (0.7, 2, 5.0), (0.1, 1, 0.0))
    assert difference(expected, other)[0] == difference(other, expected)[0] == float("inf")


def test_the_end_of_a_list_need_not_agree() -> None:
    """Of pairs whose scores are all but equal, either may be the last that is kept."""
    first = result((0.9, 1, 5.0), (0.10001, 1, 0.0))
    second = result((0.9, 1, 5.0), (0.10002, 4, 80.0))
    assert difference(first, second) == (0.0, 0.0)


def test_each_image_is_checked_alone_and_all_in_one_padded_batch_unless_they_change_each_other() -> None:
    save_photos()
    files = sorted(Path("photos").iterdir())
    metadata = Metadata.of(recipe("detr", None, **SMALL), {})
    *alone, together = prepare(files, metadata)
    assert [len(one.images) for one in alone] == [1, 1, 1]
    assert together.pad_mask.any()
    for index, one in enumerate(alone):
        height, width = one.images.shape[2:]
        assert not one.pad_mask.any()
        assert_close(together.images[index, :, :height, :width], one.images[0])
        assert not together.pad_mask[index, :height, :width].any()
        assert_close(together.sizes[index], one.sizes[0])
    assert one.sizes.tolist() == [[50, 120]]
    assert len(prepare(files[:1], metadata)) == 1
    changing = Metadata.of(recipe("detr", "official", **SMALL), {})  # images change each other, and are never batched
    assert [len(one.images) for one in prepare(files, changing)] == [1, 1, 1]
    with pytest.raises(InputError, match="give some with --images"):
        prepare([], metadata)


def test_a_file_says_how_it_is_to_be_used() -> None:
    config = recipe("detr", "official", **SMALL)
    metadata = Metadata.of(config, NAMES)
    text = metadata.to_text()
    assert Metadata.from_text(text, Path("x.onnx")) == metadata
    assert metadata.alone
    assert not Metadata.of(recipe("detr", "paper", **SMALL), NAMES).alone
    assert {"preprocessing", "sizes", "boxes"} <= text.keys()
    with pytest.raises(InputError, match=r"x\.onnx was not written by tools/export\.py"):
        Metadata.from_text({**text, "alone": "perhaps"}, Path("x.onnx"))


def test_another_file_is_refused_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    save_picture("duck.png")
    reasons = {"model.onnx": "is no ONNX file that can be run", "model.pt2": "is no file of torch.export"}
    for name, reason in reasons.items():
        if name.endswith(".onnx"):
            pytest.importorskip("onnxruntime")
        Path(name).write_text("Dear reader")
        assert predict.main(["duck.png", "--checkpoint", name, "--device", "cpu"]) == 2
        [line] = capsys.readouterr().err.strip().splitlines()
        assert line.startswith("error: ")
        assert reason in line
    program = torch.export.export(torch.nn.Linear(1, 1), (torch.zeros(1),))
    torch.export.save(program, "other.pt2")
    with pytest.raises(InputError, match=r"other\.pt2 was not written by tools/export\.py"):
        ExportedGraph(Path("other.pt2"))


def test_bad_input_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def broken(text: str, output: str = "model.pt2", **options: Any) -> None:
        assert export_to(output, **options) == 2
        [line] = capsys.readouterr().err.strip().splitlines()
        assert line.startswith("error: ")
        assert text in line

    save_photos()
    broken("no checkpoint at model.pth")
    save_checkpoint()
    Path("clip.mp4").touch()
    broken("there are no images to check the exported file on", images=("clip.mp4",))
    broken("nowhere.png: image cannot be read", images=("nowhere.png",))
    Path("taken").touch()
    broken("cannot write taken/model.pt2", output="taken/model.pt2")
    command = ["--checkpoint", "model.pth", "--output", "model.onnx", "--format", "torch_export"]
    assert export.main(command) == 2
    assert "the name of a torch_export file must end in .pt2" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    broken("install it: pip install onnx onnxscript onnxruntime", output="model.onnx")


def test_times_are_taken_in_turns_and_warm_up_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    now, calls = [0.0], list[str]()
    monkeypatch.setattr(export_check.time, "perf_counter", lambda: now[0])
    nothing = Inputs("one", torch.zeros(1), torch.zeros(1), torch.zeros(1))

    def detect(name: str, seconds: float) -> Detect:
        def run(*_: Tensor) -> Detections:
            now[0] += seconds if calls.count(name) >= export_check.WARM_UP else 100.0
            calls.append(name)
            return result((0.9, 1, 5.0))

        return run

    times = export_check.time_both(detect("pytorch", 2.0), detect("exported", 1.0), nothing)
    assert calls == ["pytorch", "exported"] * (export_check.RUNS + export_check.WARM_UP)
    assert times == {"pytorch": (2.0, 2.0, 2.0), "exported": (1.0, 1.0, 1.0)}
