"""JSON files that may be of any origin: read within the machine's memory, or refused in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from util import memory
from util.errors import InputError
from util.files import regular_size

CHUNK = 1 << 20
# What one of each can at most add to memory: an object, a list, an entry of either; a digit or letter costs its own.
BYTES_OF = {b"{": 192, b"[": 88, b",": 40, b":": 64}
BYTES_OF_TEXT = 4  # the file's text, in which a character may take four, or two of them and the string
LARGEST_SHARE = 0.8  # of the machine's memory


def read_json(path: Path, unused: frozenset[str] = frozenset()) -> Any:
    """The content of a JSON file.

    Args:
        unused: keys that are left out of every object, to save memory.

    Raises:
        InputError: it is missing, no regular file, not JSON in UTF-8, nested too deeply, has an object with a key
            twice, or would take more than four fifths of the machine's memory.
    """
    try:
        regular_size(path)
        _demand_room(path)
        with path.open(encoding="utf-8") as file:
            return json.load(file, object_pairs_hook=lambda pairs: _object(pairs, unused))
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"{path}: file not found; check its path") from None
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise InputError(f"{path}: malformed JSON at {where} ({error.msg}); fetch or write the file again") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text (byte {error.start}); is this a JSON file?") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    except (RecursionError, MemoryError):
        raise InputError(f"{path}: nested too deeply, or too large for this machine's memory") from None
    except _RepeatedKeyError as error:
        raise InputError(f"{path}: an object has the key {error} twice; remove one of them") from None
    except ValueError:  # Python converts integers of up to 4300 digits
        raise InputError(f"{path}: an integer has thousands of digits; correct it") from None


class _RepeatedKeyError(Exception):
    """Readers differ in which of two values they take."""


def _object(pairs: list[tuple[str, Any]], unused: frozenset[str]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        keys = [key for key, _ in pairs]
        raise _RepeatedKeyError(repr(next(key for key in keys if keys.count(key) > 1)[:80]))
    for key in unused & content.keys():
        del content[key]
    return content


def most_memory(path: Path) -> int:
    """Bytes that parsing a JSON file can take at most, by its length and its brackets, commas and colons."""
    needed = 2**16
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            needed += BYTES_OF_TEXT * len(chunk) + sum(cost * chunk.count(mark) for mark, cost in BYTES_OF.items())
    return needed


def _demand_room(path: Path) -> None:
    needed = most_memory(path)
    available = int(memory.machine_bytes() * LARGEST_SHARE)
    if needed > available:
        raise InputError(
            f"{path}: reading it could take {needed / 2**30:.1f} GiB, more than four fifths of this machine's memory; "
            "split the file, or leave out what is not needed of it, such as segmentation"
        )
