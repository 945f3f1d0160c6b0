"""Properties that hold for any boxes, costs, images, batches and files, not only for the examples of other tests."""

from __future__ import annotations

import contextlib
import io
import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools.cocoeval import COCOeval
from torch import Tensor
from torch.testing import assert_close
from torchvision import tv_tensors

from datasets import CocoEvaluator, collate, eval_transform, train_transform
from datasets.annotations import quiet_index
from datasets.coco import CocoDetection
from models.matcher import HungarianMatcher, softmax_class_cost
from util import checkpoint
from util.errors import InputError

settings.register_profile(
    "ours", derandomize=True, deadline=None, max_examples=40, database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)  # fmt: skip
settings.load_profile("ours")

CLASSES = 4
sides = st.integers(1, 90)
seeds = st.integers(0, 2**31)
coordinates = st.floats(-50, 150, width=32)
annotated_boxes = st.lists(st.tuples(coordinates, coordinates, coordinates, coordinates).map(list), max_size=6)


def clipped(box: list[float], width: int, height: int) -> list[float] | None:
    """The corners of what of a box [x, y, w, h] is in the image, in float32; None if that has no area."""
    x, y, w, h = (np.float32(value) for value in box)
    corners = [min(max(x, 0), width), min(max(y, 0), height), min(max(x + w, 0), width), min(max(y + h, 0), height)]
    return [float(value) for value in corners] if corners[2] > corners[0] and corners[3] > corners[1] else None


@given(boxes=annotated_boxes, width=sides, height=sides)
def test_any_annotated_box_is_clipped_to_its_image_or_left_out(
    boxes: list[list[float]], width: int, height: int
) -> None:
    annotations = [{"id": key, "image_id": 1, "category_id": 1, "iscrowd": 0, "area": 1.0, "bbox": box}
                   for key, box in enumerate(boxes, start=1)]  # fmt: skip
    coco = quiet_index({
        "images": [{"id": 1, "file_name": "a.png", "width": width, "height": height}],
        "annotations": annotations, "categories": [{"id": 1, "name": "cat"}],
    })  # fmt: skip
    dataset = CocoDetection(Path(), coco, Path("a.json"), eval_transform(20, 100))
    found = dataset._objects.of_image(0, dataset._sizes[0])["boxes"].as_subclass(Tensor)
    expected = [kept for box in boxes if (kept := clipped(box, width, height)) is not None]
    assert_close(found, torch.tensor(expected, dtype=torch.float32).reshape(-1, 4))


@given(width=sides, height=sides, seed=seeds, count=st.integers(0, 5), short=st.integers(8, 40))
def test_boxes_stay_in_the_picture_and_keep_their_labels_whatever_is_drawn(
    width: int, height: int, seed: int, count: int, short: int
) -> None:
    torch.manual_seed(seed)
    low = torch.rand(count, 2) * 0.8
    corners = torch.cat([low, low + 0.2 * torch.rand(count, 2) + 0.01], 1) * torch.tensor([width, height] * 2)
    target = {
        "boxes": tv_tensors.BoundingBoxes(corners, format="XYXY", canvas_size=(height, width)),
        "labels": torch.arange(count), "area": torch.arange(count).float(), "iscrowd": torch.zeros(count),
    }  # fmt: skip
    picture = Image.new("RGB", (width, height))
    image, result = train_transform([short, short + 7], 60, [short + 3], (9, 30))(picture, target)
    new_height, new_width = image.shape[1:]
    assert image.shape[0] == 3
    assert min(new_height, new_width) > 0
    boxes = result["boxes"].as_subclass(Tensor)
    assert len(boxes) == len(result["labels"]) == len(result["area"]) == len(result["iscrowd"]) <= count
    assert (boxes >= 0).all()
    assert (boxes <= torch.tensor([new_width, new_height] * 2) + 1e-3).all()
    assert (boxes[:, 2:] > boxes[:, :2]).all()
    assert_close(result["area"], result["labels"].float())  # each object's entries went together


@given(shapes=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=5), seed=seeds)
def test_a_batch_holds_every_image_whole_and_zeros_elsewhere(shapes: list[tuple[int, int]], seed: int) -> None:
    torch.manual_seed(seed)
    samples = [(torch.randint(1, 256, (3, *shape), dtype=torch.uint8), {"image_id": torch.tensor(number)})
               for number, shape in enumerate(shapes)]  # fmt: skip
    images, pad_mask, targets = collate(samples)
    assert images.shape[2:] == (max(height for height, _ in shapes), max(width for _, width in shapes))
    assert [int(target["image_id"]) for target in targets] == list(range(len(shapes)))
    for row, (image, _) in enumerate(samples):
        real = ~pad_mask[row]
        assert int(real.sum()) == image[0].numel()
        assert_close(images[row][:, real].view_as(image), image)
        assert not images[row][:, ~real].any()


def total_cost(block: Tensor, queries: Tensor, targets: Tensor) -> float:
    return float(block.double()[queries, targets].sum())


@given(queries=st.integers(1, 5), counts=st.lists(st.integers(0, 4), min_size=1, max_size=3), seed=seeds,
       spoilt=st.sampled_from([None, math.nan, math.inf, -math.inf]))  # fmt: skip
def test_matching_is_the_cheapest_of_all_and_avoids_what_is_not_finite(
    queries: int, counts: list[int], seed: int, spoilt: float | None
) -> None:
    torch.manual_seed(seed)
    matcher = HungarianMatcher(softmax_class_cost)
    logits, boxes = torch.randn(2, len(counts), queries, CLASSES), torch.rand(2, len(counts), queries, 4) * 0.4 + 0.3
    targets = [{"labels": torch.randint(0, CLASSES, (n,)), "boxes": torch.rand(n, 4) * 0.4 + 0.3} for n in counts]
    if spoilt is not None:
        boxes[0, 0, 0] = spoilt
    matches = matcher(logits, boxes, targets)
    first = 0
    for image, (count, costs) in enumerate(zip(counts, matcher.costs(logits, boxes, targets), strict=True)):
        costs = costs.nan_to_num(1e6, 1e6, 1e6)
        for layer in range(2):
            here = (matches.layer == layer) & (matches.image == image)
            found, objects = matches.query[here], matches.target[here] - first
            assert len(set(found.tolist())) == len(set(objects.tolist())) == min(queries, count) == int(here.sum())
            assert total_cost(costs[layer], found, objects) == pytest.approx(cheapest(costs[layer]), abs=1e-4, rel=1e-6)
            if spoilt is not None and (layer, image) == (0, 0) and queries > count:
                assert 0 not in found.tolist()
        first += count


def cheapest(block: Tensor) -> float:
    """Of all assignments of the fewer to the more."""
    few = block if block.shape[0] <= block.shape[1] else block.T
    rows = torch.arange(few.shape[0])
    choices = itertools.permutations(range(few.shape[1]), few.shape[0])
    return min(total_cost(few, rows, torch.tensor(choice, dtype=torch.int64)) for choice in choices)


@settings(max_examples=12)
@given(seed=seeds, images=st.integers(1, 4), noise=st.floats(0, 40), share=st.floats(0, 1))
def test_figures_are_pycocotools_own_for_any_detections(seed: int, images: int, noise: float, share: float) -> None:
    rng = np.random.default_rng(seed)
    truth: list[dict[str, Any]] = []
    for image_id in range(1, images + 1):
        for _ in range(int(rng.integers(0, 5))):
            box = [*rng.uniform(0, 300, 2), *rng.uniform(5, 200, 2)]
            entry = {"id": len(truth) + 1, "image_id": image_id, "category_id": int(rng.integers(1, 4))}
            truth.append({**entry, "bbox": box, "area": box[2] * box[3], "iscrowd": int(rng.random() < 0.1)})
    coco = quiet_index({
        "images": [{"id": key, "width": 640, "height": 640} for key in range(1, images + 1)], "annotations": truth,
        "categories": [{"id": key, "name": str(key)} for key in (1, 2, 3)],
    })  # fmt: skip
    rows = [(*np.array(entry["bbox"]) + rng.normal(0, noise, 4), entry["category_id"], entry["image_id"], rng.random())
            for entry in truth if rng.random() < share]  # fmt: skip
    evaluator = CocoEvaluator(coco)
    for image_id in coco.imgs:
        own = [row for row in rows if row[5] == image_id]
        xywh = torch.tensor(np.array([row[:4] for row in own]).reshape(-1, 4))
        evaluator.update([image_id], [{
            "scores": torch.tensor([row[6] for row in own]), "labels": torch.tensor([row[4] for row in own]),
            "boxes": torch.cat([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], 1),
        }])  # fmt: skip
    results = [{"image_id": row[5], "category_id": row[4], "bbox": list(row[:4]), "score": row[6]} for row in rows]
    summary = evaluator.summarize()
    if not results:
        assert max(summary.metrics.values()) <= 0
        return
    with contextlib.redirect_stdout(io.StringIO()):
        direct = COCOeval(coco, coco.loadRes(results), "bbox")
        direct.evaluate()
        direct.accumulate()
        direct.summarize()
    assert_close(torch.tensor(list(summary.metrics.values())), torch.tensor(direct.stats.tolist()))


@given(data=st.binary(max_size=300), start=st.sampled_from([b"", b"PK\x03\x04", b"\x80\x02}q\x00."]))
def test_random_bytes_are_no_checkpoint(tmp_path: Path, data: bytes, start: bytes) -> None:
    path = tmp_path / "a.pth"
    path.write_bytes(start + data)
    with pytest.raises(InputError):
        checkpoint.load(path)


@given(data=st.data(), zipped=st.booleans())
def test_a_checkpoint_with_any_changed_bytes_is_read_or_refused(
    tmp_path: Path, data: st.DataObject, zipped: bool
) -> None:
    path = tmp_path / "a.pth"
    torch.save({"model": {"weight": torch.arange(6.0)}, "epoch": 3}, path, _use_new_zipfile_serialization=zipped)
    whole = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(whole[: data.draw(st.integers(len(whole) // 2, len(whole)))])
    with contextlib.suppress(InputError):
        assert isinstance(checkpoint.load(path)["model"], dict)
