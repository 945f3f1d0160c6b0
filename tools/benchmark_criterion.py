"""Matching and losses: our way, all decoder layers at once, beside DETR's, layer by layer.

Shapes: L decoder layers, B images, Q queries, K classes, M matched pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torchvision.ops import box_convert, generalized_box_iou, sigmoid_focal_loss

from configs.schema import Config
from datasets.coco import Target
from datasets.randomness import cpu_seed, mixed_seed
from models import build_criterion_from
from models.matcher import focal_class_cost, softmax_class_cost
from tools.benchmark_inputs import SEED, training_batch
from tools.benchmark_measure import Subject

AT_ONCE, BY_LAYER = "all layers at once", "layer by layer"
WAYS = (AT_ONCE, BY_LAYER)
TOLERANCE = 1e-4

Outputs = dict[str, Any]
Losses = dict[str, Tensor]
Pairs = list[tuple[Any, Any]]  # for each image: queries and objects


def criterion_subject(way: str, batch: int, config: Config, device: torch.device) -> Subject:
    """The losses of random predictions, and those with their backward pass.

    Raises:
        RuntimeError: the two ways disagree.
    """
    outputs, targets = random_predictions(config, batch, device), training_batch(config, batch).to(device).targets
    ours, theirs = build_criterion_from(config), LayerByLayer(config)
    difference = largest_difference(ours(outputs, targets), theirs(outputs, targets), ours.weight_dict)
    if not difference <= TOLERANCE:
        raise RuntimeError(f"the two ways of {config.model} give losses that differ by {difference:.1e}")
    compute: Callable[[Outputs, Sequence[Target]], Losses] = ours if way == AT_ONCE else theirs
    leaves = [layer[key] for layer in (outputs, *outputs["aux_outputs"]) for key in ("pred_logits", "pred_boxes")]

    def train() -> None:
        losses = compute(outputs, targets)
        total = torch.stack([losses[key] * weight for key, weight in ours.weight_dict.items()]).sum()
        torch.autograd.grad(total, leaves)

    return Subject(
        {"losses": lambda: compute(outputs, targets), "train": train},
        {"largest_difference": difference, "objects": sum(len(target["labels"]) for target in targets)},
    )


def random_predictions(config: Config, batch: int, device: torch.device) -> Outputs:
    """What a detector might return, with gradients wanted for all of it."""
    queries, classes = config.num_queries, (config.num_classes or 91) + (config.model == "detr")
    if config.model == "anchor_detr":
        queries = config.num_query_position * config.num_query_pattern
    with cpu_seed(mixed_seed("benchmark predictions", SEED)):
        logits = torch.randn(config.dec_layers, batch, queries, classes)
        boxes = torch.randn(config.dec_layers, batch, queries, 4).sigmoid()
    layers = [
        {"pred_logits": of_logits.to(device).requires_grad_(), "pred_boxes": of_boxes.to(device).requires_grad_()}
        for of_logits, of_boxes in zip(logits, boxes, strict=True)
    ]
    return {**layers[-1], "aux_outputs": layers[:-1]}


def largest_difference(ours: Losses, theirs: Losses, keys: Sequence[str] | dict[str, float]) -> float:
    """Of some losses, relative where they are above 1."""
    pairs = ((ours[key].item(), theirs[key].item()) for key in keys)
    return max(abs(one - other) / max(1.0, abs(other)) for one, other in pairs)


class LayerByLayer:
    """DETR's criterion (spec 5.3): for each layer a matching with its own transfer to the host, and its own losses.

    The cost is that of every query of the batch with every object of the batch, and the overlap that of every matched
    box with every other; most of both is thrown away.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self.softmax = config.model == "detr"
        self.no_object = config.num_classes or 91

    def __call__(self, outputs: Outputs, targets: Sequence[Target]) -> Losses:
        """The losses, with the names that `Criterion` gives them."""
        counts = torch.tensor([sum(len(target["labels"]) for target in targets)], dtype=torch.float32)
        boxes = counts.to(outputs["pred_logits"].device).clamp(min=1).item()
        losses = self._of_layer(outputs, targets, boxes)
        for index, layer in enumerate(outputs["aux_outputs"]):
            losses |= {f"{key}_{index}": loss for key, loss in self._of_layer(layer, targets, boxes).items()}
        return losses

    def _of_layer(self, layer: Outputs, targets: Sequence[Target], num_boxes: float) -> Losses:
        logits, boxes = layer["pred_logits"], layer["pred_boxes"]
        pairs = self._match(logits, boxes, targets)
        images = torch.cat([torch.full((len(query),), image) for image, (query, _) in enumerate(pairs)])
        queries = torch.cat([torch.as_tensor(query) for query, _ in pairs])
        labels = torch.cat([target["labels"][index] for target, (_, index) in zip(targets, pairs, strict=True)])
        wanted = torch.cat([target["boxes"][index] for target, (_, index) in zip(targets, pairs, strict=True)])
        found = boxes[images, queries]
        classes = torch.full(logits.shape[:2], self.no_object, dtype=torch.int64, device=logits.device)
        classes[images, queries] = labels
        overlap = generalized_box_iou(*(box_convert(some, "cxcywh", "xyxy") for some in (found, wanted)))
        count = torch.as_tensor([len(target["labels"]) for target in targets], device=logits.device)
        detected = (logits.argmax(-1) != logits.shape[-1] - 1).sum(1)
        return {
            "loss_ce": self._class_loss(logits, classes, num_boxes),
            "loss_bbox": F.l1_loss(found, wanted, reduction="none").sum() / num_boxes,
            "loss_giou": (1 - overlap.diag()).sum() / num_boxes,
            "cardinality_error": F.l1_loss(detected.float(), count.float()),
        }

    @torch.no_grad()
    def _match(self, logits: Tensor, boxes: Tensor, targets: Sequence[Target]) -> Pairs:
        batch, queries = logits.shape[:2]
        labels = torch.cat([target["labels"] for target in targets])
        wanted, found = torch.cat([target["boxes"] for target in targets]), boxes.flatten(0, 1)
        class_cost = (softmax_class_cost if self.softmax else focal_class_cost)(logits.flatten(0, 1), labels)
        overlap = generalized_box_iou(*(box_convert(some, "cxcywh", "xyxy") for some in (found, wanted)))
        config = self.config
        cost = config.set_cost_bbox * torch.cdist(found, wanted, p=1)
        cost = cost + config.set_cost_class * class_cost - config.set_cost_giou * overlap
        by_image = cost.view(batch, queries, -1).cpu()
        parts = torch.split(by_image, [len(target["labels"]) for target in targets], -1)
        return [linear_sum_assignment(part[image]) for image, part in enumerate(parts)]

    def _class_loss(self, logits: Tensor, classes: Tensor, num_boxes: float) -> Tensor:
        if self.softmax:
            weight = logits.new_ones(logits.shape[-1])
            weight[-1] = self.config.eos_coef
            return F.cross_entropy(logits.transpose(1, 2), classes, weight)
        wanted = F.one_hot(classes, logits.shape[-1] + 1)[..., :-1].to(logits.dtype)
        loss: Tensor = sigmoid_focal_loss(logits, wanted, self.config.focal_alpha, reduction="none")
        return loss.mean(1).sum() / num_boxes * logits.shape[1]
