"""COCO's box metrics over several processes, computed by faster-coco-eval where it is installed, else pycocotools."""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor
from torchvision.ops import box_convert

from datasets.annotations import quiet_index
from util import distributed

try:
    import faster_coco_eval as faster
except ImportError:
    faster = None

METRIC_NAMES = ("AP", "AP50", "AP75", "APS", "APM", "APL", "AR1", "AR10", "AR100", "ARS", "ARM", "ARL")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CocoSummary:
    """The figures of one evaluation, in [0,1]; -1 where the ground truth has nothing to count."""

    metrics: dict[str, float]  # by METRIC_NAMES
    class_ap: dict[int, float]  # AP by category id
    table: str  # pycocotools' text, of twelve lines


class CocoEvaluator:
    """Collects detections of the images of `coco` and compares them with its boxes.

    Args:
        coco: the ground truth. All its images count, those without detections too.
    """

    def __init__(self, coco: COCO) -> None:
        self._coco = coco
        self._detections: dict[int, npt.NDArray[np.float64]] = {}  # image id -> (k, 6): x, y, w, h, score, label
        self._num_dropped = 0

    def update(self, image_ids: Iterable[int], results: list[dict[str, Tensor]]) -> None:
        """Add the detections of some images; an image that is already there keeps what it has.

        Detections with a score or coordinate that is not finite are dropped, and counted in a warning.

        Args:
            image_ids: of the images, ids of the ground truth.
            results: for each image, scores (k,), labels (k,), boxes (k,4) xyxy in pixels of the original image.
        """
        for image_id, result in zip(image_ids, results, strict=True):
            if image_id not in self._coco.imgs:
                raise ValueError(f"image {image_id} is not in the ground truth")
            if image_id not in self._detections:
                self._detections[image_id] = self._finite_rows(result)

    def synchronize(self) -> None:
        """Share the detections among all processes; afterwards each has all of them, every image once."""
        parts = distributed.gather_objects((self._detections, self._num_dropped))
        self._num_dropped = sum(num_dropped for _, num_dropped in parts)
        self._detections = {}
        for detections, _ in parts:
            self._detections = {**detections, **self._detections}

    @property
    def results(self) -> list[dict[str, Any]]:
        """All detections in COCO's results format: image_id, category_id, bbox [x, y, w, h] in pixels, score."""
        return [
            {"image_id": image_id, "category_id": int(label), "bbox": [x, y, w, h], "score": score}
            for image_id, rows in sorted(self._detections.items())
            for x, y, w, h, score, label in rows.tolist()
        ]

    def summarize(self) -> CocoSummary:
        """COCO's twelve figures, its table, and the AP of each class."""
        if self._num_dropped:
            logger.warning("dropped %d detections whose score or box is not finite", self._num_dropped)
        evaluate = _evaluate if faster is None else _evaluate_faster
        evaluation, table = evaluate(self._coco, self._detections_as_coco())
        metrics = dict(zip(METRIC_NAMES, map(float, evaluation.stats[: len(METRIC_NAMES)]), strict=True))
        return CocoSummary(metrics, _class_ap(evaluation), table)

    def _finite_rows(self, result: dict[str, Tensor]) -> npt.NDArray[np.float64]:
        boxes = box_convert(result["boxes"].double(), "xyxy", "xywh")  # (k, 4)
        others = torch.stack([result["scores"].double(), result["labels"].double()], dim=1)  # (k, 2)
        rows: npt.NDArray[np.float64] = torch.cat([boxes, others], dim=1).cpu().numpy()
        finite = np.isfinite(rows).all(axis=1)
        self._num_dropped += int((~finite).sum())
        return rows[finite]

    def _detections_as_coco(self) -> COCO:
        """What `COCO.loadRes` makes of results; it cannot take none at all."""
        annotations = [
            {**result, "id": number, "area": result["bbox"][2] * result["bbox"][3], "iscrowd": 0}
            for number, result in enumerate(self.results, start=1)
        ]
        sections = {name: self._coco.dataset[name] for name in ("images", "categories")}
        return quiet_index({**sections, "annotations": annotations})


def _evaluate(truth: COCO, detections: COCO) -> tuple[Any, str]:
    """An evaluation by pycocotools, and its table."""
    text = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = COCOeval(truth, detections, "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        with contextlib.redirect_stdout(text):
            evaluation.summarize()
    return evaluation, text.getvalue().rstrip()


def _evaluate_faster(truth: COCO, detections: COCO) -> tuple[Any, str]:
    """The same by faster-coco-eval, which writes into the annotations that it gets and adds lines to the table."""
    lines: list[str] = []
    indices = [
        faster.COCO({**coco.dataset, "annotations": [dict(entry) for entry in coco.dataset["annotations"]]})
        for coco in (truth, detections)
    ]
    evaluation = faster.COCOeval_faster(*indices, "bbox", print_function=lines.append)
    evaluation.evaluate()
    evaluation.accumulate()
    lines.clear()
    evaluation.summarize()
    return evaluation, "\n".join(lines[: len(METRIC_NAMES)])


def _class_ap(evaluation: Any) -> dict[int, float]:
    # (thresholds, recalls, classes) of (thresholds, recalls, classes, size ranges, detection limits): all sizes, 100
    precision = evaluation.eval["precision"][:, :, :, 0, -1]
    averages: dict[int, float] = {}
    for column, category_id in enumerate(evaluation.params.catIds):
        defined = precision[:, :, column][precision[:, :, column] > -1]
        averages[int(category_id)] = float(defined.mean()) if defined.size else -1.0
    return averages
