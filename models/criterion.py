"""The training loss, for all decoder layers at once.

Shapes: L decoder layers, B images, Q queries, K classes, M matched pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import box_convert, generalized_box_iou_loss

from models.matcher import HungarianMatcher, Matches, Target
from util import distributed


class Normalizers(NamedTuple):
    """What the sums of the loss are divided by. Scalars, each the mean over processes (and accumulated batches)."""

    boxes: Tensor
    class_weight: Tensor


class ClassLoss(Protocol):
    """How a detector scores classes."""

    def __call__(self, logits: Tensor, classes: Tensor, normalizers: Normalizers) -> Tensor:
        """Logits (L, B, Q, K); classes (L, B, Q) int64, `num_classes` where no object was matched -> (L,)."""

    def weight_of(self, matched: Tensor, unmatched: Tensor) -> Tensor:
        """The normaliser's share of so many matched and unmatched queries."""

    def num_detections(self, logits: Tensor) -> Tensor:
        """(B, Q, K) -> (B,) float, the queries of each image whose likeliest class is an object."""


class SoftmaxClassLoss:
    """DETR's: cross-entropy with a last class "no object" that weighs `eos_coef` (spec 5.3)."""

    def __init__(self, eos_coef: float = 0.1) -> None:
        self.eos_coef = eos_coef

    def __call__(self, logits: Tensor, classes: Tensor, normalizers: Normalizers) -> Tensor:
        no_object = logits.shape[-1] - 1
        weight = torch.where(classes == no_object, self.eos_coef, 1.0)
        loss = F.cross_entropy(logits.flatten(0, 2), classes.flatten(), reduction="none").view_as(classes)
        return (loss * weight).sum((1, 2)) / normalizers.class_weight

    def weight_of(self, matched: Tensor, unmatched: Tensor) -> Tensor:
        return matched + self.eos_coef * unmatched

    def num_detections(self, logits: Tensor) -> Tensor:
        return (logits.argmax(-1) != logits.shape[-1] - 1).sum(1).float()


class FocalClassLoss:
    """Conditional and Anchor DETR's: sigmoid focal loss over the number of boxes (spec 5.3)."""

    def __init__(self, alpha: float = 0.25, gamma: float = 2.0) -> None:
        self.alpha = alpha
        self.gamma = gamma

    def __call__(self, logits: Tensor, classes: Tensor, normalizers: Normalizers) -> Tensor:
        unwanted = self._unwanted(logits).sum((1, 2, 3))  # as if no class were wanted anywhere
        num_classes = logits.shape[-1]
        matched = logits.gather(-1, classes.clamp(max=num_classes - 1).unsqueeze(-1)).squeeze(-1)
        wanted = self.alpha * (-matched).sigmoid() ** self.gamma * F.softplus(-matched)
        change = (wanted - self._unwanted(matched)) * (classes < num_classes)
        return (unwanted + change.sum((1, 2))) / normalizers.boxes

    def _unwanted(self, logits: Tensor) -> Tensor:
        """The loss of classes that are not there, in the shape of `logits`."""
        loss: Tensor = (1 - self.alpha) * logits.sigmoid() ** self.gamma * F.softplus(logits)
        return loss

    def weight_of(self, matched: Tensor, unmatched: Tensor) -> Tensor:
        return matched

    def num_detections(self, logits: Tensor) -> Tensor:
        return (logits.argmax(-1) != logits.shape[-1] - 1).sum(1).float()


class Criterion:
    """Matches predictions to objects and scores them: class, L1 distance of boxes, 1 - generalised IoU.

    Args:
        matcher: pairs predictions with objects.
        class_loss: `SoftmaxClassLoss` or `FocalClassLoss`.
        num_classes: the class index that stands for "no object".
        class_coef, bbox_coef, giou_coef: weights of the three losses.
        num_layers: decoder layers, of which all but the last have losses with the suffix _0, _1, ...

    Attributes:
        weight_dict: the weight of each loss in the sum that is trained on.
    """

    def __init__(
        self,
        matcher: HungarianMatcher,
        class_loss: ClassLoss,
        num_classes: int,
        *,
        class_coef: float = 1.0,
        bbox_coef: float = 5.0,
        giou_coef: float = 2.0,
        num_layers: int = 6,
    ) -> None:
        self.matcher = matcher
        self.class_loss = class_loss
        self.num_classes = num_classes
        weights = {"loss_ce": class_coef, "loss_bbox": bbox_coef, "loss_giou": giou_coef}
        suffixes = ["", *(f"_{layer}" for layer in range(num_layers - 1))]
        self.weight_dict = {key + suffix: weight for suffix in suffixes for key, weight in weights.items()}

    def eval(self) -> Criterion:
        """Nothing depends on a mode; here so that a criterion can stand where a module is expected."""
        return self

    def normalizers(
        self, batches: Sequence[Sequence[Target]], num_queries: int, *, over_processes: bool = True
    ) -> Normalizers:
        """What to divide by, so that processes and accumulated batches together give the loss of one large batch.

        Args:
            batches: the targets of each batch that is accumulated before a step.
            num_queries: Q.
            over_processes: count the objects of all processes, in a collective call.
        """
        images = [target for targets in batches for target in targets]
        device = images[0]["labels"].device if images else None
        boxes = sum(len(target["labels"]) for target in images)
        matched = sum(min(len(target["labels"]), num_queries) for target in images)
        counts = torch.tensor([boxes, matched, len(images) * num_queries - matched], device=device, dtype=torch.float32)
        counts /= len(batches)
        if over_processes:
            counts = distributed.sum_over_processes(counts) / distributed.world_size()
        class_weight = self.class_loss.weight_of(matched=counts[1], unmatched=counts[2])
        return Normalizers(counts[0].clamp(min=1), class_weight.clamp(min=1e-6))

    def __call__(
        self, outputs: dict[str, Any], targets: Sequence[Target], normalizers: Normalizers | None = None
    ) -> dict[str, Tensor]:
        """Score one batch.

        Args:
            outputs: what a detector returns.
            targets: for each image "labels" (n,) int64 and "boxes" (n, 4) cxcywh in [0, 1].
            normalizers: from `normalizers`; None: of this batch (a collective call where there are processes).

        Returns:
            The scalars named in `weight_dict`, unweighted, and two without gradient: "class_error", percent of
            matched objects whose class is wrong, and "cardinality_error", mean miscount of objects an image.
        """
        layers = [*outputs["aux_outputs"], outputs]
        logits = torch.stack([layer["pred_logits"] for layer in layers]).float()
        boxes = torch.stack([layer["pred_boxes"] for layer in layers]).float()
        if normalizers is None:
            normalizers = self.normalizers([targets], logits.shape[2])
        matches = self.matcher(logits, boxes, targets)
        labels = torch.cat([target["labels"] for target in targets])
        classes = torch.full(logits.shape[:3], self.num_classes, dtype=torch.int64, device=logits.device)
        classes[matches.layer, matches.image, matches.query] = labels[matches.target]
        distance, overlap = _box_losses(boxes, matches, targets)
        losses = {
            "loss_ce": self.class_loss(logits, classes, normalizers),
            "loss_bbox": distance / normalizers.boxes,
            "loss_giou": overlap / normalizers.boxes,
        }
        per_layer = {
            key if layer == len(layers) - 1 else f"{key}_{layer}": loss
            for key, values in losses.items()
            for layer, loss in enumerate(values)
        }
        return {**per_layer, **self._monitors(logits[-1], classes[-1], targets)}

    @torch.no_grad()
    def _monitors(self, logits: Tensor, classes: Tensor, targets: Sequence[Target]) -> dict[str, Tensor]:
        """Last layer: logits (B, Q, K), classes (B, Q)."""
        matched = classes != self.num_classes
        correct = (logits.argmax(-1) == classes) & matched
        class_error = 100 - 100 * correct.sum() / matched.sum().clamp(min=1)
        count = torch.tensor([len(target["labels"]) for target in targets], device=logits.device)
        cardinality_error = (self.class_loss.num_detections(logits) - count).abs().mean()
        return {"class_error": class_error, "cardinality_error": cardinality_error}


def _box_losses(boxes: Tensor, matches: Matches, targets: Sequence[Target]) -> tuple[Tensor, Tensor]:
    """Sums over matched pairs of the L1 distance and of 1 - generalised IoU, each (L,); boxes (L, B, Q, 4)."""
    found = boxes[matches.layer, matches.image, matches.query]
    wanted = torch.cat([target["boxes"] for target in targets]).float()[matches.target]
    distance = F.l1_loss(found, wanted, reduction="none").sum(1)
    overlap = generalized_box_iou_loss(
        box_convert(found, "cxcywh", "xyxy"), box_convert(wanted, "cxcywh", "xyxy"), eps=1e-12
    )
    zeros = boxes.new_zeros(len(boxes))
    return zeros.index_add(0, matches.layer, distance), zeros.index_add(0, matches.layer, overlap)
