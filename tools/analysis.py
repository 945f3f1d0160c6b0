"""What a detector gets right and wrong: precision and recall by class, confusion, and the images that go worst.

    analysis = analyse(coco, evaluator.results)
    analysis.classes[0].ap50, analysis.confusion, analysis.worst(8)

Shapes: K classes, in the order of their category ids; R = 101 recalls, 0 to 1; n objects and k detections of an image.
"""

from __future__ import annotations

import contextlib
import io
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from pycocotools import mask as masks
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from datasets import METRIC_NAMES
from datasets.annotations import quiet_index
from util.errors import InputError

MIN_SCORE, MIN_IOU = 0.5, 0.5  # of detections that count outside COCO's own figures
CURVE_IOUS = (0.5, 0.75)

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]
Result = Mapping[str, Any]  # COCO's results format: image_id, category_id, bbox [x, y, w, h] in pixels, score


@dataclass(frozen=True)
class ClassFigures:
    """One class; figures in [0, 1], NaN where nothing defines them.

    Args:
        ap, ap50, ap75: COCO's, of all sizes.
        precision, recall: of the detections that count, as `Analysis.confusion` has them.
    """

    category_id: int
    name: str
    objects: int
    ap: float
    ap50: float
    ap75: float
    precision: float
    recall: float


@dataclass(frozen=True)
class ImageMatch:
    """The objects of an image and the detections that count, each with at most one of the others.

    Best scores first, a detection takes a free object that it overlaps by an IoU of `MIN_IOU`: the one of its own class
    that it overlaps most, else the one of any class. Crowd regions are no objects, and detections that lie in one of
    their class without meeting an object are left out, as in COCO's metric.

    Args:
        object_boxes: (n, 4) x, y, w, h in pixels.
        object_labels: (n,) category ids.
        boxes, labels, scores: (k, 4), (k,) and (k,), of the detections, best first.
        partner: (k,) the object that each detection takes; -1: none.
    """

    image_id: int
    object_boxes: Floats
    object_labels: Integers
    boxes: Floats
    labels: Integers
    scores: Floats
    partner: Integers

    @property
    def correct(self) -> npt.NDArray[np.bool_]:
        """(k,), True for a detection that takes an object of its class."""
        taken = self.partner >= 0
        right: npt.NDArray[np.bool_] = taken.copy()
        right[taken] = self.labels[taken] == self.object_labels[self.partner[taken]]
        return right

    @property
    def found(self) -> npt.NDArray[np.bool_]:
        """(n,), True for an object that a detection of its class takes."""
        hit = np.zeros(len(self.object_labels), dtype=np.bool_)
        hit[self.partner[self.correct]] = True
        return hit

    @property
    def errors(self) -> int:
        """Wrong detections and objects not found; an object found as another class is both."""
        return int((~self.correct).sum() + (~self.found).sum())

    @property
    def f1(self) -> float:
        """2 TP / (2 TP + FP + FN); 1 for an image without objects and without detections."""
        right = 2 * int(self.correct.sum())
        return right / (right + self.errors) if right + self.errors else 1.0


@dataclass(frozen=True)
class Analysis:
    """Everything that `analyse` finds.

    Args:
        metrics: COCO's twelve figures by `METRIC_NAMES`; -1 where the ground truth has nothing to count.
        recalls: (R,).
        curves: for each of `CURVE_IOUS`, precision at each recall, (K, R); NaN for a class without objects.
        confusion: (K + 1, K + 1) counts; the row is an object's class, the column that of the detection that takes it.
            The last row is of detections without an object, the last column of objects without a detection.
        matches: of every image, in the order of the ids.
    """

    metrics: dict[str, float]
    classes: tuple[ClassFigures, ...]
    recalls: Floats
    curves: dict[float, Floats]
    confusion: Integers
    matches: tuple[ImageMatch, ...]

    def mean_curve(self, iou: float) -> Floats:
        """Precision at each recall, averaged over the classes that have objects, (R,); NaN if none has."""
        curves = self.curves[iou]
        defined = curves[~np.isnan(curves).any(axis=1)]
        mean: Floats = defined.mean(axis=0) if len(defined) else np.full(len(self.recalls), np.nan)
        return mean

    def worst(self, count: int) -> list[ImageMatch]:
        """The images of lowest F1 (below 1), those with more errors first among equals."""
        wrong = [match for match in self.matches if match.errors]
        return sorted(wrong, key=lambda match: (match.f1, -match.errors, match.image_id))[:count]

    def seen(self) -> list[int]:
        """The rows of the classes of which there are objects, or detections that count."""
        counts = self.confusion.sum(axis=0) + self.confusion.sum(axis=1)
        return [row for row, one in enumerate(self.classes) if one.objects or counts[row]]

    def confusions(self, count: int) -> list[tuple[int, int, int]]:
        """(row, column, count) of the most frequent errors in `confusion`, nothing on its diagonal."""
        wrong = self.confusion.copy()
        np.fill_diagonal(wrong, 0)
        order = np.argsort(-wrong, axis=None, kind="stable")[:count]
        places = [(int(place) // len(wrong), int(place) % len(wrong)) for place in order]
        return [(row, column, int(wrong[row, column])) for row, column in places if wrong[row, column]]


def analyse(coco: COCO, results: Iterable[Result]) -> Analysis:
    """Compare detections with the ground truth.

    Args:
        coco: the ground truth. All its images count, those without detections too.
        results: detections in COCO's results format. Those of category ids that the ground truth lacks do not count,
            as in COCO's metric.

    Raises:
        InputError: a result is malformed, or of an image that the ground truth lacks.
    """
    kept = check_results(coco, results)
    evaluation = _evaluate(coco, kept)
    matches = match_images(coco, kept)
    category_ids = sorted(coco.cats)
    confusion = count_confusion(matches, category_ids)
    precision: Floats = np.where((found := evaluation.eval["precision"][:, :, :, 0, -1]) < 0, np.nan, found)
    at = {iou: int(np.flatnonzero(np.isclose(evaluation.params.iouThrs, iou))[0]) for iou in CURVE_IOUS}
    return Analysis(
        metrics=dict(zip(METRIC_NAMES, map(float, evaluation.stats), strict=True)),
        classes=_class_figures(coco, category_ids, precision, at, confusion),
        recalls=np.asarray(evaluation.params.recThrs, dtype=np.float64),
        curves={iou: precision[index].T for iou, index in at.items()},
        confusion=confusion,
        matches=matches,
    )


def check_results(coco: COCO, results: Iterable[Result]) -> list[Result]:
    """The results of known categories; a malformed one is an InputError."""
    kept: list[Result] = []
    for number, result in enumerate(results):
        problem = _problem_of(coco, result)
        if problem is not None:
            raise InputError(f"detection {number} {problem}")
        if result["category_id"] in coco.cats:
            kept.append(result)
    return kept


def _problem_of(coco: COCO, result: Any) -> str | None:
    if not isinstance(result, Mapping) or not {"image_id", "category_id", "bbox", "score"} <= result.keys():
        return "is not an object with image_id, category_id, bbox and score, as in COCO's results format"
    if not all(isinstance(result[name], int) for name in ("image_id", "category_id")):
        return f"is of image {result['image_id']!r} and category {result['category_id']!r}; two integers are needed"
    if result["image_id"] not in coco.imgs:
        return f"is of image {result['image_id']!r}, which the ground truth lacks; are these results of other data?"
    bbox = result["bbox"]
    numbers = [*bbox, result["score"]] if isinstance(bbox, Sequence) and len(bbox) == 4 else [None]
    if not all(isinstance(number, int | float) and math.isfinite(number) for number in numbers):
        return f"has the bbox {bbox!r} and the score {result['score']!r}; four finite numbers and one are needed"
    return None


def _evaluate(coco: COCO, results: Sequence[Result]) -> COCOeval:
    """COCO's evaluation, without its prints."""
    annotations = [
        {**result, "id": number, "area": result["bbox"][2] * result["bbox"][3], "iscrowd": 0}
        for number, result in enumerate(results, start=1)
    ]
    sections = {name: coco.dataset[name] for name in ("images", "categories")}
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = COCOeval(coco, quiet_index({**sections, "annotations": annotations}), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation


def match_images(coco: COCO, results: Iterable[Result]) -> tuple[ImageMatch, ...]:
    """The match of every image of the ground truth, in the order of the ids; see `ImageMatch`."""
    by_image: dict[int, list[Result]] = defaultdict(list)
    for result in results:
        if result["score"] >= MIN_SCORE:
            by_image[result["image_id"]].append(result)
    return tuple(_match(image_id, coco.imgToAnns[image_id], by_image[image_id]) for image_id in sorted(coco.imgs))


def _match(image_id: int, annotations: Sequence[Result], results: Sequence[Result]) -> ImageMatch:
    objects = sorted(annotations, key=lambda annotation: bool(annotation["iscrowd"]))  # crowds last
    count = sum(not annotation["iscrowd"] for annotation in objects)
    ordered = sorted(results, key=lambda result: -result["score"])
    object_boxes, boxes = _boxes(objects), _boxes(ordered)
    object_labels, labels = _labels(objects), _labels(ordered)
    overlaps = np.zeros((len(ordered), len(objects)))
    if overlaps.size:  # pycocotools gives an empty list otherwise
        overlaps = masks.iou(boxes, object_boxes, [int(annotation["iscrowd"]) for annotation in objects])
    partner = _partners(overlaps[:, :count], labels, object_labels[:count])
    in_crowd = (overlaps[:, count:] >= MIN_IOU) & (labels[:, None] == object_labels[None, count:])  # (k, crowds)
    kept = (partner >= 0) | ~in_crowd.any(axis=1)
    scores = np.array([result["score"] for result in ordered], dtype=np.float64)
    return ImageMatch(
        image_id, object_boxes[:count], object_labels[:count], boxes[kept], labels[kept], scores[kept], partner[kept]
    )


def _partners(overlaps: Floats, labels: Integers, object_labels: Integers) -> Integers:
    """The object that each detection takes, (k,); -1: none. `overlaps` are (k, n), best detections first."""
    partner = np.full(len(overlaps), -1, dtype=np.int64)
    free = np.ones(len(object_labels), dtype=np.bool_)
    for row, overlap in enumerate(overlaps):
        within_reach = np.where(free & (overlap >= MIN_IOU), overlap, 0.0)
        of_own_class = np.where(object_labels == labels[row], within_reach, 0.0)
        choice = of_own_class if of_own_class.any() else within_reach
        if choice.any():
            partner[row] = choice.argmax()
            free[partner[row]] = False
    return partner


def count_confusion(matches: Iterable[ImageMatch], category_ids: Sequence[int]) -> Integers:
    """`Analysis.confusion`."""
    index = {category_id: number for number, category_id in enumerate(category_ids)}
    background = len(index)
    confusion = np.zeros((background + 1, background + 1), dtype=np.int64)
    for match in matches:
        for label, partner in zip(match.labels.tolist(), match.partner.tolist(), strict=True):
            row = index[int(match.object_labels[partner])] if partner >= 0 else background
            confusion[row, index[label]] += 1
        for place in set(range(len(match.object_labels))) - set(match.partner.tolist()):
            confusion[index[int(match.object_labels[place])], background] += 1
    return confusion


def _class_figures(
    coco: COCO, category_ids: Sequence[int], precision: Floats, at: Mapping[float, int], confusion: Integers
) -> tuple[ClassFigures, ...]:
    """Of every class; `precision` is (IoU thresholds, R, K), `at` the place of an IoU among the first."""
    objects, detections = confusion.sum(axis=1), confusion.sum(axis=0)
    return tuple(
        ClassFigures(
            category_id=category_id,
            name=str(coco.cats[category_id]["name"]),
            objects=int(objects[column]),
            ap=float(precision[:, :, column].mean()),
            ap50=float(precision[at[0.5], :, column].mean()),
            ap75=float(precision[at[0.75], :, column].mean()),
            precision=_ratio(confusion[column, column], detections[column]),
            recall=_ratio(confusion[column, column], objects[column]),
        )
        for column, category_id in enumerate(category_ids)
    )


def _ratio(part: Any, whole: Any) -> float:
    return float(part) / float(whole) if whole else math.nan


def _boxes(entries: Sequence[Result]) -> Floats:
    return np.array([entry["bbox"] for entry in entries], dtype=np.float64).reshape(-1, 4)


def _labels(entries: Sequence[Result]) -> Integers:
    return np.array([entry["category_id"] for entry in entries], dtype=np.int64)
