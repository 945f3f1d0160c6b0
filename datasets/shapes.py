"""The built-in data set: drawn scenes in COCO's own layout, made once and kept in a cache folder."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from datasets.randomness import mixed_seed
from datasets.scenes import CLASS_NAMES, Scene, draw_scene
from util.errors import InputError

VERSION = 1  # raise it whenever the pictures or annotations of a seed change
EMPTY_TRAINING_PART = 0.01
JPEG_QUALITY = 92


def prepare_shapes(root: Path | None = None, num_train: int = 4000, num_val: int = 250, seed: int = 0) -> Path:
    """Draw the data set unless the cache has it.

    Processes that start at once may each draw; the first to finish wins, and a half-written folder is never taken for
    a finished one.

    Args:
        root: the cache folder; None: $ENACT_CACHE, else $XDG_CACHE_HOME/enact, else ~/.cache/enact.
        num_train, num_val: images in each split, at least 1.
        seed: of the pictures; the same seed gives the same pictures on every machine.

    Returns:
        The data set's folder, for `build_coco`.

    Raises:
        InputError: a count is below 1, or the cache folder cannot be written.
    """
    if min(num_train, num_val) < 1:
        raise InputError(f"the shapes data set needs 1 image a split or more, not {num_train} and {num_val}")
    cache = Path(root) if root is not None else _default_cache()
    folder = cache / f"shapes-v{VERSION}-{num_train}-{num_val}-seed{seed}"
    if not folder.is_dir():
        try:
            _draw_beside(folder, {"train": num_train, "val": num_val}, seed)
        except OSError as error:
            raise InputError(f"cannot write {cache} ({error.strerror}); name another folder in ENACT_CACHE") from None
    return folder


def _default_cache() -> Path:
    if "ENACT_CACHE" in os.environ:
        return Path(os.environ["ENACT_CACHE"]).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "enact"


def _draw_beside(folder: Path, counts: dict[str, int], seed: int) -> None:
    """Draw into a folder of our own and move it into place, or discard it if another process was faster."""
    draft = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
    try:
        for split, count in counts.items():
            _draw_split(draft, split, count, seed)
        _move_unless_there(draft, folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _move_unless_there(draft: Path, folder: Path) -> None:
    try:
        draft.rename(folder)
    except OSError:
        if not folder.is_dir():
            raise


def _draw_split(root: Path, split: str, count: int, seed: int) -> None:
    image_dir, annotation_dir = root / f"{split}2017", root / "annotations"
    for directory in (image_dir, annotation_dir):
        directory.mkdir(parents=True, exist_ok=True)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for image_id in tqdm(range(1, count + 1), desc=f"drawing shapes ({split})", unit="image", leave=False):
        scene = _scene(seed, split, image_id)
        name = f"{image_id:012d}.jpg"
        Image.fromarray(scene.image).save(image_dir / name, quality=JPEG_QUALITY)
        height, width = scene.owner.shape
        images.append({"id": image_id, "file_name": name, "height": height, "width": width})
        annotations += _annotations(scene, image_id, len(annotations) + 1)
    categories = [{"id": key, "name": name, "supercategory": "shape"} for key, name in CLASS_NAMES.items()]
    sections = {"images": images, "annotations": annotations, "categories": categories}
    (annotation_dir / f"instances_{split}2017.json").write_text(json.dumps(sections), encoding="utf-8")


def _scene(seed: int, split: str, image_id: int) -> Scene:
    rng = np.random.Generator(np.random.PCG64(mixed_seed("shapes", seed, split, image_id)))
    empty = split == "train" and rng.random() < EMPTY_TRAINING_PART
    return draw_scene(rng, empty)


def _annotations(scene: Scene, image_id: int, first_id: int) -> list[dict[str, Any]]:
    return [
        {
            "id": first_id + position,
            "image_id": image_id,
            "category_id": drawn.category_id,
            "bbox": list(drawn.bbox),
            "area": drawn.area,
            "iscrowd": 0,
            "segmentation": [_corners(*drawn.bbox)],
        }
        for position, drawn in enumerate(scene.objects)
    ]


def _corners(x: int, y: int, width: int, height: int) -> list[int]:
    """The box as a polygon, for tools that insist on one."""
    return [x, y, x + width, y, x + width, y + height, x, y + height]
