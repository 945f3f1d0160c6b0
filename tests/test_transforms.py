"""The augmentation recipe against hand-computed sizes and slow oracles."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import tv_tensors
from torchvision.transforms import v2

from datasets.transforms import (
    CropRandomly,
    DropEmptyBoxes,
    ResizeShortSide,
    eval_transform,
    normalize,
    resized_size,
    train_transform,
)


def random_picture(height: int, width: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def target_of(boxes: list[list[float]], height: int, width: int) -> dict[str, Any]:
    tensor = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    return {
        "boxes": tv_tensors.BoundingBoxes(tensor, format="XYXY", canvas_size=(height, width)),
        "labels": torch.arange(1, len(boxes) + 1),
        "area": torch.arange(len(boxes)).float(),
        "iscrowd": torch.zeros(len(boxes), dtype=torch.int64),
    }


@pytest.mark.parametrize(
    ("height", "width", "short_side", "max_long_side", "expected"),
    [
        (480, 640, 800, 1333, (800, 1066)),  # 800 * 640 / 480 = 1066.67, truncated
        (427, 640, 800, 1333, (800, 1199)),  # 1199.06
        (640, 427, 800, 1333, (1199, 800)),
        (333, 640, 800, 1333, (694, 1333)),  # long would be 1537.5; short = round(1333 * 333 / 640 = 693.6)
        (375, 500, 800, 1000, (750, 1000)),
        (200, 1000, 800, 1333, (267, 1335)),  # short = round(266.6); the rule lets the long side pass its limit a bit
        (500, 500, 500, 1333, (500, 500)),
        (300, 3000, 600, None, (600, 6000)),
        (1, 5000, 800, 1333, (1, 5000)),  # the rounded short side would be 0
    ],
)
def test_resized_size_follows_the_published_rule(
    height: int, width: int, short_side: int, max_long_side: int | None, expected: tuple[int, int]
) -> None:
    assert resized_size(height, width, short_side, max_long_side) == expected


def test_evaluation_resizes_picture_as_pil_does_and_boxes_with_it() -> None:
    picture = random_picture(60, 80)
    target = target_of([[8, 6, 40, 30]], 60, 80)
    image, target = eval_transform(120, 1000)(picture, target)
    expected = torch.from_numpy(np.array(picture.resize((160, 120), Image.Resampling.BILINEAR))).permute(2, 0, 1)
    assert type(image) is torch.Tensor
    torch.testing.assert_close(image, expected)
    torch.testing.assert_close(target["boxes"].as_subclass(torch.Tensor), torch.tensor([[16.0, 12, 80, 60]]))


def test_short_side_comes_from_the_list_and_every_one_occurs() -> None:
    torch.manual_seed(0)
    resize = ResizeShortSide([10, 20, 30], 1000)
    heights = {resize(random_picture(40, 50), target_of([], 40, 50))[0].size[1] for _ in range(60)}
    assert heights == {10, 20, 30}


def test_flipping_twice_restores_picture_and_boxes() -> None:
    picture, target = random_picture(30, 50), target_of([[5, 6, 20, 16], [0, 0, 50, 30]], 30, 50)
    flip = v2.RandomHorizontalFlip(1.0)
    once_picture, once = flip(picture, target)
    torch.testing.assert_close(once["boxes"][0].as_subclass(torch.Tensor), torch.tensor([30.0, 6, 45, 16]))
    twice_picture, twice = flip(once_picture, once)
    assert twice_picture.tobytes() == picture.tobytes() != once_picture.tobytes()
    torch.testing.assert_close(twice["boxes"], target["boxes"])


def test_crop_clips_boxes_and_drops_what_is_outside_with_all_its_entries() -> None:
    torch.manual_seed(3)
    crop = v2.Compose([CropRandomly(10, 25), DropEmptyBoxes()])
    boxes = [[0.0, 0, 6, 6], [40, 20, 50, 30], [10, 5, 45, 28], [24, 14, 26, 16]]
    counts = set()
    for _ in range(100):
        marked = Image.new("RGB", (50, 30))
        marked.putdata([(x, y, 0) for y in range(30) for x in range(50)])  # a pixel's colour tells where it was
        image, target = crop(marked, target_of(boxes, 30, 50))
        left, top, _ = image.getpixel((0, 0))
        width, height = image.size
        expected, labels = clipped_boxes(boxes, left, top, width, height)
        torch.testing.assert_close(target["boxes"].as_subclass(torch.Tensor), expected)
        assert target["labels"].tolist() == labels
        assert target["area"].tolist() == [label - 1 for label in labels]
        assert len(target["iscrowd"]) == len(labels)
        counts.add(len(labels))
    assert len(counts) > 1


def clipped_boxes(
    boxes: list[list[float]], left: int, top: int, width: int, height: int
) -> tuple[torch.Tensor, list[int]]:
    kept, labels = [], []
    for label, (x0, y0, x1, y1) in enumerate(boxes, start=1):
        clipped = [max(x0 - left, 0), max(y0 - top, 0), min(x1 - left, width), min(y1 - top, height)]
        if clipped[2] > clipped[0] and clipped[3] > clipped[1]:
            kept.append(clipped)
            labels.append(label)
    return torch.tensor(kept, dtype=torch.float32).reshape(-1, 4), labels


def test_crop_sides_cover_their_range_and_never_exceed_the_picture() -> None:
    torch.manual_seed(0)
    crop = CropRandomly(10, 14)
    sizes = [crop(random_picture(12, 40), target_of([], 12, 40))[0].size for _ in range(200)]
    assert {width for width, _ in sizes} == {10, 11, 12, 13, 14}
    assert {height for _, height in sizes} == {10, 11, 12}
    assert crop(random_picture(5, 40), target_of([], 5, 40))[0].size[1] == 5  # smaller than the least crop


def test_crop_reaches_every_place() -> None:
    torch.manual_seed(0)
    crop = CropRandomly(10, 10)
    whole = np.array(random_picture(13, 12))
    places = {whole[y : y + 10, x : x + 10].tobytes() for x in range(3) for y in range(4)}
    views = {crop(random_picture(13, 12), target_of([], 13, 12))[0].tobytes() for _ in range(200)}
    assert views == places


def test_sliver_of_less_than_a_pixel_is_kept() -> None:
    _, target = DropEmptyBoxes()(None, target_of([[1, 1, 1.25, 9], [2, 2, 2, 9], [3, 3, 9, 3]], 10, 10))
    assert target["labels"].tolist() == [1]


def test_training_takes_both_branches_and_flips_half_the_time() -> None:
    torch.manual_seed(0)
    transform = train_transform([32], 64, [40], (20, 24))
    target = target_of([[0, 0, 10, 40]], 40, 60)
    flipped, cropped, total = 0, 0, 200
    for _ in range(total):
        image, result = transform(random_picture(40, 60), target)
        full_view = image.shape[1:] == (32, 48)
        cropped += not full_view
        flipped += bool(full_view and result["boxes"][0, 0] > 0)
    assert 0.35 * total < cropped < 0.65 * total
    assert 0.35 * (total - cropped) < flipped < 0.65 * (total - cropped)


def test_without_crop_sizes_nothing_is_cropped() -> None:
    torch.manual_seed(0)
    transform = train_transform([32], 64, [], (20, 24))
    shapes = {transform(random_picture(40, 60), target_of([], 40, 60))[0].shape for _ in range(30)}
    assert shapes == {(3, 32, 48)}


def test_normalize_matches_the_formula_and_zeroes_padding() -> None:
    images = torch.randint(0, 256, (2, 3, 4, 5), dtype=torch.uint8)
    pad_mask = torch.zeros(2, 4, 5, dtype=torch.bool)
    pad_mask[1, 2:] = True
    before = images.clone()
    result = normalize(images, pad_mask)
    expected = torch.zeros(2, 3, 4, 5)
    for b, c, y, x in np.ndindex(2, 3, 4, 5):
        if not pad_mask[b, y, x]:
            mean, std = (0.485, 0.456, 0.406)[c], (0.229, 0.224, 0.225)[c]
            expected[b, c, y, x] = (int(images[b, c, y, x]) / 255 - mean) / std
    torch.testing.assert_close(result, expected)
    assert (result[1, :, 2:] == 0).all()
    torch.testing.assert_close(images, before)
