"""Pictures of a run: learning curves, and detections beside the truth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch
from torch import Tensor
from torchvision.utils import draw_bounding_boxes, make_grid, save_image

mpl.use("Agg")
import matplotlib.pyplot as plt

# An image uint8 (3, H, W), its objects ("labels", "boxes" xyxy in its pixels), its detections (these and "scores").
Picture = tuple[Tensor, Mapping[str, Tensor], Mapping[str, Tensor]]


def save_curves(records: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Loss of training and evaluation, and AP and AP50, over epochs.

    Args:
        records: those of log.txt.
        path: a PNG file.
    """
    figure, (losses, precision) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    evaluated = [record for record in records if "test_coco_eval_bbox" in record]
    losses.plot(*_series(records, "train_loss"), marker=".", label="training")
    losses.plot(*_series(evaluated, "test_loss"), marker=".", label="evaluation")
    epochs = [record["epoch"] for record in evaluated]
    for index, name in enumerate(("AP", "AP50")):
        precision.plot(epochs, [record["test_coco_eval_bbox"][index] for record in evaluated], marker=".", label=name)
    precision.set_ylim(0, 1)
    for axes, name in ((losses, "loss"), (precision, "average precision")):
        axes.set(xlabel="epoch", ylabel=name)
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _series(records: Sequence[Mapping[str, Any]], key: str) -> tuple[list[int], list[float]]:
    return [record["epoch"] for record in records], [record[key] for record in records]


def save_detections(
    pictures: Sequence[Picture],
    class_names: Mapping[int, str],
    path: Path,
    min_score: float = 0.5,
) -> None:
    """Pairs of pictures, the truth on the left and the detections on the right, two pairs a row.

    Args:
        pictures: images with their objects and detections.
        class_names: by label.
        path: a PNG file.
        min_score: detections below it are not drawn.
    """
    tiles = []
    for image, truth, found in pictures:
        kept = found["scores"] >= min_score
        captions = [
            f"{class_names.get(int(label), label)} {score:.2f}"
            for label, score in zip(found["labels"][kept], found["scores"][kept], strict=True)
        ]
        names = [str(class_names.get(int(label), label)) for label in truth["labels"]]
        tiles += [_draw(image, truth["boxes"], names, "lime"), _draw(image, found["boxes"][kept], captions, "red")]
    height, width = (max(tile.shape[side] for tile in tiles) for side in (1, 2))
    canvas = torch.full((len(tiles), 3, height, width), 255, dtype=torch.uint8)
    for slot, tile in zip(canvas, tiles, strict=True):
        slot[:, : tile.shape[1], : tile.shape[2]] = tile
    save_image(make_grid(canvas.float() / 255, nrow=4, pad_value=1.0), path)


def _draw(image: Tensor, boxes: Tensor, captions: Sequence[str], color: str) -> Tensor:
    """The image, enlarged if it is small, with boxes and captions."""
    zoom = max(1, round(320 / max(image.shape[1:])))
    image = image.repeat_interleave(zoom, 1).repeat_interleave(zoom, 2)
    if not len(boxes):
        return image
    drawn: Tensor = draw_bounding_boxes(image, boxes * zoom, list(captions), colors=color, width=2)
    return drawn
