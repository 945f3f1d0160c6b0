"""Whether an exported detector is the detector that it was, and how fast it is.

Shapes: B images, H x W pixels, D detections of an image.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from datasets import collate, eval_transform
from models.postprocess import Detections
from tools.detection_graph import Detect, Metadata
from tools.pictures import read_picture
from util.errors import InputError

RUNS = 10
WARM_UP = 2
# How far the scores of partners may be apart.
SCORE_MARGIN = 1e-4


@dataclass(frozen=True)
class Inputs:
    """A batch: images uint8 (B, 3, H, W), pad_mask bool (B, H, W), sizes int64 (B, 2), and what to call it."""

    name: str
    images: Tensor
    pad_mask: Tensor
    sizes: Tensor

    def run(self, detect: Detect) -> Detections:
        """The detections of the batch."""
        with torch.inference_mode():
            return detect(self.images, self.pad_mask, self.sizes)


@dataclass(frozen=True)
class Difference:
    """The largest of boxes, in pixels, and of scores; infinite where a detection has no partner.

    count: detections that were compared.
    where: the batch in which boxes differ most.
    """

    boxes: float = 0.0
    scores: float = 0.0
    count: int = 0
    where: str = ""

    def worst(self, other: Difference) -> Difference:
        """Of two."""
        boxes, where = max((self.boxes, self.where), (other.boxes, other.where))
        return Difference(boxes, max(self.scores, other.scores), self.count + other.count, where)


def prepare(files: Sequence[Path], metadata: Metadata) -> list[Inputs]:
    """Each image alone, then all of them in one padded batch if the images of a batch do not change each other.

    Where they do (ENACT `official`), flat padding counts too, and rounding decides the signs of its curvature.

    Raises:
        InputError: an image cannot be read, or there are none.
    """
    if not files:
        raise InputError("there are no images to check the exported file on; give some with --images")
    resize = eval_transform(metadata.short_side, metadata.max_long_side)
    pictures = [read_picture(file) for file in files]
    resized = [resize(picture) for picture in pictures]
    sizes = torch.tensor([[picture.height, picture.width] for picture in pictures])
    alone = [[index] for index in range(len(files))]
    together = [list(range(len(files)))] if len(files) > 1 and not metadata.alone else []
    inputs = []
    for indices in (*alone, *together):
        batch = collate([(resized[index], {}) for index in indices])
        name = str(files[indices[0]]) if len(indices) == 1 else f"the batch of all {len(files)}"
        inputs.append(Inputs(name, batch.images, batch.pad_mask, sizes[indices]))
    return inputs


def compare(first: Detect, second: Detect, inputs: Inputs) -> Difference:
    """How far the detections of two forms of a detector are apart, in whatever order they come."""
    difference = Difference(where=inputs.name)
    for expected, found in zip(_images(inputs.run(first)), _images(inputs.run(second)), strict=True):
        there, back = _distances(expected, found), _distances(found, expected)
        boxes, scores = (float(torch.cat(columns).max()) for columns in zip(there, back, strict=True))
        difference = difference.worst(Difference(boxes, scores, len(there[0]), inputs.name))
    return difference


def _images(detections: Detections) -> list[Detections]:
    return [Detections(*image) for image in zip(*detections, strict=True)]


def _distances(detections: Detections, others: Detections) -> tuple[Tensor, Tensor]:
    """Of boxes and scores, from each detection to its partner: the nearest box of its label and about its score.

    Those as good as the worst of the others, whose list may end just before, have none and are left out.
    """
    margin = others.scores.min() + SCORE_MARGIN if len(others.scores) else 0.0
    certain = detections.scores > margin
    scores, labels, boxes = (column[certain] if certain.any() else column for column in detections)
    score = (scores[:, None] - others.scores).abs()  # (D, D')
    possible = (labels[:, None] == others.labels) & (score <= SCORE_MARGIN)
    box = (boxes[:, None] - others.boxes).abs().amax(-1).nan_to_num(nan=float("inf"))
    box = box.masked_fill(~possible, float("inf"))
    distance, partner = box.min(1)
    return distance, score.masked_fill(~possible, float("inf")).gather(1, partner[:, None])[:, 0]


def time_both(first: Detect, second: Detect, inputs: Inputs) -> dict[str, Any]:
    """Least, median and greatest seconds of PyTorch and of the exported file, in turns."""
    seconds: dict[str, list[float]] = {"pytorch": [], "exported": []}
    for turn in range(WARM_UP + RUNS):
        for name, detect in zip(seconds, (first, second), strict=True):
            start = time.perf_counter()
            inputs.run(detect)
            if turn >= WARM_UP:
                seconds[name].append(time.perf_counter() - start)
    return {name: (min(runs), statistics.median(runs), max(runs)) for name, runs in seconds.items()}
