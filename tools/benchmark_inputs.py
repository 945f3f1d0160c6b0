"""What is measured on: batches and token maps with the sizes that COCO's images get from the real transforms.

Sizes and numbers of objects are those of a hundred images of COCO (tools/data/coco_sizes.json); pixels, boxes and
labels are random, and all of it follows from a seed.

Shapes: B images, N = h * w cells of the feature map, C channels.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor, nn
from torchvision import tv_tensors
from torchvision.ops import box_convert

from configs.schema import Config
from datasets import Batch, collate, eval_transform, train_transform
from datasets.coco import Target
from datasets.randomness import cpu_seed, mixed_seed
from enact.order import token_order
from models.layers import feature_pad_mask
from models.packing import Packing, Padding, padding_of
from models.position_encoding import sine_embedding

SIZES = Path(__file__).parent / "data" / "coco_sizes.json"
SEED = 42
# What inference is measured on: COCO's commonest size, which becomes 800 x 1066.
COMMON_PICTURE = (480, 640)
SMALLEST_BOX = 0.02  # of a side of the image
LARGEST_BOX = 0.9


class Picture(NamedTuple):
    """An image before its transform: pixels, and the number of its objects."""

    height: int
    width: int
    objects: int


def coco_pictures() -> list[Picture]:
    """The hundred that ship with the tool."""
    return [Picture(*row) for row in json.loads(SIZES.read_text())["images"]]


def scaled(config: Config, scale: float) -> Config:
    """A config whose images are smaller by a factor, for a trial."""

    def shrink(sides: Sequence[int]) -> tuple[int, ...]:
        return tuple(max(1, round(side * scale)) for side in sides)

    return replace(
        config,
        train_short_sides=shrink(config.train_short_sides),
        crop_short_sides=shrink(config.crop_short_sides),
        crop_range=(shrink(config.crop_range)[0], shrink(config.crop_range)[1]),
        eval_short_side=shrink([config.eval_short_side])[0],
        max_long_side=shrink([config.max_long_side])[0],
    )


def training_batch(config: Config, images: int, seed: int = SEED) -> Batch:
    """So many images, flipped, resized and cropped as the config says, with their objects.

    Image i is the same whatever the number of images.
    """
    transform = train_transform(
        config.train_short_sides, config.max_long_side, config.crop_short_sides, config.crop_range
    )
    samples = []
    for index in range(images):
        with cpu_seed(mixed_seed("benchmark", seed, index)):
            pictures = coco_pictures()
            samples.append(_sample(pictures[int(torch.randint(len(pictures), ()))], transform, config))
    return collate(samples)


def largest_batch(config: Config, images: int, seed: int = SEED) -> Batch:
    """The batch that needs the most memory in training: images as large as they get, lying and upright by turns.

    Each has as many objects as any of the hundred that ship with the tool.
    """
    short, long = max(config.train_short_sides), config.max_long_side
    objects = max(picture.objects for picture in coco_pictures())
    transform = eval_transform(short, long)
    with cpu_seed(mixed_seed("benchmark largest", seed)):
        pictures = [Picture(*((long, short) if index % 2 else (short, long)), objects) for index in range(images)]
        return collate([_sample(picture, transform, config) for picture in pictures])


def inference_batch(config: Config, seed: int = SEED) -> Batch:
    """One image of 480 x 640 pixels as evaluation gets it, 800 x 1066 at full size."""
    with cpu_seed(mixed_seed("benchmark inference", seed)):
        transform = eval_transform(config.eval_short_side, config.max_long_side)
        return collate([_sample(Picture(*COMMON_PICTURE, objects=1), transform, config)])


def _sample(picture: Picture, transform: Any, config: Config) -> tuple[Tensor, Target]:
    """A random picture and its target, as `CocoDetection` gives them."""
    noise = torch.randint(0, 256, (picture.height, picture.width, 3), dtype=torch.uint8)
    canvas = (picture.height, picture.width)
    target = {
        "boxes": tv_tensors.BoundingBoxes(random_boxes(picture), format="XYXY", canvas_size=canvas),
        "labels": torch.randint(1, config.num_classes or 91, (picture.objects,)),
    }
    image, target = transform(Image.fromarray(noise.numpy()), target)
    height, width = image.shape[-2:]
    boxes = box_convert(target["boxes"].as_subclass(Tensor), "xyxy", "cxcywh")
    target["boxes"] = boxes / torch.tensor([width, height, width, height])
    return image, target


def random_boxes(picture: Picture) -> Tensor:
    """Boxes (objects, 4) xyxy in pixels, anywhere in the picture, of sides from 2% to 90% with small ones in plenty."""
    low, high = math.log(SMALLEST_BOX), math.log(LARGEST_BOX)
    sides = (torch.rand(picture.objects, 2) * (high - low) + low).exp()
    corner = torch.rand(picture.objects, 2) * (1 - sides)
    return torch.cat([corner, corner + sides], 1) * torch.tensor([picture.width, picture.height]).repeat(2)


class TokenMaps(NamedTuple):
    """What an encoder gets: tokens (B, h, w, C) on the device, and the mask (B, h, w) bool in host memory."""

    tokens: Tensor
    cells: Tensor


def token_maps(cells: Tensor, channels: int, device: torch.device, seed: int = SEED) -> TokenMaps:
    """Random tokens for the mask of a feature map's cells (B, h, w)."""
    with cpu_seed(mixed_seed("benchmark tokens", seed)):
        tokens = torch.randn(*cells.shape, channels)
    return TokenMaps(tokens.to(device), cells)


def cells_of(batch: Batch, config: Config) -> Tensor:
    """The mask (B, h, w) of the cells of a batch's feature map."""
    stride = 16 if config.dilation else 2 ** (config.backbone_stage + 1)
    height, width = (math.ceil(side / stride) for side in batch.images.shape[2:])
    return feature_pad_mask(batch.pad_mask, torch.empty(1, 1, height, width, device="meta"))


def map_without_padding(tokens: int) -> Tensor:
    """The mask (1, h, w) of one image with about so many cells, three to four in height and width."""
    height = max(1, round((tokens * 3 / 4) ** 0.5))
    return torch.zeros(1, height, max(1, round(tokens / height)), dtype=torch.bool)


class EncoderCall:
    """The encoder of a detector on token maps, as the detector calls it: packed where it packs."""

    def __init__(self, model: nn.Module, maps: TokenMaps, config: Config) -> None:
        self.model: Any = model
        self.maps = maps
        self._order = token_order(config.token_order)
        self._channels = config.hidden_dim
        self._by_row_and_column = not hasattr(model, "position_embedding")
        self._position = self._positions(maps.tokens.device)

    def __call__(self) -> Tensor:
        """(S, C) for S real tokens of a packed batch; else (B, N, C), or (B, h, w, C) of Anchor DETR."""
        tokens, cells = self.maps
        model, device = self.model, tokens.device
        padding: Padding = padding_of(cells, device, self._order, skip=model.skip_padding)
        inputs = [tokens, *self._position]
        if isinstance(padding, Packing):
            inputs = [padding.pack(x.expand_as(tokens).flatten(1, 2)) for x in inputs]
        elif self._by_row_and_column:
            padding = cells.to(device, non_blocking=True)
        else:
            inputs = [x.flatten(1, 2) for x in inputs]
            if self._order is not None:  # only ENACT's own variants have one, and they pack where there is padding
                places = self._order(cells.shape[1], cells.shape[2], device).argsort()
                inputs = [x[:, places] for x in inputs]
        memory: Tensor = model.encoder(*inputs, padding)
        return memory

    def _positions(self, device: torch.device) -> list[Tensor]:
        """(B, h, w, C); or of x (B, 1, w, C) and of y (B, h, 1, C)."""
        batch, height, width = self.maps.cells.shape
        if not self._by_row_and_column:
            return [self.model.position_embedding(self.maps.cells.to(device)).detach()]
        lines = (torch.linspace(0, 1, side, device=device).expand(batch, -1) for side in (width, height))
        x, y = (sine_embedding(line, self._channels) for line in lines)
        return [x.unsqueeze(1), y.unsqueeze(2)]
