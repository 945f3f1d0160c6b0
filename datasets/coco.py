"""COCO-format detection data: one sample, one batch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from pycocotools.coco import COCO
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.ops import box_convert
from torchvision.transforms import v2

from datasets.annotations import index as index_annotations
from datasets.annotations import read_annotations
from datasets.images import UnreadableImageError, read_image
from datasets.randomness import cpu_seed, mixed_seed
from datasets.yolo import is_yolo, read_yolo
from util.errors import InputError

Target = dict[str, Tensor]


class CocoDetection(Dataset[tuple[Tensor, Target]]):
    """Images and boxes of a COCO annotation file.

    Crowd annotations and boxes without area inside the image are left out; images without objects stay. Labels are
    the file's category ids. EXIF orientation is ignored: COCO boxes refer to the pixel grid as stored.

    Args:
        image_dir: the folder that `file_name` entries are relative to.
        coco: of `read_annotations`.
        source: the file that `coco` was read from, for messages.
        transform: one of `datasets.transforms`; (PIL image, target in xyxy pixels) -> (uint8 (3,H,W), target).
        seed: with epoch and index, all that the random augmentation depends on.
        roots: folders that an image must lie in when all links are followed; none: `image_dir`.
        max_bad_images: how many images in a row that are missing or damaged are passed over for the next one, which
            depends on nothing but the files; of all that are met, `BadImages` keeps count. 0: the first is an error.

    Raises:
        InputError: on access, an image cannot be read.
    """

    def __init__(
        self,
        image_dir: Path,
        coco: COCO,
        source: Path,
        transform: v2.Transform,
        seed: int = 0,
        roots: Sequence[Path] = (),
        max_bad_images: int = 0,
    ) -> None:
        self.coco = coco
        self.image_ids: list[int] = sorted(self.coco.imgs)
        self.class_names: dict[int, str] = {key: self.coco.cats[key]["name"] for key in sorted(self.coco.cats)}
        self.num_classes = max(self.class_names) + 1
        self.image_dir = Path(image_dir)
        self.source = source
        self.max_bad_images = max_bad_images
        self._roots = (self.image_dir, *roots)
        self._transform = transform
        self._seed = seed
        # What workers read lies in a few flat arrays: reading many small objects would copy their pages into each one.
        images = [self.coco.imgs[image_id] for image_id in self.image_ids]
        self._file_names = [image["file_name"] for image in images]
        self._sizes = torch.tensor([[image["height"], image["width"]] for image in images])  # (images, 2)
        self._objects = _Objects.read(self.coco, self.image_ids, self._sizes)

    def __len__(self) -> int:
        return len(self.image_ids)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, Target]:
        """One augmented sample, a pure function of (seed, epoch, index) and the files.

        Args:
            key: (epoch, index), index into `image_ids`.

        Returns:
            image: uint8 (3,H,W), RGB.
            target: boxes float32 (n,4) cxcywh in [0,1] of the augmented image; labels int64 (n,); area float32 (n,) as
                annotated, in pixels of the original image; iscrowd int64 (n,), zeros; image_id int64 (); orig_size
                and size int64 (2,), (height, width) before and after augmentation. Where images were passed over, the
                sample is of the next one, and bad_images int64 (k,) holds their ids.
        """
        epoch, index = key
        picture, passed_over = self._read_from(index)
        shown = (index + len(passed_over)) % len(self)
        target = self._objects.of_image(shown, self._sizes[shown])
        with cpu_seed(mixed_seed("augment", self._seed, epoch, index)):
            image, target = self._transform(picture, target)
        height, width = image.shape[-2:]
        boxes = box_convert(target["boxes"].as_subclass(Tensor), "xyxy", "cxcywh")
        target["boxes"] = boxes / torch.tensor([width, height, width, height])
        target["image_id"] = torch.tensor(self.image_ids[shown])
        target["orig_size"] = self._sizes[shown].clone()
        target["size"] = torch.tensor([height, width])
        if passed_over:
            target["bad_images"] = torch.tensor(passed_over)
        return image, target

    def read_picture(self, index: int) -> Image.Image:
        """The image at `index` as stored, in RGB.

        Raises:
            UnreadableImageError, InputError: see `read_image`.
        """
        height, width = self._sizes[index].tolist()
        return read_image(self.image_dir / self._file_names[index], self._roots, (width, height), self.source)

    def _read_from(self, index: int) -> tuple[Image.Image, list[int]]:
        """The image at `index` or the next one that can be read, and the ids of those that were passed over."""
        passed_over: list[int] = []
        while True:
            place = (index + len(passed_over)) % len(self)
            try:
                return self.read_picture(place), passed_over
            except UnreadableImageError as error:
                if len(passed_over) >= min(self.max_bad_images, len(self) - 1):
                    raise InputError(str(error)) from None  # the kind that a loader passes on from its workers
                passed_over.append(self.image_ids[place])


class _Objects(NamedTuple):
    """The usable objects of all images, ordered by image; `first[i]:first[i + 1]` are those of image i."""

    boxes: Tensor  # float32 (objects, 4), xyxy pixels
    labels: Tensor  # int64 (objects,)
    area: Tensor  # float32 (objects,)
    first: Tensor  # int64 (images + 1,)

    @classmethod
    def read(cls, coco: COCO, image_ids: list[int], sizes: Tensor) -> _Objects:
        rows: list[dict[str, Any]] = []
        owners: list[int] = []
        for index, image_id in enumerate(image_ids):
            usable = [annotation for annotation in coco.imgToAnns.get(image_id, []) if not annotation["iscrowd"]]
            rows += usable
            owners += [index] * len(usable)
        owner = torch.tensor(owners, dtype=torch.int64)
        boxes = torch.tensor([row["bbox"] for row in rows], dtype=torch.float32).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        boxes = boxes.clamp(min=0).minimum(sizes.flip(1).repeat(1, 2)[owner])
        keep = (boxes[:, 2:] > boxes[:, :2]).all(dim=1)
        labels = torch.tensor([row["category_id"] for row in rows], dtype=torch.int64)
        area = torch.tensor([row["area"] for row in rows], dtype=torch.float32)
        first = torch.searchsorted(owner[keep], torch.arange(len(image_ids) + 1))
        return cls(boxes[keep], labels[keep], area[keep], first)

    def of_image(self, index: int, size: Tensor) -> dict[str, Any]:
        own = slice(int(self.first[index]), int(self.first[index + 1]))
        boxes = self.boxes[own].clone()
        return {
            "boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=tuple(size.tolist())),
            "labels": self.labels[own].clone(),
            "area": self.area[own].clone(),
            "iscrowd": torch.zeros(len(boxes), dtype=torch.int64),
        }


class Batch(NamedTuple):
    """Images of different sizes in one tensor, filled up with zeros at the bottom and on the right."""

    images: Tensor  # uint8 (B,3,H,W)
    pad_mask: Tensor  # bool (B,H,W), True where padded
    targets: list[Target]

    def to(self, device: torch.device | str) -> Batch:
        """The batch on `device`, `pad_mask` left in host memory: a detector plans with it, without asking the device.

        From pinned memory the copy overlaps with computation.
        """
        targets = [{name: value.to(device, non_blocking=True) for name, value in t.items()} for t in self.targets]
        return Batch(self.images.to(device, non_blocking=True), self.pad_mask, targets)

    def pin_memory(self) -> Batch:
        """The batch in page-locked memory."""
        targets = [{name: value.pin_memory() for name, value in target.items()} for target in self.targets]
        return Batch(self.images.pin_memory(), self.pad_mask.pin_memory(), targets)


def collate(samples: list[tuple[Tensor, Target]]) -> Batch:
    """Samples of `CocoDetection` as one batch, as high and wide as its highest and widest image."""
    height, width = (max(image.shape[axis] for image, _ in samples) for axis in (1, 2))
    images = torch.zeros(len(samples), 3, height, width, dtype=torch.uint8)
    pad_mask = torch.ones(len(samples), height, width, dtype=torch.bool)
    for row, (image, _) in enumerate(samples):
        images[row, :, : image.shape[1], : image.shape[2]] = image
        pad_mask[row, : image.shape[1], : image.shape[2]] = False
    return Batch(images, pad_mask, [target for _, target in samples])


def build_coco(
    root: Path, split: str, transform: v2.Transform, seed: int = 0, max_bad_images: int = 0
) -> CocoDetection:
    """The "train" or "val" split of a folder in COCO's layout, or of one in YOLO's (or its `data.yaml`).

    Args:
        max_bad_images: see `CocoDetection`; for training only, since an evaluation counts every image.

    Raises:
        InputError: the folder lacks `{split}2017/` or `annotations/instances_{split}2017.json`; or what a YOLO folder
            lacks.
    """
    root = Path(root)
    if is_yolo(root):
        image_dir, source, dataset = read_yolo(root, split)
        coco, roots = index_annotations(dataset, source), [source.parent]
    else:
        image_dir, source = coco_paths(root, split)
        coco, roots = read_annotations(source), [root]
    return CocoDetection(image_dir, coco, source, transform, seed, roots, max_bad_images)


def coco_paths(root: Path, split: str) -> tuple[Path, Path]:
    """The image folder and the annotation file of a split (InputError if one is missing)."""
    image_dir, annotation_file = root / f"{split}2017", root / "annotations" / f"instances_{split}2017.json"
    for path, exists in (
        (root, root.is_dir()),
        (image_dir, image_dir.is_dir()),
        (annotation_file, annotation_file.exists()),
    ):
        if not exists:
            raise InputError(
                f"{path} is missing; a COCO folder holds {split}2017/ with the images and "
                f"annotations/instances_{split}2017.json"
            )
    return image_dir, annotation_file
