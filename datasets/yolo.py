"""YOLO-format folders as COCO data: `data.yaml`, images/ and labels/ with a text file an image.

`data.yaml` holds `names` (a list, or a mapping from 0 on) and for each split a folder of images, a list of folders, or
a text file of image paths; `path` is where they are relative to. The labels of `.../images/a/b.jpg` are
`.../labels/a/b.txt`; an image without that file has no objects. A line is `class x y width height`, centre and size as
fractions of the picture, or `class x y x y x y ...`, a polygon, of which the box is taken.

Classes keep their numbers, from 0 on. Fractions refer to the picture the right way up; boxes of an image that is stored
turned (EXIF) are turned with it, since COCO's boxes refer to pixels as they are stored.

Nothing outside the folder of `data.yaml` is read, whatever it says; folders of images in it may be links.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from datasets.images import UnreadableImageError, open_image, orientation
from util.errors import InputError
from util.files import demand_inside, regular_size
from util.yaml_files import read_yaml

logger = logging.getLogger(__name__)

YAML_NAME = "data.yaml"
SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".mpo"})
LARGEST_LIST = 2**28  # bytes
LARGEST_LABELS = 2**24  # bytes
TOLERANCE = 1e-3  # of the picture's side: what rounding may add to a fraction of 1
Point = tuple[float, float]
# EXIF orientation -> where a point of the upright picture lies in the stored one, both in fractions.
STORED_POINT: dict[int, Callable[[float, float], Point]] = {
    2: lambda x, y: (1 - x, y),
    3: lambda x, y: (1 - x, 1 - y),
    4: lambda x, y: (x, 1 - y),
    5: lambda x, y: (y, x),
    6: lambda x, y: (y, 1 - x),
    7: lambda x, y: (1 - y, 1 - x),
    8: lambda x, y: (1 - y, x),
}


class YoloSplit(NamedTuple):
    """A split in COCO's form.

    image_dir: the folder that `file_name` entries are relative to.
    source: the file to name in messages.
    dataset: "images", "annotations" and "categories" as in an `instances_*.json`.
    """

    image_dir: Path
    source: Path
    dataset: dict[str, Any]


def is_yolo(root: Path) -> bool:
    """Whether `root` is a YOLO-format folder, or its `data.yaml`."""
    root = Path(root)
    return root.suffix in (".yaml", ".yml") or (root / YAML_NAME).is_file()


def refuse(problem: str) -> None:
    """What `read_yolo` does about a problem unless told otherwise."""
    raise InputError(problem)


def yaml_path(root: Path) -> Path:
    """The `data.yaml` of a YOLO-format folder, which may be named itself."""
    return root if root.suffix in (".yaml", ".yml") else root / YAML_NAME


def read_yolo(root: Path, split: str, report: Callable[[str], None] = refuse) -> YoloSplit:
    """The "train" or "val" split of a YOLO-format folder; image sizes are read from the files' headers.

    Args:
        root: the folder with `data.yaml`, or that file.
        split: a key of it.
        report: is told each image and each line of labels that is wrong; where it returns, they are left out.

    Raises:
        InputError: what is wrong, with file and line.
    """
    source = yaml_path(Path(root))
    content = _read_yaml(source)
    names = _class_names(content, source)
    files = _image_files(content, split, source)
    image_dir = Path(os.path.commonpath([file.parent for file in files]))
    images, annotations, turned = [], [], 0
    for number, file in enumerate(files, start=1):
        try:
            header = _read_header(file, (source.parent, image_dir))
        except InputError as error:
            report(str(error))
            continue
        turned += header.orientation in STORED_POINT
        width, height = header.size
        images.append(
            {"id": number, "file_name": str(file.relative_to(image_dir)), "width": width, "height": height}
        )
        annotations += [
            {"image_id": number, "category_id": label, "bbox": bbox, "iscrowd": 0}
            for label, bbox in _read_labels(file, header, len(names), source, report)
        ]
    _demand_labels(files, split, source)
    if turned:
        logger.warning("%s: %d images are stored turned (EXIF); their labels are read as those of the upright picture",
                       source, turned)  # fmt: skip
    categories = [{"id": label, "name": name} for label, name in enumerate(names)]
    return YoloSplit(image_dir, source, {"images": images, "annotations": annotations, "categories": categories})


def labels_path(image: Path) -> Path:
    """Where the labels of an image are: the last folder called images becomes labels, the suffix .txt."""
    parts = list(image.parts)
    for place in reversed(range(len(parts) - 1)):
        if parts[place] == "images":
            parts[place] = "labels"
            break
    return Path(*parts).with_suffix(".txt")


def _read_yaml(source: Path) -> dict[str, Any]:
    try:
        content = read_yaml(source)
    except FileNotFoundError:
        raise InputError(f"{source} is missing; it holds train, val and names") from None
    except OSError as error:
        raise InputError(f"{source} cannot be read ({error.strerror})") from None
    if not isinstance(content, dict):
        raise InputError(f"{source} must hold train, val and names, such as `train: images/train`")
    return content


def _class_names(content: dict[str, Any], source: Path) -> list[str]:
    names = content.get("names")
    if isinstance(names, dict):
        if set(names) != set(range(len(names))):
            raise InputError(f"{source}: names must be numbered from 0 on without gaps, got {str(list(names))[:100]}")
        names = [names[label] for label in range(len(names))]
    if not isinstance(names, list) or not names:
        raise InputError(f"{source}: names must list the classes, such as `names: [cat, dog]`")
    if content.get("nc", len(names)) != len(names):
        found = str(content["nc"])[:20]
        raise InputError(f"{source}: nc is {found}, but names has {len(names)} classes; correct one of them")
    return [str(name) for name in names]


def _image_files(content: dict[str, Any], split: str, source: Path) -> list[Path]:
    entries = content.get(split)
    if entries is None:
        raise InputError(f"{source} has no {split}; it is the folder with the {split} images, such as images/{split}")
    files: list[Path] = []
    for entry in entries if isinstance(entries, list) else [entries]:
        place = _find(str(entry), content, split, source)
        files += _listed(place, source) if place.is_file() else _inside(place)
    if not files:
        raise InputError(f"{source}: there are no images in {split}: {str(entries)[:200]}")
    return sorted(dict.fromkeys(files))


def _find(entry: str, content: dict[str, Any], split: str, source: Path) -> Path:
    """A folder or list of images; `path` may be of another machine, and exported folders often say "../" too much."""
    base = source.parent.absolute()
    bases = [base / str(content["path"]), base] if content.get("path") else [base]
    places = [Path(os.path.normpath(folder / name)) for folder in bases for name in (entry, entry.removeprefix("../"))]
    found = [place for place in places if os.path.exists(place)]
    inside = [place for place in found if place.is_relative_to(base)]
    if inside:
        return inside[0]
    shown = entry[:200]
    if found:
        raise InputError(f"{source}: {split} is {shown}, outside {base}; put {source.name} into the images' folder")
    raise InputError(f"{source}: {split} is {shown}, which is not in {' nor '.join(map(str, bases))[:400]}; correct it")


def _inside(folder: Path) -> Iterator[Path]:
    return (file for file in folder.rglob("*") if file.suffix.lower() in SUFFIXES)


def _listed(file: Path, source: Path) -> Iterator[Path]:
    """The images that a text file lists, relative to itself."""
    base = source.parent.absolute()
    for line in _lines(file, "a list of images", LARGEST_LIST):
        entry = line.strip()
        place = Path(os.path.normpath(file.parent / entry))
        if not place.is_relative_to(base):
            raise InputError(f"{file}: {entry[:200]} is outside {base}; put {source.name} into the images' folder")
        if entry:
            yield place


def _lines(file: Path, what: str, largest: int) -> list[str]:
    try:
        regular_size(file, largest)
        return file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file} cannot be read as {what}: {' '.join(str(error).split())}") from None


class _Header(NamedTuple):
    """Width and height in pixels as stored, and the EXIF orientation."""

    size: tuple[int, int]
    orientation: int


def _read_header(file: Path, roots: Sequence[Path]) -> _Header:
    try:
        with open_image(file, roots) as image:
            return _Header(image.size, orientation(image))
    except UnreadableImageError as error:
        raise InputError(str(error)) from None
    raise AssertionError("open_image suppresses nothing")


def _read_labels(
    image: Path, header: _Header, num_classes: int, source: Path, report: Callable[[str], None]
) -> Iterator[tuple[int, list[float]]]:
    """The class and the box [x, y, width, height] in stored pixels of each object."""
    file = labels_path(image)
    if not file.exists():
        return
    try:
        demand_inside(file, (source.parent, image.parent, file.parent))
        lines = _lines(file, "labels", LARGEST_LABELS)
    except InputError as error:
        report(str(error))
        return
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            label, corners = _parse(line.split(), num_classes, source)
        except ValueError as error:
            report(f"{file}, line {number}: {str(error)[:300]}")
            continue
        yield label, _stored_box(corners, header)


def _parse(words: Sequence[str], num_classes: int, source: Path) -> tuple[int, tuple[Point, Point]]:
    """The class of a line, and two opposite corners of its box in fractions; ValueError says what is wrong."""
    polygon = len(words) >= 7 and len(words) % 2 == 1
    if len(words) != 5 and not polygon:
        raise ValueError(f"{len(words)} values; expected `class x y width height`, or a class and a polygon's points")
    try:
        label, values = float(words[0]), [float(word) for word in words[1:]]
    except ValueError:
        raise ValueError(f"{' '.join(words[:8])[:80]!r} holds something that is no number") from None
    if label not in range(num_classes):
        raise ValueError(f"class {words[0][:20]} is not among the {num_classes} names of {source}, which count from 0")
    outside = [value for value in values if not -TOLERANCE <= value <= 1 + TOLERANCE]  # NaN among them
    if outside:
        raise ValueError(f"{outside[0]:g} is not a fraction of the picture; divide pixels by its size")
    if polygon:
        return int(label), ((min(values[::2]), min(values[1::2])), (max(values[::2]), max(values[1::2])))
    x, y, width, height = values
    return int(label), ((x - width / 2, y - height / 2), (x + width / 2, y + height / 2))


def _stored_box(corners: tuple[Point, Point], header: _Header) -> list[float]:
    turn = STORED_POINT.get(header.orientation)
    (x0, y0), (x1, y1) = corners if turn is None else (turn(*corner) for corner in corners)
    width, height = header.size
    return [min(x0, x1) * width, min(y0, y1) * height, abs(x1 - x0) * width, abs(y1 - y0) * height]


def _demand_labels(files: Sequence[Path], split: str, source: Path) -> None:
    if not any(labels_path(file).is_file() for file in files):
        raise InputError(
            f"{source}: none of the {len(files)} {split} images has labels; those of {files[0]} would be "
            f"{labels_path(files[0])}"
        )
