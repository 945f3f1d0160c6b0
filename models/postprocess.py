"""A detector's output -> boxes in pixels of the original image (spec 5.5).

Shapes: B images, Q queries, K classes, D detections of an image.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchvision.ops import box_convert


class Detections(NamedTuple):
    """Of a batch: scores (B, D), labels (B, D) int64, boxes (B, D, 4) xyxy in pixels."""

    scores: Tensor
    labels: Tensor
    boxes: Tensor


class Postprocessor:
    """(outputs, sizes) -> [{"scores", "labels", "boxes"}], an entry an image.

    Args:
        select: (outputs, sizes) -> `Detections`, in tensors alone, so that it can be exported with the detector.
    """

    def __init__(self, select: Callable[[dict[str, Any], Tensor], Detections]) -> None:
        self.select = select

    @torch.no_grad()
    def __call__(self, outputs: dict[str, Any], sizes: Tensor) -> list[dict[str, Tensor]]:
        """The detections of each image.

        Args:
            outputs: "pred_logits" (B, Q, K), with one logit more where "no object" has its own; "pred_boxes" (B, Q, 4)
                cxcywh in [0, 1].
            sizes: (B, 2) height and width, in pixels, of the images that the boxes are wanted in.

        Returns:
            For each image "scores" (D,), "labels" (D,) int64 and "boxes" (D, 4) xyxy in pixels.
        """
        images = zip(*self.select(outputs, sizes), strict=True)
        return [{"scores": scores, "labels": labels, "boxes": boxes} for scores, labels, boxes in images]


def select_likeliest(outputs: dict[str, Any], sizes: Tensor) -> Detections:
    """DETR's: each query gives its likeliest class, so that D is Q."""
    scores, labels = outputs["pred_logits"].float().softmax(-1)[..., :-1].max(-1)
    return Detections(scores, labels, _to_pixels(outputs["pred_boxes"], sizes))


def select_best_pairs(outputs: dict[str, Any], sizes: Tensor, limit: int = 100) -> Detections:
    """Conditional and Anchor DETR's: the `limit` best pairs of query and class, best first."""
    logits = outputs["pred_logits"]
    scores, flat = logits.float().sigmoid().flatten(1).topk(min(limit, logits[0].numel()))
    query, labels = flat // logits.shape[-1], flat % logits.shape[-1]
    boxes = _to_pixels(outputs["pred_boxes"], sizes)
    return Detections(scores, labels, boxes.gather(1, query.unsqueeze(-1).expand(-1, -1, 4)))


def _to_pixels(boxes_cxcywh: Tensor, sizes: Tensor) -> Tensor:
    scale = sizes.to(boxes_cxcywh.device)[:, [1, 0, 1, 0]].unsqueeze(1)
    boxes: Tensor = box_convert(boxes_cxcywh.float(), "cxcywh", "xyxy")
    return boxes * scale


softmax_detections = Postprocessor(select_likeliest)
focal_detections = Postprocessor(select_best_pairs)
