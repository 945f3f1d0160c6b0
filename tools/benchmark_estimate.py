"""The memory that training would need on a GPU, found without one.

A training step runs on fake tensors, which have shapes and a device but no data, while every allocation that it would
make on the GPU is counted. Counted are weights, gradients, the optimizer's state, activations, and what operations
return on the way, each storage once and rounded up as CUDA's allocator does: it is the figure that
`torch.cuda.max_memory_allocated` would give. Not counted: workspaces inside cuDNN, cuBLAS and the attention kernels,
what the allocator holds beyond that (fragmentation), and the CUDA context, about half a GiB.

What a program reads from the GPU is zero here: every cost of the matching is, so that objects are matched in order, as
many as there are. ENACT gets the clusters that its budget allows, as on a GPU, and as published chunks of
`TYPICAL_CHUNK` tokens.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from configs.schema import Config
from datasets import Batch
from tools.benchmark_arms import build_arm
from tools.benchmark_graph import backward_in_python
from tools.benchmark_subjects import TrainingStep

GPU = torch.device("cuda:0")
aten = torch.ops.aten
BLOCK = 512  # bytes; CUDA's allocator gives multiples of it
Arguments = Mapping[str, Any] | None


class Estimate:
    """Bytes on the pretended GPU.

    Attributes:
        now: held by tensors that live.
        peak: the most of them since the start, or since it was last set.
    """

    def __init__(self) -> None:
        self.now = self.peak = 0
        self._known: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def add(self, storage: torch.UntypedStorage) -> None:
        """Count a storage until it dies; a second time changes nothing."""
        if storage in self._known:
            return
        size = -(-storage.nbytes() // BLOCK) * BLOCK
        self._known.add(storage)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._remove, size)

    def _remove(self, size: int) -> None:
        self.now -= size


def estimate_training(config: Config, arm: str, batches: Sequence[Batch], precisions: Sequence[str]) -> list[list[int]]:
    """The peak memory in bytes of training steps after the first one, with everything that has to be there for it.

    Returns:
        For each precision the peak of each batch.
    """
    model = build_arm(config, arm)
    with pretended_gpu() as memory:
        step = TrainingStep(model.to(GPU), config, batches[0].to(GPU), amp=False)
        step()  # which makes the optimizer's state
        return [[_peak(step, batch, precision == "bf16", memory) for batch in batches] for precision in precisions]


def _peak(step: TrainingStep, batch: Batch, amp: bool, memory: Estimate) -> int:
    step.batch, step.amp = batch.to(GPU), amp
    memory.peak = memory.now
    step()
    return memory.peak


@contextlib.contextmanager
def pretended_gpu() -> Iterator[Estimate]:
    """A block in which `cuda` is a device that holds no data; tensors in host memory are real."""
    memory = Estimate()
    contexts: tuple[contextlib.AbstractContextManager[Any], ...] = (
        mock.patch.object(torch.cuda.amp.common, "amp_definitely_not_available", return_value=False),
        mock.patch.object(torch.cuda, "is_bf16_supported", return_value=True),
        FakeTensorMode(allow_non_fake_inputs=True),
        _Devices(memory),
        _FusedAttention(),
        backward_in_python(),
    )
    with contextlib.ExitStack() as stack:
        for context in contexts:
            stack.enter_context(context)
        yield memory


class _Devices(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Runs on fake tensors what belongs to the GPU, and for real what belongs to the host."""

    def __init__(self, memory: Estimate) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._memory = memory

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Arguments = None) -> Any:
        kwargs = kwargs or {}
        on_gpu = any(_is_on_gpu(leaf) for leaf in tree_leaves((args, kwargs)))
        device = kwargs.get("device")
        to_host = device is not None and torch.device(device).type == "cpu"
        if on_gpu and func is aten._local_scalar_dense.default:
            return 0
        if on_gpu and func is aten._to_copy.default and to_host:
            return _really(torch.zeros, args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        if not on_gpu and (device is None or to_host):
            return _really(func, *args, **kwargs)
        if func in (aten.index.Tensor, aten.index_put.default, aten.index_put_.default):
            args = [args[0], _without_masks(args[1]), *args[2:]]
        result = func(*args, **kwargs)
        for leaf in tree_leaves(result):
            if _is_on_gpu(leaf):
                self._memory.add(leaf.untyped_storage())
        return result


def _is_on_gpu(value: object) -> bool:
    return isinstance(value, FakeTensor) and value.device.type == GPU.type


def _really(func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    with unset_fake_temporarily():
        return func(*args, **kwargs)


def _without_masks(indices: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Indices with each mask replaced by what it means if it is True everywhere: an index for each of its axes."""
    plain: list[Tensor | None] = []
    for index in indices:
        if index is not None and index.dtype == torch.bool:
            plain += [index.new_empty(index.numel(), dtype=torch.int64)] * index.dim()
        else:
            plain.append(index)
    return plain


class _FusedAttention(TorchFunctionMode):
    """Gives attention the kernel that a GPU would: without one, torch would choose the plain form, with its maps."""

    def __torch_function__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Arguments = None) -> Any:
        if func is F.scaled_dot_product_attention:
            return _attend(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Flash attention in half precision without a mask, else the memory-efficient kernel, as torch chooses."""
    half = torch.is_autocast_enabled("cuda") or query.dtype in (torch.bfloat16, torch.float16)
    if half and attn_mask is None:
        flash = aten._scaled_dot_product_flash_attention
        return flash(query, key, value, dropout_p, is_causal, scale=scale)[0]  # type: ignore[no-any-return]
    bias = attn_mask
    if bias is not None:
        if bias.dtype == torch.bool:
            bias = torch.zeros_like(bias, dtype=query.dtype).masked_fill(~bias, float("-inf"))
        bias = bias.expand(*query.shape[:-1], key.shape[-2])
    efficient = aten._scaled_dot_product_efficient_attention
    keeps = any(tensor.requires_grad for tensor in (query, key, value))
    return efficient(query, key, value, bias, keeps, dropout_p, is_causal, scale=scale)[0]  # type: ignore[no-any-return]
