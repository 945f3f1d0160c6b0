"""Checkpoint files of any origin: checked for what torch.load would take a file's word for."""

from __future__ import annotations

import re
import zipfile
from pathlib import Path

from util.errors import InputError
from util.files import regular_size
from util.pickles import demand_plain

ZIP_START = b"PK\x03\x04"
OLD_START = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # of torch.save before 1.6
OLD_PICKLES = 4  # this magic number, version, system, then the object; after those only raw numbers
LARGEST_PICKLE = 2**23  # bytes, without the tensors' numbers
MOST_ENTRIES = 1_000_000
BYTES_OF = {
    "Double": 8, "Long": 8, "ComplexFloat": 8, "ComplexDouble": 16, "Float": 4, "Int": 4, "QInt32": 4, "Half": 2,
    "BFloat16": 2, "Short": 2,
}  # fmt: skip


def demand_plain_archive(path: Path) -> None:
    """Let only files pass that `torch.load(weights_only=True)` reads within their own size.

    A zip archive must hold one pickle and the tensors' numbers, uncompressed and once each; every storage must be as
    large as it is said to be, every tensor lie in its storage, and nothing be nested too deeply. The form that torch
    wrote before 1.6 must claim no more numbers than the file has.

    Raises:
        InputError: the file is not such an archive; says why in one line.
        OSError: it cannot be read.
    """
    size = regular_size(path)
    with path.open("rb") as file:
        start = file.read(len(OLD_START))
    try:
        if start.startswith(ZIP_START):
            _demand_plain_zip(path, size)
        elif start == OLD_START:
            _demand_plain_old(path, size)
        else:
            raise InputError("it is no archive of torch's")
    except OSError:
        raise
    except Exception as error:  # zipfile raises many kinds, whatever the damage
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"{path} is not a checkpoint that can be read safely: {reason}") from None


def _demand_plain_zip(path: Path, size: int) -> None:
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        _demand_plain_entries(entries, size)
        pickles = [entry for entry in entries if re.fullmatch(r"[^/]+/data\.pkl", entry.filename)]
        if len(pickles) != 1 or pickles[0].file_size > LARGEST_PICKLE:
            raise InputError(f"it must hold one data.pkl of at most {LARGEST_PICKLE:,} bytes")
        data = archive.read(pickles[0])
    folder = pickles[0].filename.removesuffix("data.pkl")
    sizes = {entry.filename: entry.file_size for entry in entries}

    def demand_storage(kind: str, key: str, numel: int) -> None:
        found = sizes.get(f"{folder}data/{key}")
        if found is None or numel * _itemsize(kind) > found:
            raise InputError(f"its storage {key!r} should have {numel} elements, and has {found or 0} bytes")

    demand_plain(data, 1, demand_storage)


def _demand_plain_entries(entries: list[zipfile.ZipInfo], size: int) -> None:
    if len({entry.filename for entry in entries}) != len(entries) or len(entries) > MOST_ENTRIES:
        raise InputError("an entry of the archive occurs twice, or there are millions")
    for entry in entries:
        name = entry.filename[:80]
        if not 0 <= entry.header_offset < size:
            raise InputError(f"its entry {name!r} begins outside the file")
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size or entry.flag_bits & 1:
            raise InputError(f"its entry {name!r} is compressed or encrypted, which torch.save does not do")
        if entry.filename.startswith("/") or ".." in re.split(r"[/\\]", entry.filename):
            raise InputError(f"its entry {name!r} leads out of the archive")
    if sum(entry.file_size for entry in entries) > size:
        raise InputError("its entries overlap: they are larger together than the file")


def _demand_plain_old(path: Path, size: int) -> None:
    with path.open("rb") as file:
        data = file.read(LARGEST_PICKLE)
    total = 0
    seen: set[str] = set()

    def demand_storage(kind: str, key: str, numel: int) -> None:
        nonlocal total
        total += 0 if key in seen else numel * _itemsize(kind)
        seen.add(key)
        if total > size:
            raise InputError("its storages are larger together than the file")

    demand_plain(data, OLD_PICKLES, demand_storage)


def _itemsize(kind: str) -> int:
    """Bytes of an element of "torch FloatStorage"."""
    return BYTES_OF.get(kind.removeprefix("torch ").removesuffix("Storage"), 1)
