"""Checkpoints as an attacker would craft them: refused in one line before torch reads them."""

from __future__ import annotations

import argparse
import io
import os
import pickle
import random
import tarfile
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from util.archives import LARGEST_PICKLE, demand_plain_archive
from util.errors import InputError


def message_of(path: Path) -> str:
    with pytest.raises(InputError) as caught:
        demand_plain_archive(path)
    message = str(caught.value)
    assert message.startswith(f"{path}")
    assert message.isprintable()
    assert len(message) < 600
    return message


def everything() -> dict[str, Any]:
    """What checkpoints of ours and published ones hold."""
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.rand(5, 3)).sum().backward()
    optimizer.step()
    tensors = {"empty": torch.zeros(0, 3), "turned": torch.rand(3, 4).T, "half": torch.zeros(3, dtype=torch.bfloat16)}
    tensors |= {"part": torch.rand(9)[3:7], "flag": torch.tensor(True), "parameter": nn.Parameter(torch.rand(2))}
    plain = {"none": None, "large": 2**70, "negative": -5, "text": "é", "bytes": b"ab", "set": {1}, "pair": (1, (2.0,))}
    return {
        "model": model.state_dict(), "optimizer": optimizer.state_dict(), "args": argparse.Namespace(lr=1.0, sides=[1]),
        "random": random.getstate(), "torch": torch.get_rng_state(), "ordered": OrderedDict(a=1), **tensors, **plain,
    }  # fmt: skip


@pytest.mark.parametrize("zipped", [True, False])
def test_what_torch_saves_passes(tmp_path: Path, zipped: bool) -> None:
    path = tmp_path / "a.pth"
    torch.save(everything(), path, _use_new_zipfile_serialization=zipped)
    demand_plain_archive(path)


def test_a_long_run_passes(tmp_path: Path) -> None:
    records = [{f"train_loss_{key}": random.random() for key in range(60)} for _ in range(500)]
    model = {f"layer.{key}": torch.rand(2) for key in range(3000)}
    torch.save({"model": model, "records": records}, tmp_path / "a.pth")
    demand_plain_archive(tmp_path / "a.pth")


def rewrite(path: Path, change: Callable[[str, bytes], bytes], compression: int = zipfile.ZIP_STORED) -> Path:
    """A copy of an archive with other entries."""
    copy = path.with_name("copy.pth")
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(copy, "w", compression) as target:
        for entry in source.infolist():
            target.writestr(entry.filename, change(entry.filename, source.read(entry)))
    return copy


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "a.pth"
    torch.save({"model": {"weight": torch.arange(120.0)}}, path)
    return path


def with_pickle(path: Path, change: Callable[[bytes], bytes]) -> Path:
    return rewrite(path, lambda name, data: change(data) if name.endswith("data.pkl") else data)


def test_a_decompression_bomb_is_not_unpacked(saved: Path) -> None:
    bomb = rewrite(saved, lambda name, data: bytes(10**8) if "/data/" in name else data, zipfile.ZIP_DEFLATED)
    assert bomb.stat().st_size < 10**6
    assert "is compressed" in message_of(bomb)


def test_entries_that_share_bytes_are_refused(saved: Path) -> None:
    """The central directory points from many names to the same bytes."""
    whole = saved.read_bytes()
    with zipfile.ZipFile(saved) as archive:
        largest = max(archive.infolist(), key=lambda entry: entry.file_size)
        start = archive.start_dir
        entries = archive.infolist()
    target = io.BytesIO(whole[:start])
    with zipfile.ZipFile(target, "w") as archive:
        archive.start_dir = start
        for entry in entries:
            archive.filelist.append(entry)
        for number in range(1000):
            other = zipfile.ZipInfo(f"a/data/{number + 5}")
            for name in ("header_offset", "file_size", "compress_size", "CRC"):
                setattr(other, name, getattr(largest, name))
            archive.filelist.append(other)
        archive._didModify = True
    copy = saved.with_name("copy.pth")
    copy.write_bytes(target.getvalue())
    assert "overlap" in message_of(copy)


def test_an_entry_that_occurs_twice_is_refused(saved: Path) -> None:
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(saved, "a") as archive:
        archive.writestr("a/data.pkl", b"other")
    assert "occurs twice" in message_of(saved)


def test_a_storage_must_have_the_numbers_that_it_is_said_to_have(saved: Path) -> None:
    grown = with_pickle(saved, lambda data: data.replace(b"cpuq\x08Kx", b"cpuq\x08J\x00\x00\x00\x40"))
    assert "should have 1073741824 elements, and has 480 bytes" in message_of(grown)
    missing = rewrite(saved, lambda name, data: data[:40] if name.endswith("/data/0") else data)
    assert "has 40 bytes" in message_of(missing)


class Rebuilt:
    """Pickles as a tensor with made-up offset, shape and strides."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments

    def __reduce__(self) -> Any:
        storage = torch.arange(120.0).untyped_storage()
        typed = torch.storage.TypedStorage(wrap_storage=storage, dtype=torch.float32, _internal=True)
        return torch._utils._rebuild_tensor_v2, (typed, *self.arguments, False, OrderedDict())


@pytest.mark.parametrize(
    "arguments",
    [
        (0, (10**9, 10**9), (0, 0)),
        (0, (2**40,), (1,)),
        (0, (121,), (1,)),
        (1, (120,), (1,)),
        (0, (2, 60), (2**61, 1)),
        (0, (2, 2), (2**70, 1)),
        (-1, (2,), (1,)),
        (119, (2,), (-1,)),
        (0, (-5,), (1,)),
        (0, (4, 4), (1,)),
    ],
)  # fmt: skip
def test_a_tensor_must_lie_within_its_storage(tmp_path: Path, arguments: tuple[Any, ...]) -> None:
    torch.save({"model": {"weight": Rebuilt(0, (120,), (1,))}}, tmp_path / "a.pth")
    demand_plain_archive(tmp_path / "a.pth")
    torch.save({"model": {"weight": Rebuilt(*arguments)}}, tmp_path / "a.pth")
    assert "a tensor" in message_of(tmp_path / "a.pth")


@pytest.mark.parametrize(
    "body",
    [
        b"}" + b")" + b"\x85" * 10**6 + b"K\x01s",  # a dict with a key whose hash ends the process
        b"]" * 10**5 + b"a" * (10**5 - 1),
        b"}" + b"K\x01}" * 10**5 + b"s" * 10**5,
    ],
)
def test_values_nested_too_deeply_are_refused(saved: Path, body: bytes) -> None:
    assert "nested deeper" in message_of(with_pickle(saved, lambda _: b"\x80\x02" + body + b"."))


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (b"\x96" + (2**62).to_bytes(8, "little"), "malformed"),  # a bytearray of that length
        (b"\x8d" + (2**62).to_bytes(8, "little") + b"a", "malformed"),
        (b"\x8b\xff\xff\xff\x7f1", "malformed"),
        (b"\x82\x01", "EXT1"),
        (b"(ios\nsystem\n", "INST"),
        (b"\x8c\x02os\x8c\x06system\x93", "STACK_GLOBAL"),
        (b"}s", "malformed"),
        (b"\x85", "malformed"),
        (b"h\x09", "malformed"),
        (b"t", "malformed"),
        (b"K\x01Q", "malformed"),
        (b"P1\n", "PERSID"),
        (b"\xfe", "malformed"),
        (b"", "malformed"),
    ],
)
def test_pickles_that_torch_would_not_write_are_refused(saved: Path, body: bytes, expected: str) -> None:
    stop = b"" if body == b"" else b"."
    assert expected in message_of(with_pickle(saved, lambda _: b"\x80\x02" + body + stop))


def test_a_pickle_of_many_values_is_refused(saved: Path) -> None:
    assert "at most" in message_of(with_pickle(saved, lambda _: b"\x80\x02" + b"]" * LARGEST_PICKLE + b"."))


def test_the_old_form_may_not_claim_more_numbers_than_it_has(tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    torch.save({"model": {"weight": torch.arange(120.0)}}, path, _use_new_zipfile_serialization=False)
    data = path.read_bytes()
    assert data.count(b"Kx") == 2  # of the storage, and of the tensor
    path.write_bytes(data.replace(b"Kx", b"J\x00\x00\x00\x40", 1))
    assert "larger together than the file" in message_of(path)


def test_other_forms_are_refused(tmp_path: Path) -> None:
    """A tar archive, which torch would unpack to a folder; a bare pickle; a pipe."""
    archive = tmp_path / "a.tar"
    with tarfile.open(archive, "w") as file:
        file.addfile(tarfile.TarInfo("storages"))
    bare = tmp_path / "a.pkl"
    bare.write_bytes(pickle.dumps({"model": {}}))
    for path in (archive, bare):
        assert "no archive of torch's" in message_of(path)
    os.mkfifo(tmp_path / "pipe")
    assert "a pipe, not a file" in message_of(tmp_path / "pipe")
