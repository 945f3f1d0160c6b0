"""Valid annotation files and checkpoints, damaged at random: each is read, or refused in one line, in bounded time."""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import json
import logging
import random
import signal
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from test_datasets_errors import PLAIN

from datasets import CocoDetection
from datasets.annotations import problems, read_annotations
from datasets.check import oddities, quick_check
from datasets.json_files import read_json
from util import checkpoint
from util.archives import demand_plain_archive
from util.errors import InputError

LIMIT = 5.0  # seconds a case
NASTY: list[Any] = [
    None, True, -1, 0, 2**31, 2**63, -(2**63) - 1, 10**400, 1e308, float("nan"), float("inf"), 0.5, "", "x" * 5000,
    "\x00", "../../etc", "C:\\x", "\ud800", [], {}, [[[[]]]], {"id": {"id": 1}}, [1, 2, 3, 4], ["1", 2, 3, 4], "1",
]  # fmt: skip


class HangError(BaseException):
    """Not an Exception, so that nothing swallows it."""


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    def stop(*_: object) -> None:
        raise HangError

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def damaged_bytes(data: bytes, rng: random.Random) -> bytes:
    """Flipped, cut off, left out, repeated or random bytes."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8))):
        place, length = rng.randrange(len(changed) or 1), rng.choice((1, 2, 4, 40))
        kind = rng.randrange(6)
        if kind < 2 and changed:
            changed[place] = rng.choice((changed[place] ^ 1 << rng.randrange(8), 0, 255, rng.randrange(256)))
        elif kind == 2:
            del changed[place:]
        elif kind == 3:
            del changed[place : place + length]
        elif kind == 4:
            changed[place:place] = changed[place : place + length] * rng.choice((1, 3, 100))
        else:
            changed[place : place + length] = rng.randbytes(length)
    return bytes(changed)


def damaged_value(value: Any, rng: random.Random) -> Any:
    """Plain JSON with a few places changed: other values, entries left out, repeated, or under another key."""
    value = copy.deepcopy(value)
    for _ in range(rng.choice((1, 1, 2, 5))):
        parent, key = value, rng.choice(list(value))
        while isinstance(parent[key], (dict, list)) and parent[key] and rng.random() < 0.85:
            parent = parent[key]
            key = rng.choice(list(parent)) if isinstance(parent, dict) else rng.randrange(len(parent))
        kind = rng.randrange(5)
        if kind < 3 or not value:
            parent[key] = copy.deepcopy(rng.choice(NASTY))
        elif kind == 3:
            del parent[key]
        elif isinstance(parent, list):
            parent.append(copy.deepcopy(parent[key]))
        else:
            parent[rng.choice(("id", "image_id", "bbox", "x"))] = parent[key]
        if not value:
            break
    return value


def valid_annotations() -> dict[str, Any]:
    images = [{"id": key, "file_name": f"{key}.jpg", "width": 30, "height": 20} for key in range(1, 5)]
    annotations = [
        {"id": key, "image_id": 1 + key % 4, "category_id": 1 + key % 2, "bbox": [1, 2, 3.5, 4], "area": 14,
         "iscrowd": key % 3 == 0, "segmentation": [[1, 2, 3, 4, 5, 6]]}
        for key in range(1, 9)
    ]  # fmt: skip
    categories = [{"id": 1, "name": "cat"}, {"id": 2, "name": "d\u00f6g"}]
    return {"images": images, "annotations": annotations, "categories": categories, "info": {"year": 2026}}


def read_data(path: Path) -> bool:
    """Read annotations as a run does and as the check does; whether they are accepted."""
    try:
        content = read_json(path)
    except InputError as error:
        assert_one_line(error)
        return False
    wrong = list(problems(content))
    if not any(problem.kind == "not a COCO file" for problem in wrong):
        list(oddities(content))
    try:
        dataset = CocoDetection(path.parent, read_annotations(path), path, PLAIN)
    except InputError as error:
        assert_one_line(error)
        assert wrong
        return False
    assert not wrong
    quick_check(dataset, dataset)
    return True


def read_checkpoint(path: Path) -> bool:
    """Read a checkpoint as a run does; whether it is accepted."""
    try:
        demand_plain_archive(path)
        state = checkpoint.load(path)
    except InputError as error:
        assert_one_line(error)
        return False
    assert isinstance(state["model"], dict)
    return True


def assert_one_line(error: InputError) -> None:
    assert len(str(error).splitlines()) == 1
    assert len(str(error)) < 2000


def annotation_cases(rng: random.Random) -> bytes:
    content = valid_annotations()
    if rng.random() < 0.6:
        return json.dumps(damaged_value(content, rng)).encode()
    return damaged_bytes(json.dumps(content).encode(), rng)


def checkpoint_cases(valid: bytes, old: bytes, rng: random.Random) -> bytes:
    """The file damaged, or an entry of it in a whole archive."""
    if rng.random() < 0.5:
        return damaged_bytes(rng.choice((valid, old)), rng)
    target = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(valid)) as source, zipfile.ZipFile(target, "w") as archive:
        victim = rng.choice([*source.namelist(), *["a/data.pkl"] * 20])
        for name in source.namelist():
            data = source.read(name)
            archive.writestr(name, damaged_bytes(data, rng) if name == victim else data)
    return target.getvalue()


def checkpoint_bytes(zipped: bool, folder: Path) -> bytes:
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.rand(5, 3)).sum().backward()
    optimizer.step()
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "args": argparse.Namespace(lr=0.1),
             "records": [{"epoch": 0, "loss": 1.5}], "random": torch.get_rng_state()[:64].clone()}  # fmt: skip
    path = folder / "a.pth"
    torch.save(state, path, _use_new_zipfile_serialization=zipped)
    return path.read_bytes()


def fuzz(path: Path, count: int, make: Callable[[random.Random], bytes], read: Callable[[Path], bool]) -> int:
    """Read `count` cases; how many were accepted."""
    accepted = 0
    for case in range(count):
        data = make(random.Random(case))
        path.write_bytes(data)
        try:
            with time_limit(LIMIT):
                accepted += read(path)
        except BaseException as error:
            path.with_name(f"case{case}").write_bytes(data)
            raise AssertionError(f"case {case} of {path}") from error
    return accepted


@pytest.fixture(autouse=True)
def _quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL)


COUNTS = [200, pytest.param(5000, marks=pytest.mark.slow)]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("count", COUNTS)
def test_damaged_annotations_are_read_or_refused(tmp_path: Path, count: int) -> None:
    path = tmp_path / "instances.json"
    path.write_text(json.dumps(valid_annotations()))
    assert read_data(path)
    accepted = fuzz(path, count, annotation_cases, read_data)
    assert 0.02 * count < accepted < 0.5 * count  # neither is everything damaged, nor nothing


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("count", COUNTS)
def test_damaged_checkpoints_are_read_or_refused(tmp_path: Path, count: int) -> None:
    whole, old = (checkpoint_bytes(zipped, tmp_path) for zipped in (True, False))
    path = tmp_path / "checkpoint.pth"
    for data in (whole, old):
        path.write_bytes(data)
        assert read_checkpoint(path)
    accepted = fuzz(path, count, lambda rng: checkpoint_cases(whole, old, rng), read_checkpoint)
    assert 0.02 * count < accepted < 0.5 * count
