"""Hungarian matching of predictions to objects, for all decoder layers at once.

Shapes: L decoder layers, B images, Q queries, K classes, n objects of an image, M matched pairs in all.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torchvision.ops import box_convert, generalized_box_iou

logger = logging.getLogger(__name__)

Target = dict[str, Tensor]
# Logits (L, Q, K) and labels (n,) -> cost (L, Q, n).
ClassCost = Callable[[Tensor, Tensor], Tensor]
# Stands for NaN and infinities, so that the assignment always exists and avoids them.
UNUSABLE_COST = 1e6


class Matches(NamedTuple):
    """Matched pairs; all (M,) int64. `target` counts through the objects of all images in order."""

    layer: Tensor
    image: Tensor
    query: Tensor
    target: Tensor


def softmax_class_cost(logits: Tensor, labels: Tensor) -> Tensor:
    """DETR's: minus the probability of the object's class (spec 5.3)."""
    return -logits.softmax(-1)[..., labels]


def focal_class_cost(logits: Tensor, labels: Tensor, alpha: float = 0.25, gamma: float = 2.0) -> Tensor:
    """Conditional and Anchor DETR's: what the focal loss would gain and lose (spec 5.3)."""
    p = logits[..., labels].sigmoid()
    positive = alpha * (1 - p) ** gamma * -(p + 1e-8).log()
    negative = (1 - alpha) * p**gamma * -(1 - p + 1e-8).log()
    return positive - negative


class HungarianMatcher:
    """The assignment of least total cost between the queries and the objects of each image.

    Args:
        class_cost: `softmax_class_cost` or `focal_class_cost`.
        cost_class, cost_bbox, cost_giou: weights of the class cost, the L1 distance of the boxes (cxcywh in [0, 1]),
            and minus their generalised IoU.
    """

    def __init__(
        self, class_cost: ClassCost, cost_class: float = 1.0, cost_bbox: float = 5.0, cost_giou: float = 2.0
    ) -> None:
        self.class_cost = class_cost
        self.cost_class = cost_class
        self.cost_bbox = cost_bbox
        self.cost_giou = cost_giou

    @torch.no_grad()
    def __call__(self, logits: Tensor, boxes: Tensor, targets: Sequence[Target]) -> Matches:
        """Match every layer of every image.

        Args:
            logits: (L, B, Q, K).
            boxes: (L, B, Q, 4) cxcywh in [0, 1].
            targets: for each image "labels" (n,) int64 and "boxes" (n, 4) cxcywh in [0, 1].

        Returns:
            min(n, Q) pairs for each image and layer, on the device of `logits`. NaN and infinite costs are
            avoided where possible, and logged.
        """
        num_layers, _, num_queries, _ = logits.shape
        costs = self.costs(logits.float(), boxes.float(), targets)
        on_host = torch.cat([cost.flatten() for cost in costs]).cpu()  # the one transfer to the host
        if not on_host.isfinite().all():
            logger.warning("matching met %d costs that are not finite", int((~on_host.isfinite()).sum()))
            on_host = on_host.nan_to_num(nan=UNUSABLE_COST, posinf=UNUSABLE_COST, neginf=UNUSABLE_COST)
        rows, first = [], 0
        by_image = torch.split(on_host, [cost.numel() for cost in costs])
        for image, (cost, target) in enumerate(zip(by_image, targets, strict=True)):
            count = len(target["labels"])
            for layer, block in enumerate(cost.view(num_layers, num_queries, count).numpy()):
                query, index = linear_sum_assignment(block)
                rows.append((np.full_like(query, layer), np.full_like(query, image), query, index + first))
            first += count
        matches = torch.from_numpy(np.concatenate(rows, 1))
        return Matches(*matches.to(logits.device, non_blocking=True))

    def costs(self, logits: Tensor, boxes: Tensor, targets: Sequence[Target]) -> list[Tensor]:
        """What each image's objects would cost each query: (L, Q, n); arguments as of a call, in float32."""
        wanted = torch.cat([target["boxes"] for target in targets]).float()
        wanted_corners = box_convert(wanted, "cxcywh", "xyxy")
        corners = box_convert(boxes, "cxcywh", "xyxy")
        costs, first = [], 0
        for image, target in enumerate(targets):
            objects = slice(first, first + len(target["labels"]))
            cost = self.class_cost(logits[:, image], target["labels"]) * self.cost_class
            cost.add_(torch.cdist(boxes[:, image], wanted[objects], p=1), alpha=self.cost_bbox)
            overlap = generalized_box_iou(corners[:, image].flatten(0, 1), wanted_corners[objects])
            costs.append(cost.sub_(overlap.view_as(cost), alpha=self.cost_giou))
            first = objects.stop
        return costs
