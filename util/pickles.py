"""What a pickle of torch's would build, found without building anything: a machine that only counts.

`torch.load(weights_only=True)` runs no code of a file, but lets it nest tuples until Python's stack overflows, and
takes a file's word for the sizes of tensors. Here the opcodes that torch reads are followed with a stack of sizes and
depths.
"""

from __future__ import annotations

import io
import math
import pickletools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from util.errors import InputError

DEEPEST = 64
SCALARS = frozenset({
    "NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE",
    "SHORT_BINUNICODE", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES",
})  # fmt: skip
VALUES = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
CONTAINERS = frozenset({"EMPTY_DICT", "EMPTY_LIST", "EMPTY_SET"})
TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
TAKEN = {"APPEND": 1, "SETITEM": 2, "BUILD": 1}  # by the object below them
TAKEN_TO_MARK = frozenset({"APPENDS", "SETITEMS", "ADDITEMS"})
REBUILD = ("torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_tensor")


@dataclass
class Item:
    """Something on the stack: a scalar's value, the items of a tuple, or nothing; and how deep it is nested."""

    value: Any = None
    depth: int = 0


def demand_plain(data: bytes, number: int, demand_storage: Callable[[str, str, int], None]) -> None:
    """Follow the first `number` pickles of `data`.

    Args:
        demand_storage: is told the kind, key and number of elements of each storage, and raises if it cannot be.

    Raises:
        InputError: an opcode that a checkpoint has no use for, too deep a nesting, a tensor that is larger than its
            storage, or a pickle that is malformed.
    """
    stream = io.BytesIO(data)
    try:
        for _ in range(number):
            machine = _Machine(demand_storage)
            for opcode, argument, _ in pickletools.genops(stream):
                machine.step(opcode.name, argument)
    except InputError:
        raise
    except Exception as error:  # what genops raises depends on the damage; an empty stack is an IndexError
        raise InputError(f"its pickle is malformed ({str(error)[:100] or type(error).__name__})") from None


class _Machine:
    def __init__(self, demand_storage: Callable[[str, str, int], None]) -> None:
        self.stack: list[Item] = []
        self.marks: list[int] = []
        self.memo: dict[int, Item] = {}
        self.demand_storage = demand_storage

    def step(self, name: str, argument: Any) -> None:
        """Follow one opcode."""
        if name in SCALARS:
            self.stack.append(Item(VALUES.get(name, argument)))
        elif name in ("BINPUT", "LONG_BINPUT"):
            self.memo[argument] = self.stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            self.stack.append(self.memo[argument])
        elif name == "GLOBAL":
            self.stack.append(Item(argument))
        elif name in CONTAINERS:
            self.stack.append(Item())
        elif name == "MARK":
            self.marks.append(len(self.stack))
        elif name in TUPLES or name == "TUPLE":
            self._tuple(self._take(TUPLES[name]) if name in TUPLES else self._take_to_mark())
        elif name in TAKEN or name in TAKEN_TO_MARK:
            self._put_into_top(self._take(TAKEN[name]) if name in TAKEN else self._take_to_mark())
        elif name in ("REDUCE", "NEWOBJ"):
            self._call(*self._take(2))
        elif name == "BINPERSID":
            self._storage(*self._take(1))
        elif name not in ("PROTO", "STOP"):
            raise InputError(f"its pickle has the opcode {name}, which a checkpoint has no use for")

    def _take(self, count: int) -> list[Item]:
        if count > len(self.stack):
            raise IndexError("the stack is empty")
        taken = self.stack[len(self.stack) - count :]
        del self.stack[len(self.stack) - count :]
        return taken

    def _take_to_mark(self) -> list[Item]:
        return self._take(len(self.stack) - self.marks.pop())

    def _tuple(self, items: list[Item]) -> None:
        self.stack.append(Item(tuple(items), _deeper(items)))

    def _put_into_top(self, items: list[Item]) -> None:
        top = self.stack[-1]
        top.depth = max(top.depth, _deeper(items))

    def _call(self, function: Item, arguments: Item) -> None:
        if function.value in REBUILD:
            _demand_within_storage(arguments)
        self.stack.append(Item(None, _deeper([function, arguments])))

    def _storage(self, identity: Item) -> None:
        _, kind, key, _, numel, *_ = (item.value for item in identity.value)
        if not isinstance(numel, int) or numel < 0:
            raise InputError(f"its storage {str(key)[:20]} has {str(numel)[:20]} elements")
        self.demand_storage(str(kind), str(key)[:20], numel)
        self.stack.append(Item(numel))


def _deeper(items: list[Item]) -> int:
    depth = 1 + max((item.depth for item in items), default=0)
    if depth > DEEPEST:
        raise InputError(f"its values are nested deeper than {DEEPEST} levels")
    return depth


def _demand_within_storage(arguments: Item) -> None:
    """The elements of a tensor must be different ones, all within its storage."""
    storage, offset, size, stride = (item.value for item in arguments.value[:4])
    sizes, strides = [item.value for item in size], [item.value for item in stride]
    whole = [offset, *sizes, *strides]
    if len(sizes) != len(strides) or not all(isinstance(value, int) and 0 <= value < 2**62 for value in whole):
        raise InputError(f"a tensor has the shape {str(sizes)[:80]} and the strides {str(strides)[:80]}")
    last = offset + sum((side - 1) * step for side, step in zip(sizes, strides, strict=True))
    count = math.prod(sizes)
    if count and (count > storage or last >= storage):
        raise InputError(f"a tensor of shape {str(sizes)[:80]} is larger than its storage of {storage} elements")
