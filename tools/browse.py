"""Draw training samples with their boxes, as the detector sees them: after augmentation, padded to their batch.

    python tools/browse.py                                              # the built-in drawn scenes
    python tools/browse.py --coco_path COCO --model anchor_detr --epoch 3 --count 24 --output samples.png

Flags other than the ones below are those of main.py, so that a run's own sizes, batches and seed can be looked at:
`--config outputs/detr_enact/config.yaml`. The samples are the first that such a run takes in the epoch, in its order.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torchvision.ops import box_convert

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from configs.cli import parse_args
from configs.schema import Config
from datasets import Batch, CocoDetection, EpochBatches, collate
from preparation import build_data
from tools.clusters_panels import PALETTE
from tools.commands import one_line_errors
from util.errors import InputError
from util.logs import set_up_console

logger = logging.getLogger("browse")

COLUMNS = 4
PANEL = 3.2  # inches of a panel's longer side


@one_line_errors
def main(argv: Sequence[str] | None = None) -> int:
    """The command: 0 if the sheet was written, 2 if it could not be."""
    set_up_console()
    options, flags = build_parser().parse_known_args(argv)
    config = parse_args(flags)
    browse(config, options.epoch, options.count, options.output or Path(f"outputs/browse_epoch{options.epoch}.png"))
    return 0


def build_parser() -> argparse.ArgumentParser:
    """A parser of the flags that main.py does not have."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--count", type=_at_least(1), default=16, help="samples (default 16)")
    parser.add_argument("--epoch", type=_at_least(0), default=0, help="whose augmentation, from 0 (default 0)")
    parser.add_argument("--output", type=Path, help="a PNG file; default: outputs/browse_epochE.png")
    return parser


def browse(config: Config, epoch: int, count: int, path: Path) -> None:
    """Write a sheet of the first samples of an epoch.

    Args:
        config: of the run; its data, sizes, batch size and seed count.
        epoch: from 0.
        count: of samples, at least 1.
        path: a PNG file.

    Raises:
        InputError: the data cannot be read, or the file not be written.
    """
    train_set, _ = build_data(config)
    batches = read_batches(train_set, config, epoch, count)
    count = min(count, len(train_set), sum(len(batch.targets) for batch in batches))
    figure = draw_sheet(batches, train_set, count, f"epoch {epoch}, {config.model}, seed {config.seed}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=100, format="png")
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}; choose another --output") from None
    logger.info("%d samples of epoch %d are drawn in %s", count, epoch, path)


def read_batches(dataset: CocoDetection, config: Config, epoch: int, count: int) -> list[Batch]:
    """The first batches that one process takes in an epoch, as many as `count` samples need."""
    order = EpochBatches(len(dataset), config.batch_size, config.seed, rank=0, world_size=1)
    order.set_epoch(epoch)
    wanted = -(-count // config.batch_size)
    return [collate([dataset[key] for key in keys]) for keys in islice(order, wanted)]


def draw_sheet(batches: Sequence[Batch], dataset: CocoDetection, count: int, title: str) -> Figure:
    """A panel for each of the first `count` samples of `batches`."""
    samples = [(batch, row) for batch in batches for row in range(len(batch.targets))][:count]
    columns = min(COLUMNS, len(samples))
    rows = -(-len(samples) // columns)
    shape = max(batch.images.shape[2] / batch.images.shape[3] for batch in batches)  # height over width
    size = (columns * PANEL, rows * (PANEL * shape + 0.55) + 0.5)
    figure = Figure(size, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=11)
    for (batch, row), axes in zip(samples, figure.subplots(rows, columns, squeeze=False).flat, strict=False):
        draw_sample(axes, batch, row, dataset)
    for axes in figure.axes[len(samples):]:
        axes.set_axis_off()
    return figure


def draw_sample(axes: Axes, batch: Batch, row: int, dataset: CocoDetection) -> None:
    """One sample of a batch on the batch's canvas: its padding hatched, its boxes with their names."""
    image, target = batch.images[row], batch.targets[row]
    height, width = target["size"].tolist()
    canvas = image.masked_fill(batch.pad_mask[row], 235)
    axes.imshow(canvas.permute(1, 2, 0).numpy(), interpolation="nearest", extent=(0, *image.shape[:0:-1], 0))
    _hatch_padding(axes, width, height, image.shape[2], image.shape[1])
    boxes = box_convert(target["boxes"], "cxcywh", "xywh") * torch.tensor([width, height, width, height])
    for box, label in zip(boxes.tolist(), target["labels"].tolist(), strict=True):
        _draw_box(axes, box, label, dataset.class_names)
    old_height, old_width = target["orig_size"].tolist()
    name = dataset.coco.imgs[int(target["image_id"])]["file_name"]
    objects = f"{len(boxes)} object{'' if len(boxes) == 1 else 's'}"
    axes.set_title(f"{name}\n{old_width} x {old_height} to {width} x {height}, {objects}", fontsize=7.5)
    axes.set(xlim=(0, image.shape[2]), ylim=(image.shape[1], 0), xticks=[], yticks=[])


def _hatch_padding(axes: Axes, width: int, height: int, canvas_width: int, canvas_height: int) -> None:
    right = (width, 0, canvas_width - width, canvas_height)
    below = (0, height, width, canvas_height - height)
    for x, y, across, down in (right, below):
        if across > 0 and down > 0:
            axes.add_patch(Rectangle((x, y), across, down, fill=False, hatch="////", edgecolor="0.7", linewidth=0))


def _draw_box(axes: Axes, box: list[float], label: int, class_names: Mapping[int, str]) -> None:
    x, y, width, height = box
    color = PALETTE[label % len(PALETTE)]
    axes.add_patch(Rectangle((x, y), width, height, fill=False, edgecolor=color, linewidth=1.6))
    background = {"facecolor": "white", "edgecolor": color, "pad": 0.8, "alpha": 0.85}
    # Without parse_math, a name with dollar signs stays as it is.
    axes.text(x, y, class_names[label], fontsize=6.5, va="top", bbox=background, clip_on=True, parse_math=False)


def _at_least(least: int) -> Callable[[str], int]:
    """A reader of integers from `least` on, for argparse."""

    def integer(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not an integer of {least} or more")
        return int(text)

    return integer


if __name__ == "__main__":
    sys.exit(main())
