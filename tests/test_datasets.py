"""COCO samples and batches: what is read, what is left out, what the random augmentation depends on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from datasets import Batch, CocoDetection, build_coco, build_loader, collate, eval_transform, train_transform
from datasets.loading import EvalBatches

PLAIN = eval_transform(20, 100)


def write_split(root: Path, boxes: list[list[dict[str, Any]]], size: tuple[int, int] = (30, 20)) -> Path:
    """A COCO folder whose val split has an image of `size` (width, height) for each list of annotations."""
    (root / "val2017").mkdir(parents=True)
    (root / "annotations").mkdir()
    rng = np.random.default_rng(0)
    images, annotations = [], []
    for number, entries in enumerate(boxes):
        name = f"{number}.png"
        pixels = rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / "val2017" / name)
        images.append({"id": 100 - number, "file_name": name, "width": size[0], "height": size[1]})
        annotations += [{"category_id": 1, "image_id": 100 - number, **entry} for entry in entries]
    sections = {"images": images, "annotations": annotations}
    sections["categories"] = [{"id": 1, "name": "cat"}, {"id": 7, "name": "dog"}]
    (root / "annotations" / "instances_val2017.json").write_text(json.dumps(sections))
    return root


def test_sample_has_the_promised_entries(tmp_path: Path) -> None:
    box = {"bbox": [3, 4, 6, 8], "area": 40, "category_id": 7}
    dataset = build_coco(write_split(tmp_path / "d", [[], [box]]), "val", eval_transform(40, 100))
    assert (len(dataset), dataset.image_ids, dataset.num_classes) == (2, [99, 100], 8)
    assert dataset.class_names == {1: "cat", 7: "dog"}
    image, target = dataset[0, 0]
    assert image.shape == (3, 40, 60)
    assert image.dtype == torch.uint8
    expected = {
        "boxes": torch.tensor([[6 / 30, 8 / 20, 6 / 30, 8 / 20]]),
        "labels": torch.tensor([7]),
        "area": torch.tensor([40.0]),
        "iscrowd": torch.tensor([0]),
        "image_id": torch.tensor(99),
        "orig_size": torch.tensor([20, 30]),
        "size": torch.tensor([40, 60]),
    }
    assert target.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(target[name], value)
        assert type(target[name]) is torch.Tensor


def test_image_without_objects_is_kept_with_no_boxes(tmp_path: Path) -> None:
    dataset = build_coco(write_split(tmp_path / "d", [[]]), "val", train_transform([20], 100, [25], (10, 20)))
    for epoch in range(8):
        _, target = dataset[epoch, 0]
        assert target["boxes"].shape == (0, 4)
        assert target["boxes"].dtype == torch.float32
        assert target["labels"].shape == (0,)
        assert target["labels"].dtype == torch.int64


def test_crowds_and_boxes_without_area_in_the_image_are_left_out_and_others_clipped(tmp_path: Path) -> None:
    entries = [
        {"bbox": [1, 1, 5, 5], "iscrowd": 1},
        {"bbox": [2, 2, 0, 5]},
        {"bbox": [2, 2, 5, -1]},
        {"bbox": [40, 2, 5, 5]},
        {"bbox": [2, -9, 5, 9]},
        {"bbox": [-5, 15, 10, 10], "category_id": 7},
        {"bbox": [25, 5, 10, 5]},
    ]
    _, target = build_coco(write_split(tmp_path / "d", [entries]), "val", PLAIN)[0, 0]
    corners = torch.tensor([[0.0, 15, 5, 20], [25, 5, 30, 10]])
    expected = torch.cat([(corners[:, :2] + corners[:, 2:]) / 2, corners[:, 2:] - corners[:, :2]], 1)
    torch.testing.assert_close(target["boxes"], expected / torch.tensor([30, 20, 30, 20]))
    assert target["labels"].tolist() == [7, 1]


def test_missing_area_becomes_that_of_the_box_and_ids_are_numbered_from_one(tmp_path: Path) -> None:
    root = write_split(tmp_path / "d", [[{"bbox": [1, 2, 3, 4], "id": 0}, {"bbox": [1, 2, 5, 5], "id": 0}]])
    coco = build_coco(root, "val", PLAIN).coco
    assert [(key, entry["area"], entry["iscrowd"]) for key, entry in coco.anns.items()] == [(1, 12, 0), (2, 25, 0)]


def test_reading_annotations_prints_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    build_coco(write_split(tmp_path / "d", [[]]), "val", PLAIN)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("mode", ["L", "CMYK", "P", "RGBA", "LA", "1"])
def test_pictures_of_any_colour_mode_become_rgb(tmp_path: Path, mode: str) -> None:
    root = write_split(tmp_path / "d", [[]])
    picture = Image.new("RGB", (30, 20), (255, 255, 255)).convert(mode)
    picture.save(root / "val2017" / "0.png", format="JPEG" if mode == "CMYK" else "PNG")
    image, _ = build_coco(root, "val", PLAIN)[0, 0]
    torch.testing.assert_close(image, torch.full((3, 20, 30), 255, dtype=torch.uint8))


def test_exif_orientation_does_not_rotate(tmp_path: Path) -> None:
    root = write_split(tmp_path / "d", [[]])
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees for display
    Image.new("RGB", (30, 20)).save(root / "val2017" / "0.png", format="JPEG", exif=exif)
    assert build_coco(root, "val", PLAIN)[0, 0][0].shape == (3, 20, 30)


class TestAugmentation:
    @pytest.fixture
    def dataset(self, tmp_path: Path) -> CocoDetection:
        root = write_split(tmp_path / "d", [[{"bbox": [3, 4, 16, 8]}]] * 6, size=(60, 40))
        return build_coco(root, "val", train_transform([20, 24, 28], 60, [30, 36], (16, 30)), seed=5)

    def test_is_the_same_for_the_same_key_whatever_came_before(self, dataset: CocoDetection) -> None:
        image, target = dataset[3, 2]
        torch.rand(7)
        dataset[1, 1]
        again, target_again = dataset[3, 2]
        torch.testing.assert_close(again, image)
        torch.testing.assert_close(target_again["boxes"], target["boxes"])

    def test_changes_with_epoch_and_seed(self, dataset: CocoDetection) -> None:
        views = {dataset[epoch, 0][0].numpy().tobytes() for epoch in range(10)}
        assert len(views) > 5
        dataset._seed = 6
        assert {dataset[epoch, 0][0].numpy().tobytes() for epoch in range(10)} != views

    def test_is_unrelated_between_images_of_an_epoch(self, dataset: CocoDetection) -> None:
        sizes = [[tuple(dataset[epoch, index][1]["size"].tolist()) for epoch in range(8)] for index in (0, 1)]
        assert sizes[0] != sizes[1]

    def test_leaves_the_callers_random_numbers_alone(self, dataset: CocoDetection) -> None:
        state = torch.get_rng_state()
        dataset[0, 0]
        torch.testing.assert_close(torch.get_rng_state(), state)

    def test_is_the_same_with_any_number_of_workers(self, dataset: CocoDetection) -> None:
        batches = {
            workers: list(build_loader(dataset, EvalBatches(6, 2, 0, 1), workers, pin_memory=False))
            for workers in (0, 2)
        }
        assert len(batches[0]) == len(batches[2]) == 3
        for ours, theirs in zip(batches[0], batches[2], strict=True):
            torch.testing.assert_close(ours.images, theirs.images)
            torch.testing.assert_close(ours.pad_mask, theirs.pad_mask)
            torch.testing.assert_close(ours.targets, theirs.targets)

    def test_boxes_stay_inside_the_image(self, dataset: CocoDetection) -> None:
        for epoch in range(40):
            boxes = dataset[epoch, 0][1]["boxes"]
            low, high = boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, :2] + boxes[:, 2:] / 2
            assert (low >= -1e-6).all()
            assert (high <= 1 + 1e-6).all()
            assert (boxes[:, 2:] > 0).all()


def test_box_follows_its_pixels_through_every_augmentation(tmp_path: Path) -> None:
    root = write_split(tmp_path / "d", [[{"bbox": [10, 8, 24, 20]}]], size=(60, 40))
    pixels = np.zeros((40, 60, 3), dtype=np.uint8)
    pixels[8:28, 10:34] = 255
    Image.fromarray(pixels).save(root / "val2017" / "0.png")
    dataset = build_coco(root, "val", train_transform([80, 120], 400, [40, 60], (24, 50)))
    for epoch in range(30):
        image, target = dataset[epoch, 0]
        _, rows, columns = (image > 127).nonzero(as_tuple=True)
        if len(rows) == 0:
            assert len(target["boxes"]) == 0
            continue
        x, y, w, h = (target["boxes"][0] * target["size"].flip(0).repeat(2)).tolist()
        seen = [columns.min().item(), rows.min().item(), columns.max().item() + 1, rows.max().item() + 1]
        assert [x - w / 2, y - h / 2, x + w / 2, y + h / 2] == pytest.approx(seen, abs=1.5)


def sample(height: int, width: int, boxes: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    image = torch.randint(1, 256, (3, height, width), dtype=torch.uint8)
    return image, {"boxes": torch.rand(boxes, 4), "labels": torch.arange(boxes)}


def test_collate_pads_at_the_bottom_and_on_the_right() -> None:
    samples = [sample(4, 7, 2), sample(6, 5, 0)]
    images, pad_mask, targets = collate(samples)
    assert images.shape == (2, 3, 6, 7)
    for row, (image, target) in enumerate(samples):
        for y in range(6):
            for x in range(7):
                inside = y < image.shape[1] and x < image.shape[2]
                assert bool(pad_mask[row, y, x]) is not inside
                expected = image[:, y, x] if inside else torch.zeros(3, dtype=torch.uint8)
                torch.testing.assert_close(images[row, :, y, x], expected)
        assert targets[row] is target


def test_batch_moves_to_a_device_with_its_targets() -> None:
    batch = collate([sample(4, 7, 2)]).to("meta")
    assert isinstance(batch, Batch)
    assert (batch.images.device.type, batch.pad_mask.device.type) == ("meta", "cpu")  # a detector plans with the mask
    assert {value.device.type for value in batch.targets[0].values()} == {"meta"}


@pytest.mark.gpu
def test_pinned_batch_reaches_the_gpu_unchanged() -> None:
    batch = collate([sample(4, 7, 2), sample(6, 5, 0)]).pin_memory()
    assert batch.images.is_pinned()
    assert batch.targets[0]["boxes"].is_pinned()
    torch.testing.assert_close(batch.to("cuda").images.cpu(), batch.images)
