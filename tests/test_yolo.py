"""YOLO-format folders, read as COCO data."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image, ImageOps
from torch.testing import assert_close

from datasets import build_coco, eval_transform
from datasets.yolo import is_yolo, labels_path, read_yolo
from util.errors import InputError

NAMES = ["cat", "dog", "bird"]


def write(root: Path, file: str, labels: str | None, size: tuple[int, int] = (200, 100), orientation: int = 1) -> Path:
    """An image under `root` and its labels."""
    path = root / file
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.new("RGB", size)
    exif = image.getexif()
    exif[0x0112] = orientation
    image.save(path, exif=exif)
    if labels is not None:
        labels_path(path).parent.mkdir(parents=True, exist_ok=True)
        labels_path(path).write_text(labels)
    return path


def write_yaml(root: Path, **content: Any) -> None:
    root.mkdir(exist_ok=True)
    (root / "data.yaml").write_text(
        yaml.safe_dump({"train": "images/train", "val": "images/val", "names": NAMES, **content})
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "pets"
    write_yaml(root)
    write(root, "images/train/b.jpg", "1 0.5 0.5 0.2 0.4\n\n2 0.25 0.75 0.5 0.5\n")
    write(root, "images/train/deep/a.png", "0 0.1 0.1 0.1 0.3 0.4 0.2 0.3 0.1\n", size=(50, 80))
    write(root, "images/train/empty.jpg", "")
    write(root, "images/train/unlabelled.JPG", None)
    write(root, "images/val/c.jpg", "0 0.5 0.5 1 1")
    return root


def test_a_split_has_cocos_form(folder: Path) -> None:
    assert is_yolo(folder)
    for root in (folder, folder / "data.yaml"):
        image_dir, source, dataset = read_yolo(root, "train")
        assert (image_dir, source) == (folder / "images" / "train", folder / "data.yaml")
        assert [(image["file_name"], image["width"], image["height"]) for image in dataset["images"]] == [
            ("b.jpg", 200, 100), ("deep/a.png", 50, 80), ("empty.jpg", 200, 100), ("unlabelled.JPG", 200, 100),
        ]  # fmt: skip
        assert dataset["categories"] == [{"id": label, "name": name} for label, name in enumerate(NAMES)]
        found = [(entry["image_id"], entry["category_id"], entry["bbox"]) for entry in dataset["annotations"]]
        expected = [(1, 1, [80, 30, 40, 40]), (1, 2, [0, 50, 100, 50]), (2, 0, [5, 8, 15, 16])]
        for one, other in zip(found, expected, strict=True):
            assert one[:2] == other[:2]
            assert one[2] == pytest.approx(other[2])
    assert len(read_yolo(folder, "val").dataset["images"]) == 1


def test_boxes_come_back_as_the_fractions_that_were_written(folder: Path) -> None:
    """Through the data set that trains."""
    for root in (folder, folder / "data.yaml"):
        data = build_coco(root, "train", eval_transform(50, 100))
        image, target = data[(0, 0)]
        assert image.shape == (3, 50, 100)
        assert target["labels"].tolist() == [1, 2]
        assert_close(target["boxes"], torch.tensor([[0.5, 0.5, 0.2, 0.4], [0.25, 0.75, 0.5, 0.5]]))
        assert_close(target["area"], torch.tensor([1600.0, 5000]))
        assert (data.class_names, data.num_classes) == (dict(enumerate(NAMES)), 3)
    assert len(build_coco(folder, "val", eval_transform(50, 100))) == 1


@pytest.mark.parametrize("orientation", range(1, 9))
def test_boxes_turn_with_a_picture_that_is_stored_turned(
    tmp_path: Path, orientation: int, caplog: pytest.LogCaptureFixture
) -> None:
    """The oracle: a white rectangle, found in the stored pixels and in the upright ones."""
    stored = Image.new("L", (80, 60))
    stored.paste(255, (8, 6, 24, 36))
    exif = stored.getexif()
    exif[0x0112] = orientation
    path = tmp_path / "images" / "a.png"
    path.parent.mkdir()
    stored.save(path, exif=exif)
    with Image.open(path) as image:
        upright = ImageOps.exif_transpose(image)
    left, top, right, bottom = upright.getbbox() or ()
    line = [(left + right) / 2 / upright.width, (top + bottom) / 2 / upright.height,
            (right - left) / upright.width, (bottom - top) / upright.height]  # fmt: skip
    write_yaml(tmp_path, train="images")
    labels_path(path).parent.mkdir()
    labels_path(path).write_text(f"0 {' '.join(map(str, line))}")
    with caplog.at_level(logging.WARNING):
        dataset = read_yolo(tmp_path, "train").dataset
    assert ("1 images are stored turned" in caplog.text) == (orientation > 1)
    assert (dataset["images"][0]["width"], dataset["images"][0]["height"]) == (80, 60)
    assert dataset["annotations"][0]["bbox"] == pytest.approx([8, 6, 16, 30])


@pytest.mark.parametrize(
    ("entries", "files"),
    [
        ({"train": "../images/train"}, ["b.jpg", "deep/a.png", "empty.jpg", "unlabelled.JPG"]),
        ({"train": "train", "path": "images"}, ["b.jpg", "deep/a.png", "empty.jpg", "unlabelled.JPG"]),
        ({"path": "/nowhere/on/this/machine"}, ["b.jpg", "deep/a.png", "empty.jpg", "unlabelled.JPG"]),
        ({"train": ["images/val", "images/train/deep"]}, ["train/deep/a.png", "val/c.jpg"]),
        ({"train": "list.txt"}, ["train/b.jpg", "val/c.jpg"]),
        ({"names": {0: "cat", 1: "dog", 2: "bird"}, "nc": 3}, ["b.jpg", "deep/a.png", "empty.jpg", "unlabelled.JPG"]),
    ],
)
def test_the_forms_that_exporters_write_are_understood(
    folder: Path, entries: dict[str, Any], files: list[str]
) -> None:
    (folder / "list.txt").write_text("./images/train/b.jpg\n\nimages/val/c.jpg\n")
    write_yaml(folder, **entries)
    dataset = read_yolo(folder, "train").dataset
    assert [image["file_name"] for image in dataset["images"]] == files
    assert [category["name"] for category in dataset["categories"]] == NAMES


def test_labels_lie_where_the_last_images_folder_is_called_labels() -> None:
    assert labels_path(Path("images/train/images/a.b.jpg")) == Path("images/train/labels/a.b.txt")
    assert labels_path(Path("pets/a.png")) == Path("pets/a.txt")


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("1 0.5 0.5 0.2", "4 values; expected `class x y width height`"),
        ("1 0.5 0.5 0.2 0.2 0.9", "6 values"),
        ("1 0.5 0,5 0.2 0.2", "holds something that is no number"),
        ("3 0.5 0.5 0.2 0.2", "class 3 is not among the 3 names of"),
        ("-1 0.5 0.5 0.2 0.2", "class -1 is not"),
        ("0.5 0.5 0.5 0.2 0.2", "class 0.5 is not"),
        ("1 120 0.5 0.2 0.2", "120 is not a fraction of the picture"),
        ("1 -0.1 0.5 0.2 0.2", "-0.1 is not a fraction"),
        ("1 nan 0.5 0.2 0.2", "is not a fraction"),
    ],
)
def test_a_malformed_line_is_named_by_file_and_number(folder: Path, line: str, text: str) -> None:
    file = folder / "labels" / "train" / "b.txt"
    file.write_text(f"1 0.5 0.5 0.2 0.4\n{line}\n")
    with pytest.raises(InputError) as caught:
        read_yolo(folder, "train")
    assert str(caught.value).startswith(f"{file}, line 2: ")
    assert text in str(caught.value)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ({"names": []}, "names must list the classes"),
        ({"names": {1: "cat", 2: "dog"}}, "numbered from 0 on"),
        ({"nc": 5}, "nc is 5, but names has 3 classes"),
        ({"train": None}, "has no train"),
        ({"train": "images/trian"}, "train is images/trian, which is not in"),
        ({"train": "labels"}, "there are no images in train: labels"),
        ({"train": "gone.txt"}, "gone.jpg: image not found"),
        ({"train": "bad"}, "letter.jpg: image cannot be read"),
        ({"train": "alone"}, "none of the 1 train images has labels; those of"),
    ],
)
def test_a_wrong_folder_is_refused_in_one_line(folder: Path, content: dict[str, Any], text: str) -> None:
    write_yaml(folder, **content)
    (folder / "gone.txt").write_text("gone.jpg")
    (folder / "bad").mkdir()
    (folder / "bad" / "letter.jpg").write_text("Dear reader")
    write(folder, "alone/a.jpg", None)
    with pytest.raises(InputError) as caught:
        read_yolo(folder, "train")
    assert text in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "reason"), [("names: [", "not valid YAML"), ("- a", "must hold train"), (None, "missing")]
)
def test_a_broken_yaml_is_named(tmp_path: Path, text: str | None, reason: str) -> None:
    assert not is_yolo(tmp_path)
    if text is not None:
        (tmp_path / "data.yaml").write_text(text)
    with pytest.raises(InputError, match=reason):
        read_yolo(tmp_path, "train")
