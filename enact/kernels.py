"""Attention by kernels that store no map: of a batch, and of sequences that stand one behind the other.

Shapes: B sequences, H heads, D channels a head; L queries and T keys of each, or S queries and R keys of all together.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _varlen_attn() -> Any:
    """Torch's attention of sequences of unequal lengths, or None. (That of torch 2.10 takes no scale.)"""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn if "scale" in inspect.signature(varlen_attn).parameters else None


VARLEN_ATTN = _varlen_attn()

# Channels a head that it takes at most; tokens of a trial, enough for the kernel that it chooses for many.
MOST_CHANNELS, TRIED_TOKENS = 256, 256

logger = logging.getLogger(__name__)


class DenseAttention(nn.MultiheadAttention):
    """`nn.MultiheadAttention` that also takes images one behind the other: what ENACT is to be measured against.

    Args:
        embed_dim, num_heads, dropout, batch_first, device, dtype: as in `nn.MultiheadAttention`.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        *,
        batch_first: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(embed_dim, num_heads, dropout, batch_first=batch_first, device=device, dtype=dtype)

    def attend_packed(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        lengths: Sequence[int],
        slots: Tensor,
        position: Tensor | None = None,
    ) -> Tensor:
        """As `EnactAttention.attend_packed`: (S, C), (S, C), (S, C) -> (S, C)."""
        if position is not None:
            same = query is key
            query = query + position
            key = query if same else key + position
        weights, biases = self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3)
        heads = [
            F.linear(tokens, weight, bias).view(len(tokens), self.num_heads, -1)
            for tokens, weight, bias in zip((query, key, value), weights, biases, strict=True)
        ]
        dropout = self.dropout if self.training else 0.0
        starts = starts_of(lengths, query.device) if one_kernel(heads[0], dropout) else None
        return packed_attention(heads, None, lengths, lengths, starts, self.out_proj, dropout, self.head_dim**-0.5)


def biased_attention(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, dropout: float, scale: float
) -> Tensor:
    """softmax(scale * query key^T + bias) value.

    Args:
        query: (B, H, L, D).
        key: (B, H, T, D).
        value: (B, H, T, Dv), Dv at most the width of the keys.
        bias: (B, T), or None.
        dropout: rate on the weights.
        scale: of the products.

    Returns:
        (B, H, L, Dv).
    """
    width = value.shape[-1]
    bias = None if bias is None else bias[:, None, :, None]
    query, key, value = _with_bias(query, key, value, bias, scale)
    attended: Tensor = F.scaled_dot_product_attention(query, key, value, None, dropout, scale=scale)
    return attended[..., :width]


def packed_attention(
    heads: Sequence[Tensor],
    bias: Tensor | None,
    lengths: Sequence[int],
    counts: Sequence[int],
    starts: Tensor | None,
    output: Callable[[Tensor], Tensor],
    dropout: float,
    scale: float,
) -> Tensor:
    """`biased_attention` of each sequence to its own keys, and what becomes of the result.

    Args:
        heads: query (S, H, D), key (R, H, D) and value (R, H, Dv).
        bias: (R,), or None.
        lengths: queries of each sequence.
        counts: keys of each sequence.
        starts: (B + 1,) int32, where the keys of each sequence begin and the last ones end, for the one kernel that
            `one_kernel` promises; `counts` are then upper bounds. None: sequence by sequence.
        output: takes (n, H Dv), what queries found, to (n, C).
        dropout, scale: as in `biased_attention`; no dropout with `starts`.

    Returns:
        (S, C).
    """
    query, key, value = heads
    if starts is not None:
        width = value.shape[-1]
        query, key, value = _with_bias(query, key, value, None if bias is None else bias[:, None, None], scale)
        places = starts_of(lengths, query.device), starts, max(lengths), max(counts)
        attended = VARLEN_ATTN(query, key, value, *places, scale=scale)
        return output(attended[..., :width].flatten(1))
    images = zip(
        torch.split(query, list(lengths)),
        *(torch.split(tokens, list(counts)) for tokens in (key, value)),
        [None] * len(counts) if bias is None else torch.split(bias.unsqueeze(0), list(counts), 1),
        strict=True,
    )
    pieces = []
    for *image, image_bias in images:
        queries, keys, values = (tokens.transpose(0, 1).unsqueeze(0) for tokens in image)
        attended = biased_attention(queries, keys, values, image_bias, dropout, scale)
        # The output image by image: the kernel's result is kept for backward once, not in a second copy.
        pieces.append(output(attended.squeeze(0).transpose(0, 1).flatten(1)))
    return torch.cat(pieces)


def one_kernel(query: Tensor, dropout: float) -> bool:
    """Whether `packed_attention` of query (S, H, D) can do without a call for every sequence.

    With torch from 2.11 on, in half precision, where flash attention is enabled and runs: NVIDIA's GPUs from Ampere on.
    """
    channels = query.shape[-1]
    fits = query.device.type == "cuda" and query.dtype in (torch.float16, torch.bfloat16) and dropout == 0
    if not (VARLEN_ATTN is not None and fits and channels % 8 == 0 and channels + 8 <= MOST_CHANNELS):
        return False
    enabled: bool = torch.backends.cuda.flash_sdp_enabled()  # type: ignore[no-untyped-call]
    return enabled and _kernel_runs(query.device, query.dtype)


@functools.cache
def _kernel_runs(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernel runs on a device: builds of torch lack it, and so do older GPUs. Tried once."""
    tokens = torch.zeros(TRIED_TOKENS, 1, 32, device=device, dtype=dtype)
    starts = starts_of((TRIED_TOKENS,), device)
    try:
        VARLEN_ATTN(tokens, tokens, tokens, starts, starts, TRIED_TOKENS, TRIED_TOKENS, scale=1.0)
    except RuntimeError as error:
        logger.info("attention runs image by image, since torch's varlen_attn does not run here: %s", error)
        return False
    return True


def starts_of(lengths: Sequence[int], device: torch.device) -> Tensor:
    """Where sequences begin that stand one behind the other, and the last one ends: (B + 1,) int32."""
    starts = torch.tensor(list(accumulate(lengths, initial=0)), dtype=torch.int32)
    return starts.to(device, non_blocking=True)


def _with_bias(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value whose plain attention is the biased one; their last dimension is that of the channels.

    The bias, which broadcasts with the keys, is a channel of theirs, which the queries meet with a 1: a mask would shut
    out the fastest kernels, and one that needs a gradient all of them. Values are padded, since those kernels want one
    width.
    """
    width = value.shape[-1]
    if bias is not None:
        unit = 1 if query.device.type == "cpu" else 8  # the GPU kernels want widths that 8 divides
        spare = (unit - query.shape[-1] - 1) % unit
        channel = (bias / scale).to(key.dtype).expand(*key.shape[:-1], 1)
        query = F.pad(F.pad(query, (0, 1), value=1.0), (0, spare))
        key = F.pad(torch.cat([key, channel], -1), (0, spare))
    return query, key, F.pad(value, (0, key.shape[-1] - width))
