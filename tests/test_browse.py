"""tools/browse.py: the samples that it draws, their boxes and names, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image
from torch.testing import assert_close

from configs.cli import parse_args
from datasets import Batch, CocoDetection, EpochBatches
from preparation import build_data
from tools import browse

pytestmark = pytest.mark.usefixtures("empty_folder")
FLAGS = ["--shapes_train", "16", "--shapes_val", "6", "--batch_size", "4"]


def sheet(epoch: int, count: int, *flags: str) -> tuple[Figure, list[Batch], CocoDetection]:
    config = parse_args([*FLAGS, *flags])
    train_set, _ = build_data(config)
    batches = browse.read_batches(train_set, config, epoch, count)
    return browse.draw_sheet(batches, train_set, count, "title"), batches, train_set


def test_panels_hold_the_samples_that_a_run_takes_in_that_epoch() -> None:
    figure, _, dataset = sheet(3, 6)
    order = EpochBatches(16, 4, seed=42, rank=0, world_size=1)
    order.set_epoch(3)
    expected = [dataset[key] for keys in order for key in keys][:6]
    panels = [axes for axes in figure.axes if axes.get_title()]
    assert len(panels) == 6
    for axes, (image, target) in zip(panels, expected, strict=True):
        name = dataset.coco.imgs[int(target["image_id"])]["file_name"]
        (old_height, old_width), (height, width) = target["orig_size"].tolist(), image.shape[1:]
        count = len(target["labels"])
        size = f"{old_width} x {old_height} to {width} x {height}"
        assert axes.get_title() == f"{name}\n{size}, {count} object{'s' if count != 1 else ''}"
        shown = torch.tensor(axes.images[0].get_array()).permute(2, 0, 1)
        assert_close(shown[:, :height, :width], image)
        names = [dataset.class_names[label] for label in target["labels"].tolist()]
        assert [text.get_text() for text in axes.texts] == names


def test_boxes_lie_on_their_objects_in_pixels() -> None:
    figure, batches, _ = sheet(0, 4)
    targets = [target for batch in batches for target in batch.targets]
    for axes, target in zip(figure.axes, targets, strict=True):
        drawn = [patch for patch in axes.patches if isinstance(patch, Rectangle) and not patch.get_hatch()]
        height, width = target["size"].tolist()
        for patch, (x, y, across, down) in zip(drawn, target["boxes"].tolist(), strict=True):
            left, top = (x - across / 2) * width, (y - down / 2) * height
            found = (*patch.get_xy(), patch.get_width(), patch.get_height())
            assert found == pytest.approx((left, top, across * width, down * height), abs=1e-4)


def test_padding_is_hatched_and_nothing_else() -> None:
    figure, batches, _ = sheet(0, 4)
    [batch] = batches
    assert batch.pad_mask.any()
    for axes, pad_mask in zip(figure.axes, batch.pad_mask, strict=True):
        hatched = torch.zeros_like(pad_mask)
        for patch in (patch for patch in axes.patches if patch.get_hatch()):
            assert isinstance(patch, Rectangle)
            x, y = (int(value) for value in patch.get_xy())
            hatched[y : y + int(patch.get_height()), x : x + int(patch.get_width())] = True
        assert_close(hatched, pad_mask)


def test_the_command_writes_a_picture_and_takes_the_flags_of_a_run(cache: Path) -> None:
    [root] = cache.iterdir()
    file = root / "annotations" / "instances_train2017.json"
    folder = Path("data")
    (folder / "annotations").mkdir(parents=True)
    for split in ("train2017", "val2017"):
        (folder / split).symlink_to(root / split)
    annotations = json.loads(file.read_text())
    for category in annotations["categories"]:
        category["name"] = f"$\\{category['id']}$"  # which is no formula that could be set
    for split in ("train", "val"):
        (folder / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(annotations))
    sizes = ["--train_short_sides", "[32]", "--crop_short_sides", "[]", "--batch_size", "3"]
    assert browse.main(["--coco_path", "data", *sizes, "--count", "5", "--epoch", "1", "--output", "a/b.png"]) == 0
    with Image.open("a/b.png") as image:
        assert image.format == "PNG"
        assert image.width > 1000


def test_an_epoch_shows_no_more_samples_than_it_has(capsys: pytest.CaptureFixture[str]) -> None:
    """Of 16 images in batches of 5 the last is left out; a batch of 20 holds some twice, which are shown once."""
    for batch_size, count in ((5, 15), (20, 16)):
        assert browse.main([*FLAGS, "--batch_size", str(batch_size), "--count", "40"]) == 0
        assert f"{count} samples of epoch 0" in capsys.readouterr().err
    assert Path("outputs/browse_epoch0.png").exists()


def test_bad_input_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    for flags, text in (
        (["--coco_path", "nowhere"], "nowhere is missing"),
        (["--colour", "red"], "colour"),
        (["--output", "."], "cannot write"),
    ):
        assert browse.main([*FLAGS, *flags]) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("error: ")
        assert text in error
    for flag in ("--count", "--epoch"):
        with pytest.raises(SystemExit):
            browse.main([flag, "-1"])
        assert "'-1' is not an integer of" in capsys.readouterr().err
