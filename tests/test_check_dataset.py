"""The check of a data set names each fault that is put into one, and nothing else."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from datasets import build_coco, eval_transform
from datasets.check import quick_check
from tools.check_dataset import main

Sections = dict[str, Any]


def write_split(root: Path, split: str, first: int) -> None:
    (root / f"{split}2017").mkdir(parents=True)
    images, annotations = [], []
    for number in range(first, first + 4):
        pixels = np.random.default_rng(number).integers(0, 256, (20, 30, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / f"{split}2017" / f"{number}.png")
        images.append({"id": number, "file_name": f"{number}.png", "width": 30, "height": 20})
        annotations += [
            {"id": 10 * number + key, "image_id": number, "category_id": key, "bbox": [1, 2, 5, 6 + key], "area": 20}
            for key in (1, 2)
        ]
    categories = [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]
    write_sections(root, split, {"images": images, "annotations": annotations, "categories": categories})


def annotation_file(root: Path, split: str = "train") -> Path:
    return root / "annotations" / f"instances_{split}2017.json"


def write_sections(root: Path, split: str, sections: Any) -> None:
    annotation_file(root, split).parent.mkdir(exist_ok=True)
    annotation_file(root, split).write_text(json.dumps(sections))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_split(tmp_path / "data", "train", 1)
    write_split(tmp_path / "data", "val", 11)
    return tmp_path / "data"


def report_of(root: Path, status: int, workers: int = 0) -> dict[str, Any]:
    file = root.parent / "report.json"
    assert main([str(root), "--json", str(file), "--workers", str(workers)]) == status
    return json.loads(file.read_text())  # type: ignore[no-any-return]


def kinds(report: dict[str, Any]) -> set[tuple[str, str, str, int]]:
    return {(found["severity"], found["split"], found["kind"], found["count"]) for found in report["findings"]}


def test_a_clean_data_set_has_nothing_to_report(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = report_of(root, status=0)
    assert report["findings"] == []
    assert (report["images"], report["objects"]) == ({"train": 4, "val": 4}, {"train": 8, "val": 8})
    assert "0 errors, 0 warnings" in capsys.readouterr().out


def first(section: str, **values: Any) -> Callable[[Sections], Any]:
    return lambda sections: sections[section][0].update(values)


def more(section: str, **values: Any) -> Callable[[Sections], Any]:
    return lambda sections: sections[section].append({**sections[section][0], **values})


ERROR, WARNING = "error", "warning"


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (more("images", file_name="2.png"), {(ERROR, "image ids that occur twice"),
                                             (WARNING, "files that several images name")}),
        (first("images", width=31), {(ERROR, "image sizes that disagree with the file")}),
        (first("images", width=0), {(ERROR, "images without a size")}),
        (first("images", file_name="../x.png"), {(ERROR, "file names that lead out of the image folder")}),
        (first("images", file_name="x.png"), {(ERROR, "images that are missing")}),
        (first("annotations", bbox=[1, 2, float("nan"), 3]), {(ERROR, "boxes that are not four numbers")}),
        (first("annotations", bbox=[1, 2, 0, 3]), {(WARNING, "boxes without area, which are left out in training")}),
        (first("annotations", bbox=[30, 2, 5, 3]),
         {(WARNING, "boxes outside their image, which are left out in training")}),
        (first("annotations", bbox=[20, 2, 12, 3]),
         {(WARNING, "boxes partly outside their image, which are clipped in training")}),
        (first("annotations", bbox=[20, 2, 10.9, 3]), set()),
        (first("annotations", area=900), {(WARNING, "areas larger than the box, or negative")}),
        (first("annotations", iscrowd=7), {(WARNING, "iscrowd neither 0 nor 1")}),
        (first("annotations", image_id=77), {(ERROR, "annotations of unknown images")}),
        (first("annotations", category_id=77), {(ERROR, "annotations of unknown categories")}),
        (more("annotations"), {(WARNING, "annotation ids that occur twice"), (WARNING, "objects that occur twice")}),
        (lambda s: s["annotations"].__delitem__(slice(0, 2)), {(WARNING, "images without objects")}),
    ],
)  # fmt: skip
def test_each_fault_is_named_and_only_it(
    root: Path, damage: Callable[[Sections], Any], expected: set[tuple[str, str]]
) -> None:
    sections = json.loads(annotation_file(root).read_text())
    damage(sections)
    write_sections(root, "train", sections)
    status = int(any(severity == ERROR for severity, _ in expected))
    assert kinds(report_of(root, status)) == {(severity, "train", kind, 1) for severity, kind in expected}


def test_categories_are_compared_with_their_use_and_between_splits(root: Path) -> None:
    sections = json.loads(annotation_file(root).read_text())
    sections["categories"] += [{"id": 5, "name": "cat"}]
    sections["categories"][1]["name"] = "cow"
    write_sections(root, "train", sections)
    assert kinds(report_of(root, status=1)) == {
        ("warning", "train", "categories without objects", 1),
        ("warning", "train", "names of several categories", 1),
        ("warning", "train", "gaps between category ids", 1),
        ("warning", "both", "categories that validation lacks", 1),
        ("error", "both", "categories that differ between the splits", 1),
    }


def test_all_is_reported_and_not_the_first_alone(root: Path) -> None:
    sections = json.loads(annotation_file(root).read_text())
    for annotation in sections["annotations"]:
        annotation["bbox"] = None
    sections["images"][0]["width"] = "wide"
    write_sections(root, "train", sections)
    annotation_file(root, "val").write_text("{")
    report = report_of(root, status=1)
    assert kinds(report) == {
        ("error", "train", "boxes that are not four numbers", 8),
        ("error", "train", "images without a size", 1),
        ("error", "val", "the split cannot be read", 1),
    }
    assert [len(found["examples"]) for found in report["findings"]] == [3, 1, 1]


@pytest.mark.parametrize("workers", [0, 2])
def test_files_are_decoded_and_compared(root: Path, workers: int) -> None:
    train, val = root / "train2017", root / "val2017"
    (train / "1.png").write_bytes((train / "1.png").read_bytes()[:300])
    shutil.copy(train / "2.png", train / "3.png")
    shutil.copy(train / "4.png", val / "11.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.effect_noise((30, 20), 50).convert("RGB").save(val / "12.png", exif=exif)
    Image.effect_noise((20, 30), 50).convert("RGB").save(val / "13.png", exif=exif)
    report = report_of(root, 1, workers)
    assert kinds(report) == {
        ("error", "train", "images that cannot be read", 1),
        ("warning", "train", "files of the same content", 1),
        ("error", "both", "validation images that are trained on", 1),
        ("warning", "val", "images that are stored turned (EXIF)", 2),
        ("error", "val", "image sizes that disagree with the file", 1),
    }
    (upright,) = (found["examples"][0] for found in report["findings"] if "disagree" in found["kind"])
    assert "turned upright" in upright


def test_the_same_name_in_both_splits_is_a_warning(root: Path) -> None:
    (root / "val2017" / "11.png").rename(root / "val2017" / "1.png")
    sections = json.loads(annotation_file(root, "val").read_text())
    sections["images"][0]["file_name"] = "1.png"
    write_sections(root, "val", sections)
    assert kinds(report_of(root, status=0)) == {("warning", "both", "file names that both splits have", 1)}


def test_a_yolo_folder_is_checked_line_by_line(root: Path) -> None:
    for split in ("train", "val"):
        (root / "images").mkdir(exist_ok=True)
        (root / f"{split}2017").rename(root / "images" / split)
        (root / "labels" / split).mkdir(parents=True)
        for image in (root / "images" / split).iterdir():
            (root / "labels" / split / f"{image.stem}.txt").write_text("0 0.5 0.5 0.5 0.5\n1 0.5 0.5 0.1 0.1\n")
    (root / "data.yaml").write_text(yaml.safe_dump(
        {"names": ["cat", "dog"], "train": "images/train", "val": "images/val"}
    ))  # fmt: skip
    assert report_of(root, status=0)["findings"] == []
    (root / "labels" / "train" / "1.txt").write_text("0 0.5 0.5 0.5 0.5\n0 2 2 2 2\n1 x 0 0 0\n1 0.5 0.5 0.1 0.1\n")
    (root / "images" / "train" / "2.png").write_bytes(b"no image")
    assert kinds(report_of(root / "data.yaml", 1)) == {("error", "train", "images or labels that cannot be read", 3)}


def test_what_is_no_data_set_is_status_2(tmp_path: Path, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "nowhere")]) == 2
    assert "nowhere is missing" in capsys.readouterr().err
    assert main([str(root), "--workers", "0", "--json", str(tmp_path / "no" / "report.json")]) == 2


def test_the_quick_check_says_what_is_odd_without_decoding(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = eval_transform(20, 100)
    monkeypatch.setattr(Image, "open", lambda *_, **__: pytest.fail("decoded"))
    assert quick_check(build_coco(root, "train", plain), build_coco(root, "val", plain)) == []
    sections = json.loads(annotation_file(root).read_text())
    sections["annotations"] = sections["annotations"][4:]
    sections["annotations"][0]["bbox"] = [1, 2, 0, 3]
    sections["categories"].append({"id": 3, "name": "cow"})
    write_sections(root, "train", sections)
    (root / "train2017" / "3.png").unlink()
    lines = quick_check(build_coco(root, "train", plain), build_coco(root, "val", plain))
    for part in ("images without objects: 2, such as: image 1", "boxes without area", "category 3 ('cow')",
                 "missing files among 4 that were looked for: 1", "categories that validation lacks: 1"):  # fmt: skip
        assert sum(part in line for line in lines) == 1, part
    assert all(line.isprintable() for line in lines)


def test_the_drawn_scenes_are_clean(cache: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        folder = next(path for path in cache.iterdir() if path.name.startswith("shapes"))
        shutil.copytree(folder, tmp_path / "shapes")
        report = report_of(tmp_path / "shapes", status=0)
    assert {found["kind"] for found in report["findings"]} <= {"file names that both splits have"}
