"""Whatever is wrong with the user's data is said in one line that names the file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from datasets import build_coco, build_loader, eval_transform
from datasets.loading import EvalBatches
from util.errors import InputError

PLAIN = eval_transform(20, 100)
Sections = dict[str, Any]


def valid_sections() -> Sections:
    return {
        "images": [{"id": 1, "file_name": "a.jpg", "width": 30, "height": 20}],
        "annotations": [{"id": 5, "image_id": 1, "category_id": 3, "bbox": [1, 2, 3, 4], "area": 12, "iscrowd": 0}],
        "categories": [{"id": 3, "name": "cat"}],
    }


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "val2017").mkdir()
    (tmp_path / "annotations").mkdir()
    Image.effect_noise((30, 20), 90).convert("RGB").save(tmp_path / "val2017" / "a.jpg")
    write_sections(tmp_path, valid_sections())
    return tmp_path


def write_sections(root: Path, sections: Any) -> Path:
    file = root / "annotations" / "instances_val2017.json"
    file.write_text(json.dumps(sections))
    return file


def message_of(action: Callable[[], object]) -> str:
    with pytest.raises(InputError) as caught:
        action()
    message = str(caught.value)
    assert "\n" not in message
    return message


def without(section: str, key: str) -> Callable[[Sections], None]:
    return lambda sections: sections[section][0].pop(key)


def changed(section: str, key: str, value: Any) -> Callable[[Sections], None]:
    return lambda sections: sections[section][0].update({key: value})


def test_the_valid_file_is_accepted(root: Path) -> None:
    assert len(build_coco(root, "val", PLAIN)[0, 0][1]["boxes"]) == 1


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda s: s.pop("images"), '"images" is missing'),
        (lambda s: s.pop("annotations"), '"annotations" is missing'),
        (lambda s: s.pop("categories"), '"categories" is missing'),
        (lambda s: s.update(images={"1": {}}), '"images" must be a list'),
        (lambda s: s.update(annotations=[3]), '"annotations" must be a list'),
        (lambda s: s.update(images=[], annotations=[]), '"images" is empty'),
        (lambda s: s.update(categories=[], annotations=[]), '"categories" is empty'),
        (lambda s: s["images"].append(s["images"][0]), "image id 1 occurs twice"),
        (lambda s: s["categories"].append(s["categories"][0]), "category id 3 occurs twice"),
        (changed("annotations", "image_id", 9), "annotation 5 is for image 9"),
        (without("annotations", "image_id"), "annotation 5 is for image None"),
        (changed("annotations", "image_id", [1]), r"annotation 5 is for image [1]"),
        (changed("annotations", "category_id", 9), "annotation 5 is of category 9"),
        (changed("categories", "id", -1), "category id -1"),
        (changed("categories", "id", 1.5), "category id 1.5"),
        (changed("categories", "id", "cat"), "category id 'cat'"),
        (changed("categories", "id", True), "category id True"),
        (changed("categories", "id", 10_001), "renumber"),
        (without("categories", "id"), "category id None"),
        (without("categories", "name"), 'category 3 has no "name"'),
        (changed("annotations", "bbox", [1, 2, 3]), "four finite numbers"),
        (changed("annotations", "bbox", [1, 2, 3, float("nan")]), "four finite numbers"),
        (changed("annotations", "bbox", [1, 2, float("inf"), 3]), "four finite numbers"),
        (changed("annotations", "bbox", [1, 2, "3", 4]), "four finite numbers"),
        (changed("annotations", "bbox", None), "four finite numbers"),
        (without("annotations", "bbox"), "four finite numbers"),
        (without("images", "file_name"), 'image 1 has no "file_name"'),
        (changed("images", "file_name", 3), 'image 1 has no "file_name"'),
        (without("images", "width"), '"width"'),
        (without("images", "height"), '"height"'),
        (changed("images", "height", 0), '"height"'),
        (changed("images", "id", "one"), "image id 'one'"),
        (changed("images", "file_name", "/etc/passwd"), "leads out of the image folder"),
        (changed("images", "file_name", "../a.jpg"), "leads out of the image folder"),
        (changed("images", "file_name", "b/../../a.jpg"), "leads out of the image folder"),
    ],
)
def test_wrong_annotation_file_is_named_with_the_reason(
    root: Path, damage: Callable[[Sections], None], expected: str
) -> None:
    sections = valid_sections()
    damage(sections)
    file = write_sections(root, sections)
    message = message_of(lambda: build_coco(root, "val", PLAIN))
    assert message.startswith(f"{file}: ")
    assert expected in message


def test_malformed_json_is_reported_with_line_and_column(root: Path) -> None:
    file = root / "annotations" / "instances_val2017.json"
    file.write_text('{"images": [],\n  "annotations" []}')
    message = message_of(lambda: build_coco(root, "val", PLAIN))
    assert str(file) in message
    assert "line 2, column 17" in message


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"[]", b"3"])
def test_file_that_is_not_coco_is_refused(root: Path, content: bytes) -> None:
    file = root / "annotations" / "instances_val2017.json"
    file.write_bytes(content)
    assert str(file) in message_of(lambda: build_coco(root, "val", PLAIN))


@pytest.mark.parametrize("missing", [".", "val2017", "annotations/instances_val2017.json"])
def test_wrong_folder_is_told_what_is_missing_and_what_is_expected(root: Path, missing: str) -> None:
    (root / missing).rename(root.parent / f"{root.name}_away")
    message = message_of(lambda: build_coco(root, "val", PLAIN))
    assert message.startswith(f"{root / missing} is missing")
    assert "val2017/" in message
    assert "annotations/instances_val2017.json" in message


def break_image(path: Path, how: str) -> None:
    whole = path.read_bytes()
    if how == "missing":
        path.unlink()
    elif how == "folder":
        path.unlink()
        path.mkdir()
    else:
        path.write_bytes({"truncated": whole[: len(whole) * 2 // 3], "empty": b"", "text": b"<html>not found"}[how])


@pytest.mark.parametrize("how", ["missing", "folder", "truncated", "empty", "text"])
@pytest.mark.parametrize("extension", ["jpg", "png"])
def test_broken_image_is_named_and_never_half_returned(root: Path, how: str, extension: str) -> None:
    path = root / "val2017" / f"a.{extension}"
    Image.effect_noise((30, 20), 90).convert("RGB").save(path)
    sections = valid_sections()
    changed("images", "file_name", path.name)(sections)
    write_sections(root, sections)
    break_image(path, how)
    dataset = build_coco(root, "val", PLAIN)
    assert message_of(lambda: dataset[0, 0]).startswith(f"{path}: ")


def test_image_of_another_size_than_annotated_is_refused_with_both_sizes(root: Path) -> None:
    Image.new("RGB", (20, 30)).save(root / "val2017" / "a.jpg")
    message = message_of(lambda: build_coco(root, "val", PLAIN)[0, 0])
    assert "20 x 30" in message
    assert "30 x 20" in message


def test_sixteen_bit_image_is_refused_and_not_cut_off_at_255(root: Path) -> None:
    Image.new("I;16", (30, 20), 40_000).save(root / "val2017" / "a.jpg", format="PNG")
    assert "8 bits" in message_of(lambda: build_coco(root, "val", PLAIN)[0, 0])


def test_random_state_survives_a_broken_image(root: Path) -> None:
    (root / "val2017" / "a.jpg").unlink()
    dataset = build_coco(root, "val", PLAIN)
    state = torch.get_rng_state()
    message_of(lambda: dataset[0, 0])
    torch.testing.assert_close(torch.get_rng_state(), state)


def test_broken_image_in_a_worker_is_still_one_line(root: Path) -> None:
    (root / "val2017" / "a.jpg").unlink()
    dataset = build_coco(root, "val", PLAIN)
    messages = [
        message_of(lambda workers=workers: list(build_loader(dataset, EvalBatches(1, 1, 0, 1), workers, False)))
        for workers in (0, 1)
    ]
    assert messages[0] == messages[1]
    assert messages[0].startswith(str(root))
