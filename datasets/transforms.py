"""DETR's augmentation recipe (section 5.4 of the spec) over torchvision's v2 transforms.

Samples are pairs (PIL image, target) with target["boxes"] as `tv_tensors.BoundingBoxes` in xyxy pixels. Pictures stay
PIL until the last step, because the published recipe resizes with PIL. All randomness comes from torch's default CPU
generator.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
LONGEST_BEFORE_CROP = 32_768  # pixels; only an image fifty times as long as wide comes to it
PER_OBJECT = ("boxes", "labels", "area", "iscrowd")


def train_transform(
    short_sides: Sequence[int], max_long_side: int, crop_short_sides: Sequence[int], crop_range: tuple[int, int]
) -> v2.Transform:
    """Flip, then either resize or resize, crop and resize again, each with probability one half.

    Args:
        short_sides: lengths in pixels; one is drawn for the final resize.
        max_long_side: limit in pixels on the long side after the final resize.
        crop_short_sides: lengths of the short side before the crop; empty: never crop.
        crop_range: least and greatest side of the crop in pixels.

    Returns:
        (PIL image, target) -> (uint8 tensor (3,H,W), target), boxes still xyxy pixels.
    """
    resize: v2.Transform = ResizeShortSide(short_sides, max_long_side)
    if crop_short_sides:
        crop = [ResizeShortSide(crop_short_sides, LONGEST_BEFORE_CROP), CropRandomly(*crop_range), DropEmptyBoxes()]
        resize = v2.RandomChoice([resize, v2.Compose([*crop, resize])])
    return v2.Compose([v2.RandomHorizontalFlip(0.5), resize, v2.PILToTensor()])


def eval_transform(short_side: int, max_long_side: int) -> v2.Transform:
    """Resize only; same result type as `train_transform`."""
    return v2.Compose([ResizeShortSide([short_side], max_long_side), v2.PILToTensor()])


def resized_size(height: int, width: int, short_side: int, max_long_side: int | None = None) -> tuple[int, int]:
    """(height, width) after the published rule: the limited short side is rounded, the long side truncated."""
    short, long = min(height, width), max(height, width)
    if max_long_side is not None and long / short * short_side > max_long_side:
        short_side = max(1, round(max_long_side * short / long))
    scaled_long = short_side * long // short
    return (short_side, scaled_long) if height <= width else (scaled_long, short_side)


class ResizeShortSide(v2.Transform):  # type: ignore[misc]
    """Bilinear resize to a short side drawn from `short_sides`, the long side limited to `max_long_side` pixels."""

    def __init__(self, short_sides: Sequence[int], max_long_side: int | None = None) -> None:
        super().__init__()
        self.short_sides = tuple(short_sides)
        self.max_long_side = max_long_side

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        height, width = v2.query_size(flat_inputs)
        short_side = self.short_sides[_uniform_integer(0, len(self.short_sides) - 1)]
        return {"size": list(resized_size(height, width, short_side, self.max_long_side))}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        return functional.resize(inpt, params["size"], interpolation=v2.InterpolationMode.BILINEAR)


class CropRandomly(v2.Transform):  # type: ignore[misc]
    """Crop to a width and a height each uniform in [smallest, min(side, largest)], anywhere; boxes are clipped."""

    def __init__(self, smallest: int, largest: int) -> None:
        super().__init__()
        self.smallest, self.largest = smallest, largest

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        image_height, image_width = v2.query_size(flat_inputs)
        width, height = self._side(image_width), self._side(image_height)
        top = _uniform_integer(0, image_height - height)
        left = _uniform_integer(0, image_width - width)
        return {"top": top, "left": left, "height": height, "width": width}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        return functional.crop(inpt, **params)

    def _side(self, image_side: int) -> int:
        largest = min(image_side, self.largest)
        return _uniform_integer(min(self.smallest, largest), largest)


class DropEmptyBoxes(v2.Transform):  # type: ignore[misc]
    """Remove the objects whose box has no width or no height, from every per-object entry of the target.

    `v2.SanitizeBoundingBoxes` would also remove slivers of less than a pixel, which the published recipe keeps.
    """

    def forward(self, *inputs: Any) -> Any:
        image, target = inputs if len(inputs) > 1 else inputs[0]
        boxes = target["boxes"]
        keep = (boxes[:, 2:] > boxes[:, :2]).all(dim=1)
        kept = {name: tv_tensors.wrap(target[name][keep], like=target[name]) for name in PER_OBJECT if name in target}
        return image, {**target, **kept}


def normalize(images: Tensor, pad_mask: Tensor) -> Tensor:
    """Standardise with ImageNet's statistics, on whatever device the images are on.

    Args:
        images: uint8 (B,3,H,W), RGB in 0..255.
        pad_mask: bool (B,H,W), True where padded; on any device.

    Returns:
        float32 (B,3,H,W), exactly zero where padded.
    """
    normalized = images.to(torch.float32).div_(255)
    # Channel by channel with plain numbers: a tensor of statistics would be a blocking copy to the device each batch.
    for channel, (mean, std) in enumerate(zip(IMAGENET_MEAN, IMAGENET_STD, strict=True)):
        normalized[:, channel].sub_(mean).div_(std)
    return normalized.masked_fill_(pad_mask.to(images.device, non_blocking=True).unsqueeze(1), 0)


def _uniform_integer(low: int, high: int) -> int:
    """Uniform over low..high, both included."""
    return int(torch.randint(low, high + 1, ()))
