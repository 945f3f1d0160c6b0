"""COCO annotation files: read, check, and refuse with one line that says what is wrong."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
from pathlib import Path
from typing import Any, TypeGuard

from pycocotools.coco import COCO

from util.errors import InputError

LARGEST_CATEGORY_ID = 10_000
SECTIONS = ("images", "annotations", "categories")


def read_annotations(path: Path) -> COCO:
    """A pycocotools index over a checked annotation file.

    Annotations are numbered anew from 1, because pycocotools takes an id of 0 for "unmatched" and lets duplicates
    overwrite each other; a missing `iscrowd` becomes 0 and a missing `area` the box's; `segmentation` is dropped,
    since it is most of the memory and nothing here uses it.

    Raises:
        InputError: the file is missing, not JSON, not COCO, or contradicts itself.
    """
    dataset = _parse(path)
    try:
        _check_sections(dataset)
        _check_categories(dataset["categories"])
        _check_images(dataset["images"])
        _check_annotations(dataset)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    _complete(dataset["annotations"])
    return quiet_index(dataset)


def quiet_index(dataset: dict[str, Any]) -> COCO:
    """A pycocotools index over `dataset`, without its prints."""
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = dataset
        coco.createIndex()
    return coco


def _parse(path: Path) -> Any:
    try:
        with path.open(encoding="utf-8") as file:
            return json.load(file)
    except FileNotFoundError:
        raise InputError(f"{path}: annotation file not found; check the data set's path") from None
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise InputError(f"{path}: malformed JSON at {where} ({error.msg}); fetch or write the file again") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text (byte {error.start}); is this a JSON file?") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None


def _check_sections(dataset: Any) -> None:
    if not isinstance(dataset, dict):
        raise InputError(f"not a COCO file: expected an object with {', '.join(SECTIONS)}, found a {_kind(dataset)}")
    for name in SECTIONS:
        if name not in dataset:
            raise InputError(f'not a COCO file: "{name}" is missing; an instances_*.json file is needed')
        entries = dataset[name]
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise InputError(f'not a COCO file: "{name}" must be a list of objects')


def _check_categories(categories: list[dict[str, Any]]) -> None:
    if not categories:
        raise InputError('"categories" is empty; at least one class is needed')
    seen: set[int] = set()
    for category in categories:
        identity = category.get("id")
        if not _is_integer(identity) or not 0 <= identity <= LARGEST_CATEGORY_ID:
            raise InputError(
                f"category id {identity!r} is not an integer in 0..{LARGEST_CATEGORY_ID}; ids are used as class "
                "indices, renumber the categories from 1"
            )
        if identity in seen:
            raise InputError(f"category id {identity} occurs twice; give every category its own id")
        if not isinstance(category.get("name"), str):
            raise InputError(f'category {identity} has no "name"; add one')
        seen.add(identity)


def _check_images(images: list[dict[str, Any]]) -> None:
    if not images:
        raise InputError('"images" is empty; there is nothing to train or evaluate on')
    seen: set[int] = set()
    for image in images:
        identity = image.get("id")
        if not _is_integer(identity):
            raise InputError(f"image id {identity!r} is not an integer; renumber the images")
        if identity in seen:
            raise InputError(f"image id {identity} occurs twice; give every image its own id")
        seen.add(identity)
        _check_image(image)


def _check_image(image: dict[str, Any]) -> None:
    name = image.get("file_name")
    if not isinstance(name, str) or not name:
        raise InputError(f'image {image["id"]} has no "file_name"; add it')
    if os.path.isabs(name) or os.path.normpath(name).split(os.sep)[0] == "..":
        raise InputError(f"image {image['id']}: file_name {name!r} leads out of the image folder; make it relative")
    for side in ("width", "height"):
        if not _is_integer(image.get(side)) or image[side] < 1:
            raise InputError(f'image {image["id"]} ({name}) has no positive integer "{side}"; add it')


def _check_annotations(dataset: dict[str, Any]) -> None:
    image_ids = {image["id"] for image in dataset["images"]}
    category_ids = {category["id"] for category in dataset["categories"]}
    for position, annotation in enumerate(dataset["annotations"]):
        name = f"annotation {annotation.get('id', f'at position {position}')}"
        image_id, category_id, bbox = (annotation.get(key) for key in ("image_id", "category_id", "bbox"))
        if not _is_integer(image_id) or image_id not in image_ids:
            raise InputError(f'{name} is for image {image_id!r}, which "images" lacks; add the image or remove it')
        if not _is_integer(category_id) or category_id not in category_ids:
            raise InputError(
                f'{name} is of category {category_id!r}, which "categories" lacks; add the category or remove it'
            )
        if not isinstance(bbox, list) or len(bbox) != 4 or not all(map(_is_finite_number, bbox)):
            raise InputError(f"{name}: bbox {bbox!r} is not four finite numbers [x, y, width, height]; correct it")


def _complete(annotations: list[dict[str, Any]]) -> None:
    for number, annotation in enumerate(annotations, start=1):
        annotation["id"] = number
        annotation["iscrowd"] = int(bool(annotation.get("iscrowd")))
        if not _is_finite_number(annotation.get("area")):
            annotation["area"] = annotation["bbox"][2] * annotation["bbox"][3]
        annotation.pop("segmentation", None)


def _is_integer(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_finite_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _kind(value: Any) -> str:
    return type(value).__name__
