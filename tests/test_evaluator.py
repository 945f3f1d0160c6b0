"""The COCO figures against direct use of pycocotools and against cases known by hand."""

from __future__ import annotations

import copy
import logging
from typing import Any

import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from datasets import METRIC_NAMES, CocoEvaluator
from datasets.annotations import quiet_index
from util import distributed

Result = dict[str, torch.Tensor]


@pytest.fixture(params=["pycocotools", "faster_coco_eval"], autouse=True)
def _package(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test with both packages that may count."""
    found = None if request.param == "pycocotools" else pytest.importorskip(request.param)
    monkeypatch.setattr("datasets.evaluator.faster", found)


def ground_truth(num_images: int = 6, seed: int = 0) -> COCO:
    rng = np.random.default_rng(seed)
    annotations: list[dict[str, Any]] = []
    for image_id in range(10, 10 + num_images):
        for _ in range(int(rng.integers(1, 5))):
            box = [*rng.uniform(0, 300, 2), *rng.uniform(10, 250, 2)]
            entry = {"id": len(annotations) + 1, "image_id": image_id, "category_id": int(rng.integers(1, 4))}
            annotations.append({**entry, "bbox": box, "area": box[2] * box[3], "iscrowd": int(rng.random() < 0.1)})
    images = [{"id": image_id, "width": 640, "height": 640} for image_id in range(10, 10 + num_images)]
    categories = [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}, {"id": 3, "name": "cow"}]
    return quiet_index({"images": images, "annotations": annotations, "categories": categories})


def result_of(rows: list[tuple[float, int, list[float]]]) -> Result:
    return {
        "scores": torch.tensor([score for score, _, _ in rows]),
        "labels": torch.tensor([label for _, label, _ in rows], dtype=torch.int64),
        "boxes": torch.tensor([box for _, _, box in rows], dtype=torch.float32).reshape(-1, 4),
    }


def true_result(coco: COCO, image_id: int) -> Result:
    rows = []
    for entry in coco.imgToAnns.get(image_id, []):
        x, y, w, h = entry["bbox"]
        if not entry["iscrowd"]:
            rows.append((1.0, entry["category_id"], [x, y, x + w, y + h]))
    return result_of(rows)


def noisy_result(coco: COCO, image_id: int, rng: np.random.Generator) -> Result:
    """Boxes near the true ones, some of a wrong class, and some out of thin air."""
    rows = []
    for entry in coco.imgToAnns[image_id] * 3:
        x, y, w, h = entry["bbox"] + rng.normal(0, 8, 4)
        label = entry["category_id"] if rng.random() < 0.8 else int(rng.integers(0, 5))
        rows.append((float(rng.random()), label, [x, y, x + abs(w), y + abs(h)]))
    return result_of(rows)


def test_perfect_detections_score_one() -> None:
    coco = ground_truth()
    evaluator = CocoEvaluator(coco)
    evaluator.update(coco.imgs, [true_result(coco, image_id) for image_id in coco.imgs])
    summary = evaluator.summarize()
    assert tuple(summary.metrics) == METRIC_NAMES
    assert summary.metrics["AP"] == pytest.approx(1.0)
    assert summary.class_ap == pytest.approx({1: 1.0, 2: 1.0, 3: 1.0})


def test_figures_equal_direct_pycocotools(capsys: pytest.CaptureFixture[str]) -> None:
    coco, rng = ground_truth(12), np.random.default_rng(1)
    evaluator = CocoEvaluator(coco)
    for image_id in coco.imgs:
        evaluator.update([image_id], [noisy_result(coco, image_id, rng)])
    summary = evaluator.summarize()
    assert capsys.readouterr().out == ""
    direct = COCOeval(coco, coco.loadRes(copy.deepcopy(evaluator.results)), "bbox")
    direct.evaluate()
    direct.accumulate()
    capsys.readouterr()
    direct.summarize()
    assert summary.table == capsys.readouterr().out.rstrip()
    assert list(summary.metrics.values()) == pytest.approx(direct.stats.tolist(), abs=1e-9, rel=0)
    assert 0.05 < summary.metrics["AP"] < 0.95


@pytest.mark.parametrize("category_id", [1, 2, 3])
def test_class_ap_is_the_ap_of_that_class_alone(category_id: int) -> None:
    coco, rng = ground_truth(12), np.random.default_rng(1)
    evaluator = CocoEvaluator(coco)
    evaluator.update(coco.imgs, [noisy_result(coco, image_id, rng) for image_id in coco.imgs])
    alone = COCOeval(coco, coco.loadRes(copy.deepcopy(evaluator.results)), "bbox")
    alone.params.catIds = [category_id]
    alone.evaluate()
    alone.accumulate()
    alone.summarize()
    assert evaluator.summarize().class_ap[category_id] == pytest.approx(float(alone.stats[0]))


def test_results_are_in_coco_format() -> None:
    evaluator = CocoEvaluator(ground_truth())
    evaluator.update([11, 10], [result_of([(0.5, 2, [1, 2, 4, 8])]), result_of([])])
    assert evaluator.results == [{"image_id": 11, "category_id": 2, "bbox": [1, 2, 3, 6], "score": 0.5}]


def test_image_seen_twice_counts_once() -> None:
    coco = ground_truth()
    evaluator = CocoEvaluator(coco)
    for _ in range(2):
        evaluator.update(coco.imgs, [true_result(coco, image_id) for image_id in coco.imgs])
    evaluator.update([10], [result_of([(1.0, 1, [0, 0, 5, 5])])])
    assert len(evaluator.results) == sum(not entry["iscrowd"] for entry in coco.anns.values())
    assert evaluator.summarize().metrics["AP"] == pytest.approx(1.0)


def test_images_without_detections_count_as_missed() -> None:
    coco = ground_truth(2)
    for entry in coco.anns.values():
        entry.update(category_id=1, iscrowd=0)
    coco = quiet_index(coco.dataset)
    evaluator = CocoEvaluator(coco)
    evaluator.update([10], [true_result(coco, 10)])
    recall = len(coco.imgToAnns[10]) / len(coco.anns)
    assert evaluator.summarize().metrics["AR100"] == pytest.approx(recall)


@pytest.mark.parametrize("num_updated", [0, 6])
def test_no_detections_at_all_score_zero(num_updated: int) -> None:
    coco = ground_truth(6)
    evaluator = CocoEvaluator(coco)
    evaluator.update(list(coco.imgs)[:num_updated], [result_of([])] * num_updated)
    metrics = evaluator.summarize().metrics
    assert (metrics["AP"], metrics["AR100"]) == (0, 0)
    assert evaluator.results == []


def test_figures_without_ground_truth_are_undefined() -> None:
    coco = quiet_index({"images": [{"id": 10}], "annotations": [], "categories": [{"id": 1, "name": "cat"}]})
    evaluator = CocoEvaluator(coco)
    evaluator.update([10], [result_of([(0.5, 1, [1, 2, 4, 8])])])
    summary = evaluator.summarize()
    assert set(summary.metrics.values()) == {-1.0}
    assert summary.class_ap == {1: -1.0}


def test_values_that_are_not_finite_are_dropped_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    coco = ground_truth()
    evaluator = CocoEvaluator(coco)
    evaluator.update(coco.imgs, [true_result(coco, image_id) for image_id in coco.imgs])
    bad = [(float("nan"), 1, [0.0, 0, 5, 5]), (0.9, 1, [0, float("inf"), 5, 5]), (0.9, 2, [1, 1, 3, 3])]
    evaluator = CocoEvaluator(coco)
    evaluator.update([10], [result_of(bad)])
    assert [entry["category_id"] for entry in evaluator.results] == [2]
    with caplog.at_level(logging.WARNING):
        evaluator.summarize()
    assert "dropped 2 detections" in caplog.text


def test_unknown_image_is_refused() -> None:
    with pytest.raises(ValueError, match="image 99"):
        CocoEvaluator(ground_truth()).update([99], [result_of([])])


def test_processes_share_their_detections_once_each(monkeypatch: pytest.MonkeyPatch) -> None:
    coco = ground_truth()
    ours, theirs = CocoEvaluator(coco), CocoEvaluator(coco)
    ids = list(coco.imgs)
    ours.update(ids[:4], [true_result(coco, image_id) for image_id in ids[:4]])
    theirs.update(ids[3:], [true_result(coco, image_id) for image_id in ids[3:]])
    contents: list[Any] = []
    monkeypatch.setattr(distributed, "gather_objects", lambda value: contents.append(value) or [value])
    ours.synchronize()
    theirs.synchronize()
    monkeypatch.setattr(distributed, "gather_objects", lambda value: contents)
    for evaluator in (ours, theirs):
        evaluator.synchronize()
        assert len(evaluator.results) == sum(not entry["iscrowd"] for entry in coco.anns.values())
        assert evaluator.summarize().metrics["AP"] == pytest.approx(1.0)
    assert ours.results == theirs.results
