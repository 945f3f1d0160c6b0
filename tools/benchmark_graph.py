"""Autograd's backward pass in Python, for tensors without data.

torch's own engine asks the CUDA driver for a stream before it starts, and so cannot run where tensors merely pretend to
be on a GPU. This one goes through the same graph in the same order, and frees what each step has used.
"""

from __future__ import annotations

import contextlib
import heapq
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import saved_tensors_hooks

Node = Any  # torch.autograd.graph.Node; its members below are not in the type stubs
Gradient = Tensor | None


@contextlib.contextmanager
def backward_in_python() -> Iterator[None]:
    """Let `torch.autograd.backward` and `Tensor.backward` go by the graph of what is computed inside the block."""
    shelf = _Shelf()
    replaced = (
        mock.patch.object(torch.autograd, "backward", shelf.backward),
        mock.patch.object(torch._C, "_current_graph_task_id", return_value=0),  # torch.utils.checkpoint asks for it
        saved_tensors_hooks(shelf.pack, shelf.unpack),
    )
    with contextlib.ExitStack() as stack:
        for context in replaced:
            stack.enter_context(context)
        yield


class _Shelf:
    """What the graph has saved for backward, so that it can be freed as torch's engine frees it: once used."""

    def __init__(self) -> None:
        self._saved: dict[int, Tensor] = {}
        self._next = 0
        self._used: list[int] = []

    def pack(self, tensor: Tensor) -> int:
        self._next += 1
        self._saved[self._next] = tensor
        return self._next

    def unpack(self, place: int) -> Tensor:
        self._used.append(place)
        return self._saved[place]

    def backward(self, tensors: Tensor, grad_tensors: Gradient = None, *_: object, **__: object) -> None:
        """As `torch.autograd.backward` for one tensor; all else is left at its default."""
        gradient = torch.ones_like(tensors) if grad_tensors is None else grad_tensors
        root = tensors.grad_fn
        waiting: dict[Node, list[Gradient]] = {root: [gradient]}
        missing = _incoming_edges(root)
        ready = [_latest_first(root)]
        with torch.no_grad():
            while ready:
                node = heapq.heappop(ready)[-1]
                for following, place, result in self._run(node, waiting.pop(node)):
                    _add(waiting.setdefault(following, [None] * len(following._input_metadata)), place, result)
                    missing[following] -= 1
                    if missing[following] == 0:
                        heapq.heappush(ready, _latest_first(following))

    def _run(self, node: Node, gradients: list[Gradient]) -> list[tuple[Node, int, Gradient]]:
        """The nodes that follow, which of their gradients this is, and the gradient."""
        if all(gradient is None for gradient in gradients):
            results: Any = [None] * len(node.next_functions)
        elif isinstance(node, BackwardCFunction):
            results = _backward_of_function(node, gradients)
        else:
            results = node(*gradients)
        for place in self._used:
            self._saved.pop(place, None)
        self._used.clear()
        results = results if isinstance(results, (tuple, list)) else [results]
        edges = zip(node.next_functions, results, strict=False)  # a leaf has neither
        return [
            (following, place, _fitting(result, following._input_metadata[place]))
            for (following, place), result in edges
            if following is not None
        ]


def _backward_of_function(node: Node, gradients: list[Gradient]) -> Any:
    """Of a `torch.autograd.Function`, which gets zeros for what has no gradient."""
    wanted = zip(gradients, node._input_metadata, strict=True)
    return node.apply(*(
        torch.zeros(of.shape, dtype=of.dtype, device=of.device) if gradient is None else gradient
        for gradient, of in wanted
    ))


def _latest_first(node: Node) -> tuple[int, int, Node]:
    """What was computed last comes first; a leaf, which frees a gradient, before all."""
    return -node._sequence_nr(), id(node), node


def _incoming_edges(root: Node) -> dict[Node, int]:
    """How many gradients each node of the graph waits for."""
    counts: dict[Node, int] = {}
    found, stack = {root}, [root]
    while stack:
        for node, _ in stack.pop().next_functions:
            if node is None:
                continue
            counts[node] = counts.get(node, 0) + 1
            if node not in found:
                found.add(node)
                stack.append(node)
    return counts


def _add(gradients: list[Gradient], place: int, gradient: Gradient) -> None:
    before = gradients[place]
    gradients[place] = gradient if before is None else before if gradient is None else before + gradient


def _fitting(gradient: Gradient, wanted: Any) -> Gradient:
    """A gradient in the shape and dtype of what it belongs to, as the engine sees to."""
    if gradient is None:
        return None
    if list(gradient.shape) != list(wanted.shape):
        gradient = gradient.sum_to_size(wanted.shape)
    return gradient if gradient.dtype == wanted.dtype else gradient.to(wanted.dtype)
