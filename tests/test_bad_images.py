"""Training images that cannot be read: replaced, counted and named, up to a limit; never in an evaluation."""

from __future__ import annotations

import errno
import logging
from pathlib import Path

import pytest
import torch
from PIL import Image
from test_datasets import write_split
from torch.testing import assert_close

from datasets import BadImages, Batch, CocoDetection, build_coco, build_loader, train_transform
from datasets.loading import EpochBatches, EvalBatches
from util.errors import InputError

IMAGES = 12


def build(root: Path, limit: int) -> CocoDetection:
    return build_coco(root, "val", train_transform([20, 24], 60, [30], (16, 30)), seed=3, max_bad_images=limit)


def break_images(dataset: CocoDetection, *indices: int) -> list[str]:
    """Cut the files of these images in half; their names."""
    names = [dataset.coco.imgs[dataset.image_ids[index]]["file_name"] for index in indices]
    for name in names:
        path = dataset.image_dir / name
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return names


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_split(tmp_path / "d", [[{"bbox": [number, 4, 16, 8]}] for number in range(IMAGES)], size=(60, 40))


def all_batches(dataset: CocoDetection, workers: int = 0, epoch: int = 0) -> list[Batch]:
    sampler = EpochBatches(IMAGES, 2, seed=1, rank=0, world_size=1)
    sampler.set_epoch(epoch)
    return list(build_loader(dataset, sampler, workers, pin_memory=False))


def test_a_bad_image_is_replaced_by_the_next_that_can_be_read(root: Path) -> None:
    dataset = build(root, limit=3)
    break_images(dataset, 4, 5, IMAGES - 1)
    ids = dataset.image_ids
    for index, shown, bad in ((3, 3, []), (4, 6, [4, 5]), (5, 6, [5]), (IMAGES - 1, 0, [IMAGES - 1])):
        image, target = dataset[7, index]
        assert int(target["image_id"]) == ids[shown]
        assert target.get("bad_images", torch.tensor([])).tolist() == [ids[place] for place in bad]
        assert target["size"].tolist() == list(image.shape[1:])
    _, plain = dataset[7, 6]
    _, replaced = dataset[7, 5]
    assert_close(replaced["area"], plain["area"])
    assert "bad_images" not in plain


@pytest.mark.parametrize("how", ["missing", "damaged", "of another size", "a folder"])
def test_whatever_is_wrong_with_the_file_counts(root: Path, how: str) -> None:
    dataset = build(root, limit=1)
    path = dataset.image_dir / dataset._file_names[2]
    path.unlink()
    if how == "damaged":
        path.write_bytes(b"no image")
    elif how == "of another size":
        Image.new("RGB", (40, 60)).save(path)
    elif how == "a folder":
        path.mkdir()
    assert dataset[0, 2][1]["bad_images"].tolist() == [dataset.image_ids[2]]


def test_a_disk_that_fails_is_an_error_and_replaces_nothing(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Since a resumed run, or another process, may find it working."""
    dataset = build(root, limit=5)

    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(Image, "open", fail)
    with pytest.raises(InputError, match=r"Input/output error.*go on when"):
        dataset[0, 2]


def test_replacement_is_the_same_with_any_number_of_workers_and_again(root: Path) -> None:
    dataset = build(root, limit=4)
    break_images(dataset, 0, 3, 4, 9)
    alone, again, workers = all_batches(dataset), all_batches(dataset), all_batches(dataset, workers=2)
    assert sum("bad_images" in target for batch in alone for target in batch.targets) == 4
    for ours, *others in zip(alone, again, workers, strict=True):
        for other in others:
            assert_close(other.images, ours.images)
            assert_close(other.targets, ours.targets)


@pytest.mark.parametrize("workers", [0, 2])
def test_each_bad_image_is_counted_and_logged_once(
    root: Path, workers: int, caplog: pytest.LogCaptureFixture
) -> None:
    dataset = build(root, limit=2)
    names = break_images(dataset, 4, 5)
    bad = BadImages(dataset)
    with caplog.at_level(logging.WARNING):
        for epoch in range(3):
            seen = all_batches(dataset, workers, epoch)
            assert list(bad.watch(seen)) == seen
    assert set(bad.reasons) == {dataset.image_ids[4], dataset.image_ids[5]}
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 2
    for name in names:
        assert sum(name in message and "cannot be read" in message for message in messages) == 1


def test_beyond_the_limit_the_last_image_is_named(root: Path) -> None:
    dataset = build(root, limit=2)
    names = break_images(dataset, 1, 5, 9)
    with pytest.raises(InputError, match="image 3 that cannot be read, and --max_bad_images is 2") as caught:
        for _ in BadImages(dataset).watch(all_batches(dataset)):
            pass
    assert any(name in str(caught.value) for name in names)


@pytest.mark.parametrize("limit", [0, 2, 100])
def test_more_bad_images_in_a_row_than_the_limit_are_an_error_at_once(root: Path, limit: int) -> None:
    dataset = build(root, limit)
    names = break_images(dataset, *range(IMAGES))
    with pytest.raises(InputError, match="cannot be read") as caught:
        dataset[0, 3]
    assert type(caught.value) is InputError
    assert names[(3 + min(limit, IMAGES - 1)) % IMAGES] in str(caught.value)


def test_without_a_limit_given_nothing_is_replaced(root: Path) -> None:
    dataset = build_coco(root, "val", train_transform([20], 60, [], (16, 30)))
    break_images(dataset, 2)
    with pytest.raises(InputError, match="cannot be read"):
        list(build_loader(dataset, EvalBatches(IMAGES, 2, 0, 1), 0, pin_memory=False))
