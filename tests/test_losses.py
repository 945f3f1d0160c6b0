"""Matcher, criterion and postprocessing, against loops over images and layers."""

from __future__ import annotations

import itertools
import logging
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close
from torchvision.ops import box_convert, generalized_box_iou

from models import build_criterion, build_postprocessor
from models.criterion import FocalClassLoss
from models.matcher import HungarianMatcher, focal_class_cost, softmax_class_cost

CLASSES = 5
COUNTS = (2, 0, 3)


def random_boxes(*shape: int) -> Tensor:
    return torch.cat((0.3 + 0.4 * torch.rand(*shape, 2), 0.1 + 0.3 * torch.rand(*shape, 2)), -1)


def make_targets(counts: tuple[int, ...] = COUNTS) -> list[dict[str, Tensor]]:
    return [{"labels": torch.randint(1, CLASSES, (n,)), "boxes": random_boxes(n)} for n in counts]


def make_outputs(layers: int = 3, images: int = 3, queries: int = 6, classes: int = CLASSES + 1) -> dict[str, Any]:
    per_layer: list[dict[str, Any]] = [
        {"pred_logits": torch.randn(images, queries, classes), "pred_boxes": random_boxes(images, queries)}
        for _ in range(layers)
    ]
    return {**per_layer[-1], "aux_outputs": per_layer[:-1]}


def cost_by_hand(class_cost: Any, logits: Tensor, boxes: Tensor, target: dict[str, Tensor]) -> Tensor:
    """(Q, n)."""
    rows = []
    for query in range(len(logits)):
        row = []
        for label, box in zip(target["labels"], target["boxes"], strict=True):
            corners = (box_convert(b[None], "cxcywh", "xyxy") for b in (boxes[query], box))
            row.append(
                5 * (boxes[query] - box).abs().sum()
                + class_cost(logits[None, query : query + 1], label[None]).squeeze()
                - 2 * generalized_box_iou(*corners).squeeze()
            )
        rows.append(torch.stack(row))
    return torch.stack(rows)


@pytest.mark.parametrize("class_cost", [softmax_class_cost, focal_class_cost])
def test_matching_has_the_least_cost_of_all_assignments(class_cost: Any) -> None:
    outputs, targets = make_outputs(), make_targets()
    logits = torch.stack([layer["pred_logits"] for layer in (*outputs["aux_outputs"], outputs)])
    boxes = torch.stack([layer["pred_boxes"] for layer in (*outputs["aux_outputs"], outputs)])
    matches = HungarianMatcher(class_cost)(logits, boxes, targets)
    firsts = (0, 2, 2)
    for layer, image in itertools.product(range(3), (0, 2)):
        here = (matches.layer == layer) & (matches.image == image)
        query, target = matches.query[here], matches.target[here] - firsts[image]
        cost = cost_by_hand(class_cost, logits[layer, image], boxes[layer, image], targets[image])
        columns = torch.arange(COUNTS[image])
        best = min(
            cost[list(rows), columns].sum().item()
            for rows in itertools.permutations(range(6), COUNTS[image])
        )
        assert sorted(target.tolist()) == columns.tolist()
        assert cost[query, target].sum().item() == pytest.approx(best, abs=1e-5)
    assert not (matches.image == 1).any()


def test_more_objects_than_queries_match_every_query_once() -> None:
    outputs = make_outputs(layers=1, images=1, queries=4)
    matches = HungarianMatcher(softmax_class_cost)(
        outputs["pred_logits"][None], outputs["pred_boxes"][None], make_targets((9,))
    )
    assert sorted(matches.query.tolist()) == [0, 1, 2, 3]
    assert len(set(matches.target.tolist())) == 4


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_matcher_survives_numbers_that_are_not_finite_and_says_so(bad: float, caplog: pytest.LogCaptureFixture) -> None:
    outputs = make_outputs(layers=1)
    outputs["pred_logits"][0, 0] = bad
    outputs["pred_boxes"][2, 1] = bad
    with caplog.at_level(logging.WARNING):
        matches = HungarianMatcher(softmax_class_cost)(
            outputs["pred_logits"][None], outputs["pred_boxes"][None], make_targets()
        )
    assert len(matches.query) == sum(COUNTS)
    assert "not finite" in caplog.text


def losses_by_hand(outputs: dict[str, Any], targets: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """DETR's losses, layer after layer and image after image (spec 5.3)."""
    layers, found = [*outputs["aux_outputs"], outputs], {}
    matcher = HungarianMatcher(softmax_class_cost)
    num_boxes = max(sum(len(target["labels"]) for target in targets), 1)
    for number, layer in enumerate(layers):
        suffix = "" if number == len(layers) - 1 else f"_{number}"
        classes = torch.full(layer["pred_logits"].shape[:2], CLASSES)
        distance = overlap = torch.zeros(())
        for image, target in enumerate(targets):
            logits, found_boxes = (layer[key][None, image : image + 1] for key in ("pred_logits", "pred_boxes"))
            one = matcher(logits, found_boxes, [target])
            classes[image, one.query] = target["labels"][one.target]
            boxes, wanted = layer["pred_boxes"][image, one.query], target["boxes"][one.target]
            distance = distance + (boxes - wanted).abs().sum()
            corners = (box_convert(b, "cxcywh", "xyxy") for b in (boxes, wanted))
            overlap = overlap + (1 - generalized_box_iou(*corners).diag()).sum()
        weight = torch.ones(CLASSES + 1)
        weight[-1] = 0.1
        found[f"loss_ce{suffix}"] = F.cross_entropy(layer["pred_logits"].transpose(1, 2), classes, weight)
        found[f"loss_bbox{suffix}"] = distance / num_boxes
        found[f"loss_giou{suffix}"] = overlap / num_boxes
    return found


@pytest.mark.parametrize("counts", [COUNTS, (0, 0, 0), (8, 1, 0)])
def test_losses_of_all_layers_at_once_equal_a_loop(counts: tuple[int, ...]) -> None:
    outputs, targets = make_outputs(), make_targets(counts)
    criterion = build_criterion("detr", num_classes=CLASSES, dec_layers=3)
    found = criterion(outputs, targets)
    expected = losses_by_hand(outputs, targets)
    assert set(criterion.weight_dict) == set(expected)
    for key, value in expected.items():
        assert_close(found[key], value, msg=key)


def test_a_batch_without_objects_has_a_gradient_that_is_finite() -> None:
    outputs = make_outputs()
    for layer in (*outputs["aux_outputs"], outputs):
        layer["pred_logits"].requires_grad_()
        layer["pred_boxes"].requires_grad_()
    criterion = build_criterion("detr", num_classes=CLASSES, dec_layers=3)
    losses = criterion(outputs, make_targets((0, 0, 0)))
    sum(losses[key] * weight for key, weight in criterion.weight_dict.items()).backward()
    assert outputs["pred_logits"].grad.abs().max() > 0
    assert outputs["pred_boxes"].grad is None or outputs["pred_boxes"].grad.isfinite().all()


def test_parts_of_a_batch_add_up_to_the_whole() -> None:
    """What accumulation and several processes rely on: the parts, with common normalisers, average to the whole."""
    outputs, targets = make_outputs(layers=2, images=4), make_targets((3, 1, 0, 2))
    criterion = build_criterion("detr", num_classes=CLASSES, dec_layers=2)
    whole = criterion(outputs, targets)
    normalizers = criterion.normalizers([targets[:2], targets[2:]], 6)

    def part(rows: slice) -> dict[str, Tensor]:
        keys, whole_layers = ("pred_logits", "pred_boxes"), (*outputs["aux_outputs"], outputs)
        layers = [{key: layer[key][rows] for key in keys} for layer in whole_layers]
        return criterion({**layers[-1], "aux_outputs": layers[:-1]}, targets[rows], normalizers)

    first, second = part(slice(0, 2)), part(slice(2, 4))
    for key in criterion.weight_dict:
        assert_close((first[key] + second[key]) / 2, whole[key], msg=key)


def test_class_error_counts_matched_objects_of_the_wrong_class() -> None:
    targets = [{"labels": torch.tensor([1, 2]), "boxes": torch.tensor([[0.2, 0.2, 0.1, 0.1], [0.8, 0.8, 0.1, 0.1]])}]
    logits = torch.zeros(1, 3, CLASSES + 1)
    logits[0, 0, 1], logits[0, 1, 4], logits[0, 2, CLASSES] = 9.0, 9.0, 9.0
    boxes = torch.cat((targets[0]["boxes"], torch.full((1, 4), 0.5)))[None]
    criterion = build_criterion("detr", num_classes=CLASSES, dec_layers=1)
    found = criterion({"pred_logits": logits, "pred_boxes": boxes, "aux_outputs": []}, targets)
    assert found["class_error"].item() == pytest.approx(50)
    assert found["cardinality_error"].item() == pytest.approx(0)


def test_focal_loss_is_the_published_formula() -> None:
    logits, classes = torch.randn(2, 1, 4, CLASSES), torch.tensor([[[0, CLASSES, 3, CLASSES]]] * 2)
    criterion = build_criterion("detr", num_classes=CLASSES, dec_layers=2)
    normalizers = criterion.normalizers([make_targets((3,))], 4)
    expected = torch.zeros(2)
    for layer, query, k in itertools.product(range(2), range(4), range(CLASSES)):
        p = logits[layer, 0, query, k].sigmoid()
        positive = classes[layer, 0, query] == k
        expected[layer] += -0.25 * (1 - p) ** 2 * p.log() if positive else -0.75 * p**2 * (1 - p).log()
    assert_close(FocalClassLoss()(logits, classes, normalizers), expected / 3)


@pytest.mark.parametrize("name", ["conditional_detr", "anchor_detr"])
def test_focal_detectors_weigh_and_match_as_published(name: str) -> None:
    """The criterion of Conditional and Anchor DETR is focal: one more unmatched logit costs what its focal loss is."""
    criterion = build_criterion(name, num_classes=CLASSES, dec_layers=1)
    assert criterion.weight_dict == {"loss_ce": 2.0, "loss_bbox": 5.0, "loss_giou": 2.0}
    assert (criterion.matcher.class_cost, criterion.matcher.cost_class) == (focal_class_cost, 2.0)
    outputs, targets = make_outputs(layers=1, classes=CLASSES), make_targets()
    before = criterion(outputs, targets)["loss_ce"]
    p = outputs["pred_logits"][1, 0, 2].sigmoid()  # image 1 has no objects
    outputs["pred_logits"][1, 0, 2] = -50.0
    expected = 0.75 * p**2 * -(1 - p).log() / sum(COUNTS)
    assert_close(before - criterion(outputs, targets)["loss_ce"], expected, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("name", ["conditional_detr", "anchor_detr"])
def test_focal_detections_are_the_hundred_best_pairs(name: str) -> None:
    outputs = make_outputs(images=2, queries=30, classes=CLASSES)
    sizes = torch.tensor([[100, 200], [50, 30]])
    for image, found in enumerate(build_postprocessor(name)(outputs, sizes)):
        p = outputs["pred_logits"][image].sigmoid()
        pairs = sorted(itertools.product(range(30), range(CLASSES)), key=lambda pair: -p[pair].item())[:100]
        assert found["labels"].tolist() == [label for _, label in pairs]
        assert_close(found["scores"], torch.stack([p[pair] for pair in pairs]))
        boxes = box_convert(outputs["pred_boxes"][image], "cxcywh", "xyxy") * sizes[image].flip(0).repeat(2)
        assert_close(found["boxes"], torch.stack([boxes[query] for query, _ in pairs]))


def test_softmax_detections_take_the_likeliest_class_in_pixels() -> None:
    outputs = make_outputs(images=2)
    sizes = torch.tensor([[100, 200], [50, 30]])
    for image, found in enumerate(build_postprocessor("detr")(outputs, sizes)):
        height, width = sizes[image].tolist()
        for query in range(6):
            p = outputs["pred_logits"][image, query].softmax(0)[:-1]
            x, y, w, h = outputs["pred_boxes"][image, query].tolist()
            assert found["labels"][query] == p.argmax()
            assert found["scores"][query].item() == pytest.approx(p.max().item())
            expected = [(x - w / 2) * width, (y - h / 2) * height, (x + w / 2) * width, (y + h / 2) * height]
            assert found["boxes"][query].tolist() == pytest.approx(expected, abs=1e-3)
