"""What is wrong or odd in the annotations of a data set: all of it, where `read_annotations` stops at the first."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Set
from itertools import islice
from typing import Any

from datasets.annotations import Problem, annotation_name, is_box, is_integer, is_number
from datasets.coco import CocoDetection

MOST_OBJECTS = 100_000  # that `quick_check` looks at
FILES_TRIED = 50
EXAMPLES = 3  # that a report shows of each kind
LACKING = "categories that validation lacks"
OUTSIDE = 1.0  # pixels by which rounding may move a box
Entry = dict[str, Any]


def quick_check(train: CocoDetection, val: CocoDetection) -> list[str]:
    """What is odd in the data of a run, found in a second or two without decoding an image; a line each, to log."""
    lines = []
    for dataset in (train, val):
        content = dataset.coco.dataset
        found = [
            *_category_oddities(content["categories"], dataset.coco.catToImgs.keys()),
            *_images_without_objects(content["images"], dataset.coco.imgToAnns.keys()),
            *_box_oddities(content["images"], islice(content["annotations"], MOST_OBJECTS)),
            *_missing_files(dataset),
        ]
        lines += [f"{dataset.source}: {line}" for line in summaries(found)]
    return lines + summaries(differences(train.coco.dataset["categories"], val.coco.dataset["categories"]))


def summaries(problems: Iterable[Problem]) -> list[str]:
    """A line for each kind of problem: how many, and the first."""
    by_kind: dict[str, list[str]] = {}
    for kind, text in problems:
        by_kind.setdefault(kind, []).append(text)
    return [f"{kind}: {len(texts)}, such as: {texts[0]}" for kind, texts in by_kind.items()]


def oddities(dataset: Entry) -> Iterator[Problem]:
    """What a run takes as it is, and a person should know; of content in which `problems` finds the sections."""
    categories, images, annotations = (dataset[name] for name in ("categories", "images", "annotations"))
    yield from _category_oddities(categories, _integers(annotations, "category_id"))
    yield from _images_without_objects(images, _integers(annotations, "image_id"))
    yield from _repeated_file_names(images)
    yield from _repeated_annotations(annotations)
    yield from _box_oddities(images, annotations)


def _integers(annotations: list[Entry], key: str) -> Set[int]:
    return {annotation[key] for annotation in annotations if is_integer(annotation.get(key))}


def _category_oddities(categories: list[Entry], used: Set[int]) -> Iterator[Problem]:
    """Categories without objects, names that several have, ids that are left out."""
    known = {entry["id"]: entry.get("name") for entry in categories if is_integer(entry.get("id"))}
    for identity, name in known.items():
        if identity not in used:
            yield Problem("categories without objects", f"category {identity} ({name!r})")
    names = Counter(name for name in known.values() if isinstance(name, str))
    for name, count in names.items():
        if count > 1:
            yield Problem("names of several categories", f"{name!r} is the name of {count} categories")
    ids = [identity for identity in known if 0 <= identity <= 10_000]
    missing = sorted(set(range(1, max(ids, default=0))) - set(ids))
    if missing:
        text = f"{len(missing)} of the ids up to {max(ids)} have no category, {missing[0]} first; each costs a class"
        yield Problem("gaps between category ids", text)


def _images_without_objects(images: list[Entry], with_objects: Set[int]) -> Iterator[Problem]:
    for image in images:
        if is_integer(image.get("id")) and image["id"] not in with_objects:
            yield Problem("images without objects", f"image {image['id']} ({image.get('file_name')!r})")


def _repeated_file_names(images: list[Entry]) -> Iterator[Problem]:
    names = Counter(image["file_name"] for image in images if isinstance(image.get("file_name"), str))
    for name, count in names.items():
        if count > 1:
            yield Problem("files that several images name", f"{name!r} is the file of {count} images")


def _repeated_annotations(annotations: list[Entry]) -> Iterator[Problem]:
    ids, objects = set(), set()
    for position, annotation in enumerate(annotations):
        name, identity = annotation_name(annotation, position), annotation.get("id")
        if is_integer(identity) and identity in ids:
            yield Problem("annotation ids that occur twice", f"{name} at position {position}")
        ids.add(identity if is_integer(identity) else None)
        box, image_id, category_id = (annotation.get(key) for key in ("bbox", "image_id", "category_id"))
        if is_box(box) and is_integer(image_id) and is_integer(category_id):
            key = (image_id, category_id, *box)
            if key in objects:
                yield Problem("objects that occur twice", f"{name}: image {image_id}, category {category_id}, {box}")
            objects.add(key)


def _box_oddities(images: list[Entry], annotations: Iterable[Entry]) -> Iterator[Problem]:
    """Boxes without area, outside their image in part or whole, areas and crowd marks that make no sense."""
    sizes = {image["id"]: (image.get("width"), image.get("height")) for image in images if is_integer(image.get("id"))}
    for position, annotation in enumerate(annotations):
        box, image_id = annotation.get("bbox"), annotation.get("image_id")
        if not is_box(box) or not is_integer(image_id):
            continue
        kind = _kind_of_box(box, sizes.get(image_id, (None, None)))
        name = annotation_name(annotation, position)
        if kind:
            yield Problem(kind, f"{name} of image {image_id}: {box} in an image of {sizes.get(image_id)}")
        area = annotation.get("area")
        if not kind and is_number(area) and not 0 <= area <= 1.01 * box[2] * box[3] + 1:
            yield Problem("areas larger than the box, or negative", f"{name}: area {area}, box {box}")
        if annotation.get("iscrowd", 0) not in (0, 1):
            yield Problem("iscrowd neither 0 nor 1", f"{name}: {str(annotation['iscrowd'])[:40]!r}")


def _kind_of_box(box: list[float], size: tuple[Any, Any]) -> str | None:
    x, y, width, height = box
    if width <= 0 or height <= 0:
        return "boxes without area, which are left out in training"
    if not all(is_number(side) and side > 0 for side in size):
        return None
    if x >= size[0] or y >= size[1] or x + width <= 0 or y + height <= 0:
        return "boxes outside their image, which are left out in training"
    if min(x, y) < -OUTSIDE or x + width > size[0] + OUTSIDE or y + height > size[1] + OUTSIDE:
        return "boxes partly outside their image, which are clipped in training"
    return None


def differences(train: list[Entry], val: list[Entry]) -> Iterator[Problem]:
    """Categories that the two splits do not have in common."""
    ours, theirs = ({entry["id"]: entry.get("name") for entry in part if is_integer(entry.get("id"))}
                    for part in (train, val))  # fmt: skip
    for identity in sorted(ours.keys() | theirs.keys()):
        one, other = (f"{part[identity]!r}" if identity in part else "missing" for part in (ours, theirs))
        if one != other:
            text = f"category {identity} is {one} in training and {other} in validation"
            yield Problem(LACKING if other == "missing" else "categories that differ between the splits", text)


def _missing_files(dataset: CocoDetection) -> Iterator[Problem]:
    step = max(1, len(dataset) // FILES_TRIED)
    for image_id in dataset.image_ids[::step]:
        path = dataset.image_dir / dataset.coco.imgs[image_id]["file_name"]
        if not path.exists():
            yield Problem(f"missing files among {len(dataset.image_ids[::step])} that were looked for", f"{path}")
