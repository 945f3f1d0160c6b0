"""What the benchmark's clock and its count of bytes say, beside what is known by hand."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close
from tqdm import tqdm

from tools.benchmark_measure import (
    KINDS,
    OTHER_KIND,
    KeptBytes,
    Subject,
    attempt,
    matrix_product,
    measure,
    memory_limit,
    peak_bytes,
    seconds_of,
    summary,
    time_shares,
)

CPU = torch.device("cpu")
FLOAT = 4  # bytes
MIB = 2**20


def test_a_linear_layer_keeps_its_input() -> None:
    layer, x = nn.Linear(8, 32), torch.randn(100, 8)
    with KeptBytes(layer) as kept:
        loss = layer(x).sum()
    assert kept.now == kept.peak == 100 * 8 * FLOAT  # not the weight, which is there anyway
    loss.backward()
    assert (kept.now, kept.peak) == (0, 100 * 8 * FLOAT)


def test_a_tensor_that_several_operations_keep_counts_once() -> None:
    x = torch.randn(100, 8, requires_grad=True)
    with KeptBytes(nn.Identity()) as kept:
        y = x.exp()  # keeps its result
        loss = (y * y[:, :4].repeat(1, 2) + F.relu(y.view(8, 100)).view(100, 8)).sum()
    copies = 3  # y with its views; what repeat made; the result of relu
    assert kept.peak == copies * 100 * 8 * FLOAT
    loss.backward()
    assert kept.now == 0


@pytest.mark.parametrize(
    ("step", "kind"),
    [
        (lambda x: x @ x, "matrix products"),
        (lambda x: x.addmm_(x, x), "matrix products"),
        (lambda x: F.scaled_dot_product_attention(x[None], x[None], x[None]), "fused attention"),
        (lambda x: x.softmax(-1), "softmax"),
        (lambda x: x.uniform_(), "random draws"),
        (lambda x: torch.cat([x, x]), "copies"),
        (lambda x: x.erfinv(), OTHER_KIND),
    ],
)
def test_time_goes_to_the_kind_of_operation_that_took_it(step: Callable[[Tensor], Tensor], kind: str) -> None:
    x = torch.rand(512, 512)
    shares = time_shares(lambda: step(x), CPU)
    assert list(shares) == [*KINDS, OTHER_KIND]
    assert sum(shares.values()) == pytest.approx(1)
    assert max(shares, key=lambda name: shares[name]) == kind


def test_the_peak_is_that_of_the_worst_moment() -> None:
    weight = nn.Parameter(torch.randn(8))
    with KeptBytes(nn.ParameterList([weight])) as kept:
        for rows in (100, 300, 200):
            (torch.randn(rows, 8) * weight).sum().backward()
    assert kept.now == 0
    assert kept.peak == 300 * 8 * FLOAT


def test_kept_bytes_equal_a_walk_over_the_graph() -> None:
    """All that autograd holds, found through the graph's nodes rather than on the way."""
    first = nn.Linear(8, 16), nn.GELU(), nn.LayerNorm(16)
    model = nn.Sequential(*first, nn.Dropout(0.5), nn.Linear(16, 4), nn.Softmax(1))
    x = torch.randn(50, 8)
    with KeptBytes(model) as kept:
        model(x).square().sum()
    found = model(x).square().sum()
    storages: dict[int, int] = {}
    stack, seen = [found.grad_fn], set()
    while stack:
        node: Any = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        stack += [following for following, _ in node.next_functions]
        for name in (name for name in dir(node) if name.startswith("_saved_")):
            value = getattr(node, name)
            if isinstance(value, Tensor):
                storages[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
    for parameter in model.parameters():
        storages.pop(parameter.untyped_storage().data_ptr(), None)
    assert kept.peak == sum(storages.values())


def test_kept_bytes_change_no_gradient() -> None:
    model, x = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 1)), torch.randn(5, 8)
    model(x).sum().backward()
    expected = [parameter.grad for parameter in model.parameters()]
    model.zero_grad()
    peak_bytes(lambda: model(x).sum().backward(), CPU, model, others=0)
    assert_close([parameter.grad for parameter in model.parameters()], expected, atol=0, rtol=0)


def test_seconds_are_those_of_the_step() -> None:
    assert 0.02 <= seconds_of(lambda: time.sleep(0.02), CPU) < 0.5


def test_summary_is_the_median_and_the_spread() -> None:
    assert summary([3.0, 9.0, 1.0, 2.0]) == {"median": 2.5, "lowest": 1.0, "highest": 9.0, "runs": [3.0, 9.0, 1.0, 2.0]}


def test_product_counts_its_operations() -> None:
    assert matrix_product(CPU, torch.float32, 16).facts == {"operations": 16 * 16 * (16 + 16)}


def bar() -> tqdm[Any]:
    return tqdm(disable=True)


def test_cells_take_turns_and_never_follow_the_same_cell() -> None:
    calls: list[str] = []

    def build(cell: str) -> Subject:
        return Subject({"step": lambda: calls.append(cell)}, {"name": cell})

    results = measure(["a", "b", "c"], build, CPU, 3, bar())
    assert "".join(calls) == "aabbcc" + "abc" + "bca" + "cab"  # warm-up, then rounds
    assert [results[cell]["name"] for cell in "abc"] == ["a", "b", "c"]
    assert all(len(results[cell]["step"]["runs"]) == 3 for cell in "abc")


def out_of_memory() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")


def no_memory() -> None:
    raise RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory: you tried ...")


def bad_alloc() -> None:
    raise RuntimeError("std::bad_alloc")


def python_memory() -> None:
    raise MemoryError


@pytest.mark.parametrize("fails", [out_of_memory, no_memory, bad_alloc, python_memory])
def test_every_kind_of_out_of_memory_is_a_reason(fails: Callable[[], None]) -> None:
    assert attempt(fails).error == "out of memory"
    results = measure(["a", "b"], lambda cell: Subject({"step": fails if cell == "a" else int}), CPU, 2, bar())
    assert results["a"] == {"error": "out of memory"}
    assert results["b"]["error"] is None
    assert len(results["b"]["step"]["runs"]) == 2


def test_what_does_not_compile_is_a_reason() -> None:
    def step(x: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return x

    reason = attempt(lambda: torch.compile(step, fullgraph=True, backend="eager")(torch.ones(2))).error
    assert reason is not None
    assert reason.startswith("does not compile: ")
    assert "\n" not in reason


def test_an_error_of_ours_is_no_reason() -> None:
    with pytest.raises(RuntimeError, match="shape"):
        attempt(lambda: torch.ones(2).view(3))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux enforces it")
def test_more_than_the_limit_is_out_of_memory() -> None:
    with memory_limit(0.25, CPU):
        assert attempt(lambda: torch.zeros(64 * MIB)).error is None or pytest.fail("64 MiB x 4 is 0.25 GiB at most")
    with memory_limit(0.25, CPU):
        assert attempt(lambda: torch.zeros(128 * MIB)).error == "out of memory"
        assert attempt(lambda: torch.zeros(MIB)).error is None
    assert attempt(lambda: torch.zeros(128 * MIB)).error is None
