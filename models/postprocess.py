"""A detector's output -> boxes in pixels of the original image (spec 5.5)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torchvision.ops import box_convert

Postprocessor = Callable[[dict[str, Any], Tensor], list[dict[str, Tensor]]]


@torch.no_grad()
def softmax_detections(outputs: dict[str, Any], sizes: Tensor) -> list[dict[str, Tensor]]:
    """DETR's: each query gives its likeliest class.

    Args:
        outputs: "pred_logits" (B, Q, K + 1), "pred_boxes" (B, Q, 4) cxcywh in [0, 1].
        sizes: (B, 2) height and width, in pixels, of the images that the boxes are wanted in.

    Returns:
        For each image "scores" (Q,), "labels" (Q,) int64 and "boxes" (Q, 4) xyxy in pixels.
    """
    scores, labels = outputs["pred_logits"].float().softmax(-1)[..., :-1].max(-1)
    return _per_image(scores, labels, _to_pixels(outputs["pred_boxes"], sizes))


@torch.no_grad()
def focal_detections(outputs: dict[str, Any], sizes: Tensor, limit: int = 100) -> list[dict[str, Tensor]]:
    """Conditional and Anchor DETR's: the `limit` best pairs of query and class; arguments as `softmax_detections`."""
    logits = outputs["pred_logits"]
    scores, flat = logits.float().sigmoid().flatten(1).topk(min(limit, logits[0].numel()))
    query, labels = flat // logits.shape[-1], flat % logits.shape[-1]
    boxes = _to_pixels(outputs["pred_boxes"], sizes)
    return _per_image(scores, labels, boxes.gather(1, query.unsqueeze(-1).expand(-1, -1, 4)))


def _to_pixels(boxes_cxcywh: Tensor, sizes: Tensor) -> Tensor:
    scale = sizes.to(boxes_cxcywh.device)[:, [1, 0, 1, 0]].unsqueeze(1)
    boxes: Tensor = box_convert(boxes_cxcywh.float(), "cxcywh", "xyxy")
    return boxes * scale


def _per_image(scores: Tensor, labels: Tensor, boxes: Tensor) -> list[dict[str, Tensor]]:
    return [
        {"scores": image_scores, "labels": image_labels, "boxes": image_boxes}
        for image_scores, image_labels, image_boxes in zip(scores, labels, boxes, strict=True)
    ]
