"""COCO annotation files: read, check, and refuse with one line that says what is wrong."""

from __future__ import annotations

import contextlib
import io
import os
import reprlib
from collections.abc import Iterable, Iterator
from pathlib import Path, PureWindowsPath
from typing import Any, NamedTuple, TypeGuard

from pycocotools.coco import COCO

from datasets.images import LARGEST_AREA, LARGEST_SIDE
from datasets.json_files import read_json
from util.errors import InputError
from util.files import LONGEST_NAME, unprintable

LARGEST_CATEGORY_ID = 10_000
LARGEST_INTEGER = 2**63 - 1
LARGEST_COORDINATE = 1e9
SECTIONS = ("images", "annotations", "categories")
UNUSED = frozenset({"segmentation"})  # most of the memory, and nothing here uses it

_shown = reprlib.Repr()
_shown.maxstring = _shown.maxother = _shown.maxlong = 100


class Problem(NamedTuple):
    """Something that is wrong with a data set.

    kind: what all problems of the sort have in common.
    text: what, where, what to do.
    """

    kind: str
    text: str


def read_annotations(path: Path) -> COCO:
    """A pycocotools index over a checked annotation file; see `index`.

    Raises:
        InputError: the file is missing, not JSON, not COCO, or contradicts itself.
    """
    return index(read_json(path, UNUSED), path)


def index(dataset: Any, source: Path) -> COCO:
    """A pycocotools index over the content of an annotation file, checked.

    Annotations are numbered anew from 1, because pycocotools takes an id of 0 for "unmatched" and lets duplicates
    overwrite each other; a missing `iscrowd` becomes 0 and a missing `area` the box's.

    Raises:
        InputError: it is not COCO, or contradicts itself.
    """
    for problem in problems(dataset):
        raise InputError(f"{source}: {problem.text}")
    _complete(dataset["annotations"])
    return quiet_index(dataset)


def quiet_index(dataset: dict[str, Any]) -> COCO:
    """A pycocotools index over `dataset`, without its prints."""
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = dataset
        coco.createIndex()
    return coco


def problems(dataset: Any) -> Iterator[Problem]:
    """Everything for which `index` refuses the content of an annotation file, whatever that content is."""
    unusable = list(_section_problems(dataset))
    yield from unusable
    if not unusable:
        yield from _category_problems(dataset["categories"])
        yield from _image_problems(dataset["images"])
        yield from _annotation_problems(dataset)


def _section_problems(dataset: Any) -> Iterator[Problem]:
    kind = "not a COCO file"
    if not isinstance(dataset, dict):
        found = type(dataset).__name__
        yield Problem(kind, f"not a COCO file: expected an object with {', '.join(SECTIONS)}, found a {found}")
        return
    for name in SECTIONS:
        entries = dataset.get(name)
        if name not in dataset:
            yield Problem(kind, f'not a COCO file: "{name}" is missing; an instances_*.json file is needed')
        elif not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            yield Problem(kind, f'not a COCO file: "{name}" must be a list of objects')


def _category_problems(categories: list[dict[str, Any]]) -> Iterator[Problem]:
    if not categories:
        yield Problem("no categories", '"categories" is empty; at least one class is needed')
    seen: set[int] = set()
    for category in categories:
        identity, name = category.get("id"), category.get("name")
        if not is_integer(identity) or not 0 <= identity <= LARGEST_CATEGORY_ID:
            yield Problem(
                "category ids that are no class indices",
                f"category id {_show(identity)} is not an integer in 0..{LARGEST_CATEGORY_ID}; ids are used as class "
                "indices, renumber the categories from 1",
            )
            continue
        if identity in seen:
            text = f"category id {identity} occurs twice; give every category its own id"
            yield Problem("category ids that occur twice", text)
        if not isinstance(name, str):
            yield Problem("categories without a name", f'category {identity} has no "name"; add one')
        elif unprintable(name):
            yield Problem("unprintable names", f"category {identity}: the name {_show(name)} {_UNPRINTABLE}")
        seen.add(identity)


def _image_problems(images: list[dict[str, Any]]) -> Iterator[Problem]:
    if not images:
        yield Problem("no images", '"images" is empty; there is nothing to train or evaluate on')
    seen: set[int] = set()
    for image in images:
        identity = image.get("id")
        if not is_integer(identity):
            text = f"image id {_show(identity)} is not an integer; renumber the images"
            yield Problem("image ids that are no integers", text)
        elif identity in seen:
            text = f"image id {identity} occurs twice; give every image its own id"
            yield Problem("image ids that occur twice", text)
        else:
            seen.add(identity)
        yield from _entry_problems(image, f"image {_show(identity)}")


def _entry_problems(image: dict[str, Any], name: str) -> Iterator[Problem]:
    file_name = image.get("file_name")
    if not isinstance(file_name, str) or not file_name:
        yield Problem("images without a file name", f'{name} has no "file_name"; add it')
    elif unprintable(file_name):
        yield Problem("unprintable names", f"{name}: file_name {_show(file_name)} {_UNPRINTABLE}")
    elif leads_out(file_name):
        text = f"{name}: file_name {_show(file_name)} leads out of the image folder; make it relative"
        yield Problem("file names that lead out of the image folder", text)
    sides = [image.get(side) for side in ("width", "height")]
    for side, value in zip(("width", "height"), sides, strict=True):
        if not is_integer(value) or not 1 <= value <= LARGEST_SIDE:
            text = f'{name} ({_show(file_name)}) has no integer "{side}" of 1 to {LARGEST_SIDE}; correct it'
            yield Problem("images without a size", text)
            return
    if sides[0] * sides[1] > LARGEST_AREA:  # type: ignore[operator]
        text = f"{name} ({_show(file_name)}) has {sides[0]} x {sides[1]} pixels, more than fit; cut it into tiles"
        yield Problem("images that are too large", text)


def leads_out(file_name: str) -> bool:
    """Whether the name of a file leads out of its folder, on this system or on Windows."""
    windows = PureWindowsPath(file_name)
    absolute = os.path.isabs(file_name) or bool(windows.drive or windows.root)
    plain = os.path.normpath(file_name.replace("\\", "/")).replace(os.sep, "/")
    return absolute or plain.split("/")[0] == ".."


def _annotation_problems(dataset: dict[str, Any]) -> Iterator[Problem]:
    image_ids = _integer_ids(dataset["images"])
    category_ids = _integer_ids(dataset["categories"])
    for position, annotation in enumerate(dataset["annotations"]):
        image_id, category_id, bbox = (annotation.get(key) for key in ("image_id", "category_id", "bbox"))
        if not is_integer(image_id) or image_id not in image_ids:
            text = f'is for image {_show(image_id)}, which "images" lacks; add the image or remove it'
            yield Problem("annotations of unknown images", f"{annotation_name(annotation, position)} {text}")
        if not is_integer(category_id) or category_id not in category_ids:
            text = f'is of category {_show(category_id)}, which "categories" lacks; add the category or remove it'
            yield Problem("annotations of unknown categories", f"{annotation_name(annotation, position)} {text}")
        if not is_box(bbox):
            text = f"bbox {_show(bbox)} is not four finite numbers [x, y, width, height]; correct it"
            yield Problem("boxes that are not four numbers", f"{annotation_name(annotation, position)}: {text}")


def annotation_name(annotation: dict[str, Any], position: int) -> str:
    """An annotation in a message."""
    return f"annotation {_show(annotation['id']) if 'id' in annotation else f'at position {position}'}"


def is_integer(value: Any) -> TypeGuard[int]:
    """Whether a value of a JSON file is an integer that a tensor can hold."""
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) <= LARGEST_INTEGER


def is_number(value: Any) -> TypeGuard[float]:
    """Whether a value of a JSON file is a finite number of a size that coordinates can have."""
    return (
        isinstance(value, (int, float)) and not isinstance(value, bool)
        and -LARGEST_COORDINATE <= value <= LARGEST_COORDINATE
    )  # fmt: skip


def is_box(value: Any) -> TypeGuard[list[float]]:
    """Whether a value of a JSON file is a list of four numbers."""
    return isinstance(value, list) and len(value) == 4 and all(map(is_number, value))


def _complete(annotations: list[dict[str, Any]]) -> None:
    for number, annotation in enumerate(annotations, start=1):
        annotation["id"] = number
        annotation["iscrowd"] = int(bool(annotation.get("iscrowd")))
        if not is_number(annotation.get("area")):
            annotation["area"] = annotation["bbox"][2] * annotation["bbox"][3]


def _integer_ids(entries: Iterable[dict[str, Any]]) -> set[int]:
    return {entry["id"] for entry in entries if is_integer(entry.get("id"))}


_UNPRINTABLE = f"is longer than {LONGEST_NAME} characters or holds control characters; rename it"


def _show(value: Any) -> str:
    """A value of any type and size, in a message of one line."""
    return _shown.repr(value)
