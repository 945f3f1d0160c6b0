"""The built-in data set: reproducible, complete, in COCO's layout, with honest boxes."""

from __future__ import annotations

import colorsys
import json
import multiprocessing
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

import datasets.shapes
from datasets import build_coco, build_loader, eval_transform, prepare_shapes
from datasets.loading import EvalBatches
from datasets.scenes import MAX_OBJECTS, SMALLEST_VISIBLE_AREA, Scene, draw_scene
from util.errors import InputError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_shapes(tmp_path_factory.mktemp("cache"), num_train=40, num_val=10)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def scenes(count: int) -> list[Scene]:
    return [draw_scene(np.random.default_rng(seed)) for seed in range(count)]


def test_same_seed_gives_the_same_bytes_and_another_seed_does_not(folder: Path, tmp_path: Path) -> None:
    assert contents(prepare_shapes(tmp_path, 40, 10)) == contents(folder)
    assert contents(prepare_shapes(tmp_path, 40, 10, seed=1)) != contents(folder)


def test_more_images_leave_the_first_ones_as_they_are(folder: Path, tmp_path: Path) -> None:
    longer = contents(prepare_shapes(tmp_path, 41, 11))
    assert all(longer[name] == data for name, data in contents(folder).items() if name.endswith(".jpg"))


def test_training_and_validation_share_no_picture(folder: Path) -> None:
    files = contents(folder)
    pictures = [data for name, data in files.items() if name.endswith(".jpg")]
    assert len(pictures) == len(set(pictures)) == 50


@pytest.mark.parametrize(("split", "count"), [("train", 40), ("val", 10)])
def test_every_image_loads_as_coco(folder: Path, split: str, count: int) -> None:
    dataset = build_coco(folder, split, eval_transform(96, 200))
    assert len(dataset) == len(list((folder / f"{split}2017").iterdir())) == count
    assert dataset.class_names == {1: "circle", 2: "square", 3: "triangle", 4: "cross", 5: "ring"}
    assert dataset.num_classes == 6
    for index in range(count):
        _, target = dataset[0, index]
        assert len(target["boxes"]) == len(dataset.coco.imgToAnns.get(dataset.image_ids[index], []))


def test_batches_are_padded(folder: Path) -> None:
    dataset = build_coco(folder, "val", eval_transform(96, 200))
    assert all(batch.pad_mask.any() for batch in build_loader(dataset, EvalBatches(10, 5, 0, 1), 0, False))


def test_boxes_are_tight_around_what_is_visible() -> None:
    for scene in scenes(60):
        assert len(scene.objects) <= MAX_OBJECTS
        for number, drawn in enumerate(scene.objects):
            mask = scene.owner == number
            x, y, width, height = drawn.bbox
            inside = mask[y : y + height, x : x + width]
            assert drawn.area == mask.sum() == inside.sum() >= SMALLEST_VISIBLE_AREA
            for edge in (inside[0], inside[-1], inside[:, 0], inside[:, -1]):
                assert edge.any()


def test_visible_pixels_differ_from_the_pixels_around_them() -> None:
    contrasts = []
    for scene in scenes(60):
        for number in range(len(scene.objects)):
            own = scene.image[scene.owner == number].mean(axis=0)
            background = scene.image[scene.owner == -1].mean(axis=0)
            contrasts.append(float(np.linalg.norm(own - background)))
    assert np.percentile(contrasts, 2) > 40


def test_all_classes_and_sizes_occur_about_as_designed() -> None:
    drawn = [entry for scene in scenes(200) for entry in scene.objects]
    frequencies = Counter(entry.category_id for entry in drawn)
    assert set(frequencies) == {1, 2, 3, 4, 5}
    assert max(frequencies.values()) < 2 * min(frequencies.values())
    longer_sides = [max(entry.bbox[2:]) for entry in drawn]
    assert max(longer_sides) <= 91
    assert min(longer_sides) < 20
    assert np.median(longer_sides) > 25


def test_a_few_training_images_are_empty_and_no_validation_image_is() -> None:
    training = [len(datasets.shapes._scene(0, "train", number).objects) for number in range(1, 401)]
    validation = [len(datasets.shapes._scene(0, "val", number).objects) for number in range(1, 101)]
    assert 1 <= training.count(0) <= 12
    assert 0 not in validation


def test_colour_hints_at_the_class_and_neighbouring_classes_share_hues() -> None:
    hues: dict[int, list[float]] = {}
    for scene in scenes(200):
        for number, entry in enumerate(scene.objects):
            red, green, blue = scene.image[scene.owner == number].mean(axis=0) / 255
            hues.setdefault(entry.category_id, []).append(colorsys.rgb_to_hsv(red, green, blue)[0])
    for category_id, found in hues.items():
        offsets = [(hue - category_id / 5 + 0.5) % 1 - 0.5 for hue in found]
        assert max(abs(offset) for offset in offsets) < 0.16
        assert max(offsets) > 0.1 > -0.1 > min(offsets)


def prepare_small(root: Path) -> Path:
    return prepare_shapes(root, 30, 5)


def test_two_processes_at_once_end_with_one_whole_folder(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    with context.Pool(2) as pool:
        first, second = pool.map(prepare_small, [tmp_path, tmp_path], chunksize=1)
    assert first == second
    assert list(tmp_path.iterdir()) == [first]
    assert len(contents(first)) == 37


def test_loser_of_a_race_discards_its_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    winner = prepare_shapes(tmp_path, 3, 1)
    marker = winner / "annotations" / "marker"
    marker.touch()
    datasets.shapes._draw_beside(winner, {"train": 3, "val": 1}, 0)
    assert marker.exists()
    assert list(tmp_path.iterdir()) == [winner]


def test_leftovers_of_a_killed_run_do_no_harm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.shapes.shutil, "rmtree", lambda *_, **__: None)  # a kill leaves no time to tidy up
    monkeypatch.setattr(datasets.shapes, "_move_unless_there", interrupt)
    with pytest.raises(KeyboardInterrupt):
        prepare_shapes(tmp_path, 3, 1)
    monkeypatch.undo()
    assert len(list(tmp_path.iterdir())) == 1
    assert len(contents(prepare_shapes(tmp_path, 3, 1))) == 6


def test_interrupted_drawing_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.shapes, "_annotations", interrupt)
    with pytest.raises(KeyboardInterrupt):
        prepare_shapes(tmp_path, 3, 1)
    assert list(tmp_path.iterdir()) == []


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def test_finished_folder_is_used_again_without_drawing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.shapes, "draw_scene", interrupt)
    assert prepare_shapes(folder.parent, 40, 10) == folder


def test_cache_folder_comes_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.delenv("ENACT_CACHE", raising=False)
    assert prepare_shapes(None, 1, 1).parent == tmp_path / "xdg" / "enact"
    monkeypatch.setenv("ENACT_CACHE", str(tmp_path / "own"))
    assert prepare_shapes(None, 1, 1).parent == tmp_path / "own"


def test_unwritable_cache_is_one_line_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="ENACT_CACHE") as caught:
        prepare_shapes(tmp_path / "file" / "cache", 1, 1)
    assert str(tmp_path / "file") in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("counts", [(0, 1), (1, 0), (-3, 1)])
def test_counts_below_one_are_refused(tmp_path: Path, counts: tuple[int, int]) -> None:
    with pytest.raises(InputError, match="1 image"):
        prepare_shapes(tmp_path, *counts)


def test_annotations_are_numbered_from_one_without_gaps(folder: Path) -> None:
    sections = json.loads((folder / "annotations" / "instances_train2017.json").read_text())
    ids = [entry["id"] for entry in sections["annotations"]]
    assert ids == list(range(1, len(ids) + 1))
    assert [entry["id"] for entry in sections["images"]] == list(range(1, 41))


def test_drawing_leaves_torchs_random_numbers_alone(tmp_path: Path) -> None:
    state = torch.get_rng_state()
    prepare_shapes(tmp_path, 2, 1)
    torch.testing.assert_close(torch.get_rng_state(), state)
