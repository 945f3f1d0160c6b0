"""Small parts that several detectors share."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

# Values that a CPU takes through several operations one after the other while its cache holds them.
CACHED = 2**18

# Tokens that a CPU takes through the backward pass of a feed-forward block together. The memory of a result of many
# megabytes is new to it each time, which costs up to a third of the product that fills it.
ROWS = 1024


def run_layer(layer: nn.Module, *inputs: Any, recompute: bool) -> Tensor:
    """layer(*inputs); to `recompute` is to keep nothing but the inputs for backward, which runs the layer again.

    With the same random draws, so that results and gradients are the same.
    """
    if recompute and torch.is_grad_enabled():
        result: Tensor = checkpoint(layer, *inputs, use_reentrant=False)
    else:
        result = layer(*inputs)
    return result


class MLP(nn.Module):
    """Linear layers with ReLU between them.

    Args:
        widths: channels of the input, of each hidden layer, and of the output.
    """

    def __init__(self, *widths: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(fan_in, fan_out) for fan_in, fan_out in pairwise(widths))

    def forward(self, x: Tensor) -> Tensor:
        """(..., widths[0]) -> (..., widths[-1])."""
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        result: Tensor = self.layers[-1](x)
        return result


def split_heads(tokens: Tensor, num_heads: int) -> Tensor:
    """(B, ..., heads * D) -> (B, heads, ..., D)."""
    heads: Tensor = tokens.view(*tokens.shape[:-1], num_heads, -1)
    return heads.movedim(-2, 1)


def xavier_matrices(*modules: nn.Module) -> None:
    """Xavier-uniform on every parameter with more than one dimension, as DETR's transformers start (spec 6.1)."""
    for module in modules:
        for parameter in module.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)


def start_at_anchors(class_embed: nn.Linear, bbox_embed: MLP, prior: float = 0.01, log_size: float = 0.0) -> None:
    """Start the heads of a detector with reference points: every class at `prior`, every box at its point (spec 6.2).

    Args:
        class_embed: the last layer of the class scores, for a sigmoid.
        bbox_embed: the box head.
        prior: first probability of each class.
        log_size: first width and height, before the sigmoid.
    """
    nn.init.constant_(class_embed.bias, math.log(prior / (1 - prior)))
    last = bbox_embed.layers[-1]
    assert isinstance(last, nn.Linear)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias[:2])
    nn.init.constant_(last.bias[2:], log_size)


def feature_pad_mask(pad_mask: Tensor, features: Tensor) -> Tensor:
    """The mask of a feature map's cells, by nearest interpolation.

    pad_mask (B, H, W) bool on any device, features (B, C, h, w) -> (B, h, w) bool on the device of the mask.
    """
    for axis, cells in ((1, features.shape[-2]), (2, features.shape[-1])):
        pixels = torch.arange(pad_mask.shape[axis], dtype=torch.float32, device=pad_mask.device)
        nearest = F.interpolate(pixels[None, None], size=cells)[0, 0].long()
        pad_mask = pad_mask.index_select(axis, nearest)
    return pad_mask


class Dropout(nn.Dropout):
    """`nn.Dropout` that keeps a byte a value for backward on a CPU too, where torch's own keeps four and is slow."""

    def forward(self, x: Tensor) -> Tensor:
        """Any shape."""
        return _drop(x, self.p if self.training else 0.0)


def _drop(x: Tensor, rate: float) -> Tensor:
    if rate == 0:
        return x
    dropped: Tensor = _Dropout.apply(x, rate) if _draws_itself(x) else torch.native_dropout(x, rate, True)[0]
    return dropped


def feed_forward(x: Tensor, linear1: nn.Linear, linear2: nn.Linear, dropout: nn.Dropout) -> Tensor:
    """linear2(dropout(relu(linear1(x)))), the feed-forward block of a transformer: (..., C) -> (..., C).

    Of what lies between the two, one tensor is kept for backward, the input of `linear2`.
    """
    rate = dropout.p if dropout.training else 0.0
    tokens = x.flatten(0, -2)
    plain, graph = _is_plain(linear1) and _is_plain(linear2), torch.is_grad_enabled()
    if torch.compiler.is_compiling() or not (plain and graph):
        hidden = F.relu(linear1(tokens), inplace=plain and not graph)
        result: Tensor = linear2(_drop(hidden, rate))
    else:
        tensors: tuple[Tensor | None, ...] = (tokens, linear1.weight, linear1.bias, linear2.weight, linear2.bias)
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
            tensors = tuple(None if tensor is None else tensor.to(dtype) for tensor in tensors)
        result = _FeedForward.apply(*tensors, rate)
    return result.view(x.shape)


def _is_plain(linear: nn.Module) -> bool:
    """Whether a call of it is nothing but `F.linear` of its parameters."""
    return type(linear) is nn.Linear and not (linear._forward_hooks or linear._forward_pre_hooks)


class _FeedForward(torch.autograd.Function):
    """Two linear layers with ReLU and dropout in place between them: what is 0 there was negative or dropped.

    What survives dropout is scaled by the products that follow, which costs nothing.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight1: Tensor, bias1: Tensor | None, weight2: Tensor, bias2: Tensor | None, rate: float
    ) -> Tensor:
        hidden = F.linear(x, weight1, bias1).relu_()
        ctx.scale, ctx.slope = 1.0, 1 / (1 - rate) if rate < 1 else 0.0
        if rate > 0 and _draws_itself(x):
            for part in torch.split(hidden.view(-1), CACHED):
                keep, ctx.scale = _draw(part, rate)
                part.mul_(keep)
            ctx.slope = ctx.scale
        elif rate > 0:
            hidden = torch.native_dropout(hidden, rate, True)[0]
        ctx.save_for_backward(x, hidden, weight1, weight2)
        return _product(hidden, weight2.t(), ctx.scale, bias2)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, hidden, weight1, weight2 = ctx.saved_tensors
        of_x, of_weight1, of_bias1, of_weight2, of_bias2, _ = ctx.needs_input_grad
        by_x = torch.empty_like(x) if of_x else None
        by_weight1 = torch.zeros_like(weight1) if of_weight1 else None
        by_bias1 = weight1.new_zeros(len(weight1)) if of_bias1 else None
        size = ROWS if x.device.type == "cpu" and x.dtype.itemsize >= 4 else max(len(x), 1)  # sums in half stay whole
        for first in range(0, len(x), size):
            rows = slice(first, first + size)
            of_hidden = _product(gradient[rows], weight2, ctx.slope)
            torch.ops.aten.threshold_backward.grad_input(of_hidden, hidden[rows], 0, grad_input=of_hidden)
            if by_x is not None:
                torch.mm(of_hidden, weight1, out=by_x[rows])
            if by_weight1 is not None:
                by_weight1.addmm_(of_hidden.t(), x[rows])
            if by_bias1 is not None:
                by_bias1 += of_hidden.sum(0)
        by_weight2 = _product(gradient.t(), hidden, ctx.scale) if of_weight2 else None
        return by_x, by_weight1, by_bias1, by_weight2, gradient.sum(0) if of_bias2 else None, None


def _product(left: Tensor, right: Tensor, scale: float, addend: Tensor | None = None) -> Tensor:
    """Left @ right * scale + addend."""
    if addend is None:
        return torch.addmm(left.new_empty(()), left, right, beta=0, alpha=scale)
    return torch.addmm(addend, left, right, alpha=scale)


class _Dropout(torch.autograd.Function):
    """dropout(x) with draws of our own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rate: float) -> Tensor:
        keep, ctx.scale = _draw(x, rate)
        ctx.save_for_backward(keep)
        result: Tensor = x * ctx.scale
        return result.mul_(keep)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (keep,) = ctx.saved_tensors
        result: Tensor = gradient * ctx.scale
        return result.mul_(keep), None


def _draws_itself(x: Tensor) -> bool:
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def _draw(x: Tensor, rate: float) -> tuple[Tensor, float]:
    """Which values to keep, in the shape of `x`, and what to multiply them by.

    On a CPU torch draws one number after the other, seven times as slow as four of 16 bits from each of 64: the rate
    becomes a multiple of 2 ** -16.
    """
    dropped = min(round(rate * 2**16), 2**16 - 1)
    words = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
    lanes = words.view(torch.int16)[: x.numel()].view(x.shape)
    keep = torch.empty(x.shape, dtype=torch.uint8)  # three to four times as fast as bool, made and multiplied by
    return torch.ge(lanes, dropped - 2**15, out=keep), 2**16 / (2**16 - dropped)


def collect_outputs(logits: Tensor, boxes: Tensor, aux_loss: bool) -> dict[str, Tensor | list[dict[str, Tensor]]]:
    """Predictions of every decoder layer -> the dictionary that a detector returns.

    Args:
        logits: (layers, B, Q, K).
        boxes: (layers, B, Q, 4) cxcywh in [0, 1].
        aux_loss: whether "aux_outputs" lists the earlier layers.
    """
    per_layer = [{"pred_logits": layer_logits, "pred_boxes": layer_boxes}
                 for layer_logits, layer_boxes in zip(logits, boxes, strict=True)]
    return {**per_layer[-1], "aux_outputs": per_layer[:-1] if aux_loss else []}


def inverse_sigmoid(p: Tensor, eps: float = 1e-5) -> Tensor:
    """log(p / (1 - p)) with p clamped to [0, 1] and both terms to at least `eps`."""
    p = p.clamp(0, 1)
    return torch.log(p.clamp(min=eps) / (1 - p).clamp(min=eps))


def boxes_around(points_xy: Tensor, offsets: Tensor) -> Tensor:
    """Boxes whose centres are offsets from reference points.

    Args:
        points_xy: (B, Q, 2) in [0, 1].
        offsets: (..., B, Q, 4) before the sigmoid.

    Returns:
        (..., B, Q, 4) cxcywh in [0, 1].
    """
    return (offsets + F.pad(inverse_sigmoid(points_xy), (0, 2))).sigmoid()
