"""Annotations, images, YOLO folders and configs as an attacker would craft them: one line, bounded memory and time."""

from __future__ import annotations

import json
import os
import struct
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image
from test_datasets_errors import PLAIN, changed, message_of, valid_sections, write_sections

from configs.cli import parse_args
from datasets import build_coco, json_files, train_transform
from datasets.images import LARGEST_SIDE
from util import memory


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "data"
    (root / "val2017").mkdir(parents=True)
    (root / "annotations").mkdir()
    Image.effect_noise((30, 20), 90).convert("RGB").save(root / "val2017" / "a.jpg")
    write_sections(root, valid_sections())
    return root


def annotation_file(root: Path) -> Path:
    return root / "annotations" / "instances_val2017.json"


def nested(depth: int) -> str:
    return "[" * depth + "]" * depth


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (nested(100_000), "nested too deeply"),
        ('{"a":' * 100_000, "nested too deeply"),
        (f'{{"images": {"9" * 5000}}}', "thousands of digits"),
        ('{"images": [], "images": [{}], "annotations": [], "categories": []}', "has the key 'images' twice"),
        ('{"images": [{"id": 1, "id": 2}]}', "has the key 'id' twice"),
        ("\ufeff{}", "malformed JSON"),
        ("NaN", "expected an object"),
    ],
)  # fmt: skip
def test_json_that_breaks_readers_is_refused(root: Path, text: str, expected: str) -> None:
    annotation_file(root).write_text(text)
    message = message_of(lambda: build_coco(root, "val", PLAIN))
    assert expected in message
    assert len(message) < 600


def test_json_that_would_fill_the_memory_is_not_parsed(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    annotation_file(root).write_text("[" + "{}," * 100_000 + "{}]")
    monkeypatch.setattr(memory, "machine_bytes", lambda: 2**24)
    monkeypatch.setattr(json, "load", lambda *_, **__: pytest.fail("parsed"))
    assert "more than four fifths of this machine's memory" in message_of(lambda: build_coco(root, "val", PLAIN))


def test_what_is_counted_is_more_than_the_parser_takes(tmp_path: Path) -> None:
    """For the forms that cost most a byte."""
    for unit in ("{}", "[]", "[[]]", '{"a":{}}', "1.5", '"\\u1234"', "123456789", "[1,2]", '{"a":1,"b":2}'):
        file = tmp_path / "units.json"
        file.write_text("[" + f"{unit}," * 60_000 + f"{unit}]")
        tracemalloc.start()
        json_files.read_json(file)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < json_files.CHUNK + json_files.most_memory(file), unit


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (changed("images", "id", 2**63), "is not an integer"),
        (changed("images", "width", 10**400), f"of 1 to {LARGEST_SIDE}"),
        (changed("images", "width", float("nan")), f"of 1 to {LARGEST_SIDE}"),
        (lambda s: s["images"][0].update(width=60_000, height=60_000), "more than fit"),
        (changed("annotations", "bbox", [1, 2, 10**400, 3]), "four finite numbers"),
        (changed("annotations", "bbox", [1e300, 2, 3, 3]), "four finite numbers"),
        (changed("annotations", "bbox", ["x" * 10**4] * 10**2), "four finite numbers"),
        (changed("annotations", "id", "x" * 10**6), None),
        (changed("annotations", "image_id", "x" * 10**6), "which \"images\" lacks"),
        (changed("categories", "id", [[[]]] * 10**5), "category id"),
        (changed("categories", "name", "cat\x1b[2J\nerror"), "holds control characters"),
        (changed("images", "file_name", "a" * 10**6), "is longer than"),
        (changed("images", "file_name", "a\x00.jpg"), "holds control characters"),
        (changed("images", "file_name", "a\n.jpg"), "holds control characters"),
        (changed("images", "file_name", "\ud800.jpg"), "holds control characters"),
        (changed("images", "file_name", "..\\a.jpg"), "leads out"),
        (changed("images", "file_name", "b\\..\\..\\a.jpg"), "leads out"),
        (changed("images", "file_name", "C:\\a.jpg"), "leads out"),
        (changed("images", "file_name", "C:a.jpg"), "leads out"),
        (changed("images", "file_name", "\\\\server\\share\\a.jpg"), "leads out"),
        (changed("images", "file_name", "//server/share/a.jpg"), "leads out"),
        (changed("images", "file_name", ".."), "leads out"),
    ],
)  # fmt: skip
def test_values_that_break_what_follows_are_refused_in_a_short_line(
    root: Path, damage: Callable[[dict[str, Any]], Any], expected: str | None
) -> None:
    sections = valid_sections()
    damage(sections)
    write_sections(root, sections)
    if expected is None:
        build_coco(root, "val", PLAIN)
        return
    message = message_of(lambda: build_coco(root, "val", PLAIN))
    assert expected in message
    assert len(message) < 1000
    assert message.isprintable()


@pytest.mark.parametrize("name", ["dossier/a b.jpg", "\u3000\u732b.jpg", "o'caf\u00e9-01-01T12:00.jpg", "b/../a.jpg"])
def test_unusual_but_honest_names_are_taken(root: Path, name: str) -> None:
    path = root / "val2017" / name
    (root / "val2017" / "b").mkdir()
    path.parent.mkdir(exist_ok=True)
    Image.new("RGB", (30, 20)).save(path)
    sections = valid_sections()
    changed("images", "file_name", name)(sections)
    write_sections(root, sections)
    assert build_coco(root, "val", PLAIN)[0, 0][0].shape == (3, 20, 30)


def make_special(path: Path, how: str) -> None:
    outside = path.parents[2] / "private.jpg"
    Image.new("RGB", (30, 20)).save(outside)
    path.unlink()
    if how == "pipe":
        os.mkfifo(path)
    elif how == "device":
        path.symlink_to("/dev/zero")
    elif how == "link outside":
        path.symlink_to(outside)
    elif how == "relative link outside":
        path.symlink_to("../../private.jpg")
    elif how == "loop":
        path.symlink_to(path)


@pytest.mark.timeout(20)
@pytest.mark.parametrize("how", ["pipe", "device", "link outside", "relative link outside", "loop"])
def test_nothing_but_files_of_the_data_folder_is_opened(root: Path, how: str) -> None:
    path = root / "val2017" / "a.jpg"
    make_special(path, how)
    assert message_of(lambda: build_coco(root, "val", PLAIN)[0, 0]).startswith(f"{path}: ")


@pytest.mark.timeout(20)
def test_annotations_in_a_pipe_are_refused(root: Path) -> None:
    annotation_file(root).unlink()
    os.mkfifo(annotation_file(root))
    assert "a pipe, not a file" in message_of(lambda: build_coco(root, "val", PLAIN))


def test_links_within_the_data_folder_and_a_linked_image_folder_are_followed(root: Path) -> None:
    moved = root.parent / "elsewhere"
    (root / "val2017").rename(moved)
    (root / "val2017").symlink_to(moved)
    (moved / "a.jpg").rename(root / "kept.jpg")
    (moved / "a.jpg").symlink_to(root / "kept.jpg")
    assert build_coco(root, "val", PLAIN)[0, 0][0].shape == (3, 20, 30)


def png_header(width: int, height: int) -> bytes:
    """A PNG of that size that holds a few bytes of zeros."""
    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(100))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


GHOST = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 30 20\n(x) (w) file\n%%EOF\n"


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (png_header(60_000, 60_000), "cannot be read"),
        (png_header(9500, 9500), "more than fit"),
        (png_header(70_000, 1), "more than fit"),
        (png_header(30, 20), "cannot be read"),
        (GHOST, "cannot identify"),
        (b"GIF89a\x1e\x00\x14\x00\x00\x00\x00;", "cannot identify"),
        (b"P6 30 20 255\n" + b"x" * 100, "cannot be read"),
        (b"II*\x00\x08\x00\x00\x00" + b"\xff" * 64, "cannot"),
        (b"RIFF\x00\x00\x00\x00WEBPVP8 " + b"\xff" * 64, "cannot"),
        (b"BM" + b"\xff" * 64, "cannot"),
    ],
)  # fmt: skip
def test_images_that_are_bombs_or_of_other_formats_are_refused(root: Path, content: bytes, expected: str) -> None:
    (root / "val2017" / "a.jpg").write_bytes(content)
    message = message_of(lambda: build_coco(root, "val", PLAIN)[0, 0])
    assert expected in message
    assert message.startswith(str(root / "val2017" / "a.jpg"))


def test_a_sliver_of_an_image_is_not_blown_up(root: Path) -> None:
    """Before a crop the published recipe sets the short side to 400 or more, whatever the long side becomes."""
    Image.new("RGB", (60_000, 2)).save(root / "val2017" / "a.jpg", format="PNG")
    sections = valid_sections()
    sections["images"][0].update(width=60_000, height=2)
    write_sections(root, sections)
    dataset = build_coco(root, "val", train_transform([32], 64, [600], (20, 30)))
    for epoch in range(6):
        image, _ = dataset[epoch, 0]
        assert image.numel() < 3 * 64 * 60_000


def write_yolo(root: Path, **content: Any) -> Path:
    root.mkdir()
    for folder in ("images/val", "labels/val"):
        (root / folder).mkdir(parents=True)
    Image.new("RGB", (30, 20)).save(root / "images" / "val" / "a.jpg")
    (root / "labels" / "val" / "a.txt").write_text("0 0.5 0.5 0.5 0.5\n")
    (root / "data.yaml").write_text(yaml.safe_dump({"names": ["cat"], "val": "images/val", **content}))
    return root


@pytest.mark.parametrize("entry", ["..", "/", "../private", "images/val/../../../private", "list.txt"])
def test_a_yolo_file_reads_nothing_outside_its_folder(tmp_path: Path, entry: str) -> None:
    root = write_yolo(tmp_path / "data", val=entry)
    (tmp_path / "private").mkdir()
    Image.new("RGB", (30, 20)).save(tmp_path / "private" / "p.jpg")
    (root / "list.txt").write_text("images/val/a.jpg\n../private/p.jpg\n")
    assert "outside" in message_of(lambda: build_coco(root, "val", PLAIN))


@pytest.mark.timeout(20)
@pytest.mark.parametrize("place", ["images/val/a.jpg", "labels/val/a.txt", "data.yaml"])
def test_pipes_in_a_yolo_folder_are_refused(tmp_path: Path, place: str) -> None:
    root = write_yolo(tmp_path / "data")
    (root / place).unlink()
    os.mkfifo(root / place)
    argument = root / "data.yaml" if place == "data.yaml" else root
    assert "a pipe, not a file" in message_of(lambda: build_coco(argument, "val", PLAIN))


LAUGHS = "a: &a [x, x]\n" + "".join(f"{b}: &{b} [*{a}, *{a}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (LAUGHS, "alias"),
        (nested(50_000), "nested too deeply"),
        ("{a: " * 5000, "nested too deeply"),
        ("lr: !!python/object/apply:os.system [touch hacked]\n", "not valid YAML"),
        ("lr: !!python/name:os.system\n", "not valid YAML"),
        ("!!python/module:hacked\n", "not valid YAML"),
        (f"lr: {'9' * 5000}\n", "not valid YAML"),
        ("lr: !!int ''\n", "not valid YAML"),
        ("lr: !!timestamp x\n", "not valid YAML"),
        ("lr: 2020-13-45\n", "not valid YAML"),
        ("output_dir: x\n" + "#" * 2**19, "bytes are more than"),
        ("config: /etc/hostname\n", "no field"),
        ("__path__: x\n", "no field"),
        ("1: 2\n", "no field"),
        (f"? {'x' * 10**5}\n: 2\n", "no field"),
        (f"seed: {'9' * 400}\n", "64 bits"),
        ('output_dir: "a\\0b"\n', "no line breaks"),
        ("lr: " + nested(60) + "\n", "lr"),
        (f"enact: {'x' * 10**5}\n", "enact"),
    ],
)  # fmt: skip
def test_a_hostile_config_is_one_short_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, expected: str
) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    message = message_of(lambda: parse_args(["--config", str(file)]))
    assert expected in message
    assert len(message) < 1200
    assert [path.name for path in tmp_path.iterdir()] == ["mine.yaml"]


@pytest.mark.timeout(20)
def test_a_config_in_a_pipe_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "mine.yaml")
    assert "a pipe, not a file" in message_of(lambda: parse_args(["--config", str(tmp_path / "mine.yaml")]))
