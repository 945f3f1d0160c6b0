"""tools/analysis.py against COCO's own evaluator and against counting by hand."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from torchvision.ops import box_iou

from datasets import CocoEvaluator
from datasets.annotations import quiet_index
from tools.analysis import Analysis, analyse
from util.errors import InputError

NAMES = {2: "cat", 3: "dog", 7: "<b>bird</b>"}


def ground_truth(objects: list[tuple[int, int, list[float]]], images: int = 1, crowds: tuple[int, ...] = ()) -> COCO:
    """Images 1, 2, ... of 100 x 100 pixels with (image, category, bbox) objects; `crowds` are numbers of objects."""
    size = {"width": 100, "height": 100}
    return quiet_index({
        "images": [{"id": image, "file_name": f"{image}.jpg", **size} for image in range(1, images + 1)],
        "categories": [{"id": key, "name": name} for key, name in NAMES.items()],
        "annotations": [
            {"id": number + 1, "image_id": image, "category_id": category, "bbox": bbox, "area": bbox[2] * bbox[3],
             "iscrowd": int(number in crowds)}
            for number, (image, category, bbox) in enumerate(objects)
        ],
    })  # fmt: skip


def detection(image: int, category: int, bbox: list[float], score: float) -> dict[str, Any]:
    return {"image_id": image, "category_id": category, "bbox": bbox, "score": score}


def random_case(seed: int, images: int = 12) -> tuple[COCO, list[dict[str, Any]]]:
    """Objects, and detections near some of them, some of another class, and some anywhere."""
    random = np.random.default_rng(seed)
    objects, found = [], []
    for image in range(1, images + 1):
        for _ in range(int(random.integers(0, 5))):
            box = random.uniform([0, 0, 10, 10], [60, 60, 40, 40])
            category = int(random.choice(list(NAMES)))
            objects.append((image, category, box.tolist()))
            for _ in range(int(random.integers(0, 3))):
                other = category if random.random() < 0.7 else int(random.choice(list(NAMES)))
                found.append(detection(image, other, (box + random.normal(0, 3, 4)).tolist(), float(random.random())))
        for _ in range(int(random.integers(0, 3))):
            box = random.uniform([0, 0, 10, 10], [60, 60, 40, 40])
            found.append(detection(image, int(random.choice(list(NAMES))), box.tolist(), float(random.random())))
    return ground_truth(objects, images, crowds=(3,)), found


@pytest.mark.parametrize("seed", range(3))
def test_figures_are_those_of_the_evaluator(seed: int) -> None:
    coco, found = random_case(seed)
    evaluator = CocoEvaluator(coco)
    for image in coco.imgs:
        own = [one for one in found if one["image_id"] == image]
        boxes = torch.tensor([one["bbox"] for one in own], dtype=torch.float64).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        labels = torch.tensor([one["category_id"] for one in own], dtype=torch.int64)
        scores = torch.tensor([one["score"] for one in own], dtype=torch.float64)
        evaluator.update([image], [{"boxes": boxes, "labels": labels, "scores": scores}])
    summary, analysis = evaluator.summarize(), analyse(coco, found)
    assert analysis.metrics == pytest.approx(summary.metrics)
    assert {one.category_id: one.ap for one in analysis.classes} == pytest.approx(summary.class_ap)
    assert np.mean([one.ap50 for one in analysis.classes]) == pytest.approx(summary.metrics["AP50"])
    assert np.mean([one.ap75 for one in analysis.classes]) == pytest.approx(summary.metrics["AP75"])
    assert analysis.mean_curve(0.5).mean() == pytest.approx(summary.metrics["AP50"])
    assert analysis.mean_curve(0.75).mean() == pytest.approx(summary.metrics["AP75"])


def test_a_curve_counted_by_hand() -> None:
    """Four cats; detections in the order of their scores are right, wrong, right, right."""
    boxes = [[0.0, 0, 10, 10], [20.0, 0, 10, 10], [40.0, 0, 10, 10], [60.0, 0, 10, 10]]
    coco = ground_truth([(1, 2, box) for box in boxes])
    nowhere = [80.0, 80, 10, 10]
    shown = [boxes[0], nowhere, boxes[1], boxes[2]]
    analysis = analyse(coco, [detection(1, 2, box, 0.9 - 0.1 * row) for row, box in enumerate(shown)])
    recalls = [1 / 4, 1 / 4, 2 / 4, 3 / 4]
    precisions = [1, 1 / 2, 2 / 3, 3 / 4]
    for row, recall in enumerate(analysis.recalls):
        best = max((p for r, p in zip(recalls, precisions, strict=True) if r >= recall - 1e-9), default=0.0)
        assert analysis.curves[0.5][0, row] == pytest.approx(best)
    assert np.isnan(analysis.curves[0.5][1:]).all()  # there are no dogs and no birds
    np.testing.assert_allclose(analysis.mean_curve(0.5), analysis.curves[0.5][0])
    assert math.isnan(analysis.classes[1].ap)
    assert (analysis.classes[0].objects, analysis.classes[1].objects) == (4, 0)
    assert [analysis.classes[0].precision, analysis.classes[0].recall] == pytest.approx([3 / 4, 3 / 4])


def count_slowly(coco: COCO, found: list[dict[str, Any]]) -> dict[tuple[int | None, int | None], int]:
    """(class of the object, class of the detection) -> how often; None: nothing."""
    counts: dict[tuple[int | None, int | None], int] = {}
    for image in coco.imgs:
        objects = [one for one in coco.imgToAnns[image] if not one["iscrowd"]]
        crowds = [one for one in coco.imgToAnns[image] if one["iscrowd"]]
        taken: list[int] = []
        shown = [one for one in found if one["image_id"] == image and one["score"] >= 0.5]
        for one in sorted(shown, key=lambda one: -one["score"]):
            free = [number for number in range(len(objects)) if number not in taken]
            near = [number for number in free if overlap(one, objects[number]) >= 0.5]
            own = [number for number in near if objects[number]["category_id"] == one["category_id"]]
            pair: tuple[int | None, int | None]
            if near:
                best = max(own or near, key=lambda number, one=one: overlap(one, objects[number]))  # type: ignore[misc]
                taken.append(best)
                pair = objects[best]["category_id"], one["category_id"]
            elif any(inside(one, crowd) >= 0.5 for crowd in crowds if crowd["category_id"] == one["category_id"]):
                continue
            else:
                pair = None, one["category_id"]
            counts[pair] = counts.get(pair, 0) + 1
        for number in set(range(len(objects))) - set(taken):
            pair = objects[number]["category_id"], None
            counts[pair] = counts.get(pair, 0) + 1
    return counts


def corners(one: dict[str, Any]) -> torch.Tensor:
    x, y, width, height = one["bbox"]
    return torch.tensor([[x, y, x + width, y + height]], dtype=torch.float64)


def overlap(one: dict[str, Any], other: dict[str, Any]) -> float:
    return float(box_iou(corners(one), corners(other)))


def inside(one: dict[str, Any], crowd: dict[str, Any]) -> float:
    """The part of a box that lies in a crowd."""
    [left, top, right, bottom] = torch.cat([
        torch.maximum(corners(one), corners(crowd))[0, :2], torch.minimum(corners(one), corners(crowd))[0, 2:]
    ]).tolist()  # fmt: skip
    return float(max(0, right - left) * max(0, bottom - top) / (one["bbox"][2] * one["bbox"][3]))


@pytest.mark.parametrize("seed", range(5))
def test_confusion_is_that_of_counting_slowly(seed: int) -> None:
    coco, found = random_case(seed, images=30)
    analysis, slow = analyse(coco, found), count_slowly(coco, found)
    index = [*NAMES, None]
    for row, there in enumerate(index):
        for column, shown in enumerate(index):
            assert analysis.confusion[row, column] == slow.get((there, shown), 0), (there, shown)
    assert slow  # something was counted
    for match in analysis.matches:
        assert match.object_boxes.shape == (len(match.object_labels), 4)
        assert sorted(match.scores.tolist(), reverse=True) == match.scores.tolist()
        own = count_slowly(quiet_index({**coco.dataset, "images": [coco.imgs[match.image_id]], "annotations": [
            one for one in coco.dataset["annotations"] if one["image_id"] == match.image_id]}), found)  # fmt: skip
        right = sum(count for (there, shown), count in own.items() if there == shown)
        detections = sum(count for (_, shown), count in own.items() if shown is not None)
        objects = sum(count for (there, _), count in own.items() if there is not None)
        assert match.f1 == pytest.approx(2 * right / (detections + objects) if detections + objects else 1)


def test_a_detection_prefers_an_object_of_its_class() -> None:
    coco = ground_truth([(1, 2, [0.0, 0, 10, 10]), (1, 3, [1.0, 0, 10, 10])])
    analysis = analyse(coco, [detection(1, 3, [0.0, 0, 10, 10], 0.9), detection(1, 3, [0.0, 0, 10, 10], 0.8)])
    assert analysis.confusion.tolist() == [[0, 1, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    [match] = analysis.matches
    assert (match.correct.tolist(), match.found.tolist(), match.errors) == ([True, False], [False, True], 2)
    assert analysis.confusions(5) == [(0, 1, 1)]


def test_a_detection_in_a_crowd_of_its_class_does_not_count() -> None:
    coco = ground_truth([(1, 2, [0.0, 0, 50, 50])], crowds=(0,))
    found = [detection(1, 2, [5.0, 5, 10, 10], 0.9), detection(1, 3, [5.0, 5, 10, 10], 0.9)]
    analysis = analyse(coco, found)
    assert analysis.confusion[3].tolist() == [0, 1, 0, 0]
    assert analysis.confusion.sum() == 1


def test_the_worst_images_come_first_and_right_ones_not_at_all() -> None:
    box, away = [0.0, 0, 10, 10], [50.0, 50, 10, 10]
    coco = ground_truth([(1, 2, box), (2, 2, box), (2, 2, away), (3, 2, box), (3, 2, away)], images=5)
    found = [detection(1, 2, box, 0.9), detection(3, 2, box, 0.9), detection(4, 2, box, 0.9), detection(5, 2, box, 0.4)]
    analysis = analyse(coco, found)
    assert [match.image_id for match in analysis.worst(9)] == [2, 4, 3]  # F1 0 with two errors, 0 with one, 2/3
    assert [match.image_id for match in analysis.worst(1)] == [2]
    assert [match.f1 for match in analysis.matches] == pytest.approx([1, 0, 2 / 3, 0, 1])


def test_nothing_found_and_nothing_there_are_defined() -> None:
    def figures(analysis: Analysis) -> list[float]:
        return [analysis.metrics["AP"], analysis.metrics["AR100"]]

    empty = analyse(ground_truth([(1, 2, [0.0, 0, 10, 10])]), [])
    assert figures(empty) == [0, 0]
    assert empty.confusion[0].tolist() == [0, 0, 0, 1]
    blank = analyse(ground_truth([]), [detection(1, 2, [0.0, 0, 10, 10], 0.9)])
    assert figures(blank) == [-1, -1]
    assert np.isnan(blank.mean_curve(0.5)).all()
    # a category of which the data knows nothing
    assert analyse(ground_truth([]), [detection(1, 5, [0.0, 0, 10, 10], 0.9)]).confusion.sum() == 0


@pytest.mark.parametrize(("result", "text"), [
    (detection(9, 2, [0.0, 0, 1, 1], 0.5), "image 9, which the ground truth lacks"),
    (detection(1, 2, [0.0, 0, 1], 0.5), "four finite numbers and one"),
    (detection(1, 2, [0.0, 0, 1, math.nan], 0.5), "four finite numbers and one"),
    (detection(1, 2, [0.0, 0, 1, 1], math.inf), "four finite numbers and one"),
    ({"image_id": [1], "category_id": 2, "bbox": [0, 0, 1, 1], "score": 1}, "two integers are needed"),
    ({"image_id": 1}, "is not an object with image_id"),
    ("cat", "is not an object with image_id"),
])  # fmt: skip
def test_a_malformed_result_is_named(result: Any, text: str) -> None:
    coco = ground_truth([(1, 2, [0.0, 0, 10, 10])])
    with pytest.raises(InputError, match=f"^detection 1 .*{text}"):
        analyse(coco, [detection(1, 2, [0.0, 0, 1, 1], 1), result])
