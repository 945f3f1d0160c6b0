"""What a detector's encoder does with one image, layer by layer; `clusters_plot` draws it.

    explanation = explain(model, image, build_postprocessor("detr"))
    explanation.layers[0].clusters.num_clusters

Shapes: h x w cells of the feature map, N = h * w tokens, T clusters, P chosen points, H heads, C channels.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torchvision.ops import box_convert, nms

import engine
from datasets import Batch
from enact import EnactAttention, EnactRowColumnAttention
from models.postprocess import Postprocessor
from models.row_column import RowColumnAttention
from util.errors import InputError

CLUSTERED = (EnactAttention, EnactRowColumnAttention)
ROW_COLUMN = (EnactRowColumnAttention, RowColumnAttention)
ATTENTIONS = (nn.MultiheadAttention, *ROW_COLUMN)
MOST_POINTS = 4  # of those that the detections suggest

Point = tuple[float, float]  # (x, y) in pixels
Size = tuple[int, int]  # (height, width) in pixels


@dataclass(frozen=True)
class ClusterView:
    """The clusters of a layer, and what they follow from.

    Args:
        index: (h, w) int64, the cluster of each token; T or more for a token that belongs to none.
        num_clusters: T.
        probability: (h, w), the learned probability of each token; they sum to 1.
        information: (h, w), the smoothed self-information of each token, in bits.
    """

    index: Tensor
    num_clusters: int
    probability: Tensor
    information: Tensor

    def sizes(self) -> Tensor:
        """The number of tokens in each cluster, (T,) int64."""
        counts: Tensor = self.index.flatten().bincount(minlength=self.num_clusters)
        return counts[: self.num_clusters]

    def unclustered(self) -> Tensor:
        """(h, w) bool, True for a token that belongs to no cluster."""
        return self.index >= self.num_clusters


@dataclass(frozen=True)
class LayerView:
    """One encoder layer.

    Args:
        attention: (P, h, w), the attention of the token at each point to every token, averaged over the heads. A
            token's share is its cluster's, times its weight in the cluster; it sums to 1, except in ENACT's
            "official" variant, whose weights do not.
        clusters: None in a dense layer.
    """

    attention: Tensor
    clusters: ClusterView | None


@dataclass(frozen=True)
class Explanation:
    """One image in a detector.

    Args:
        image: uint8 (3, H, W), as the model saw it.
        size: height and width of the picture that points and boxes are in pixels of.
        points: the P points whose attention is shown.
        detections: "scores", "labels" and "boxes" (xyxy) of the detections that count, best first.
        layers: of the encoder, first to last.
    """

    image: Tensor
    size: Size
    points: tuple[Point, ...]
    detections: dict[str, Tensor]
    layers: tuple[LayerView, ...]


def explain(
    model: nn.Module,
    image: Tensor,
    postprocess: Postprocessor,
    *,
    size: Size | None = None,
    points: Sequence[Point] = (),
    min_score: float = 0.5,
) -> Explanation:
    """Run a detector on one image and keep what its encoder's attention does.

    Args:
        model: from `build_model`; it is put into evaluation mode.
        image: uint8 (3, H, W), RGB, resized for the model.
        postprocess: from `build_postprocessor`.
        size: height and width of the picture before it was resized; None: those of `image`.
        points: whose attention is wanted. None given: the centres of the best detections, else the image's.
        min_score: detections below it do not count.

    Raises:
        InputError: a point lies outside the picture, or the encoder has no layers.
    """
    size = size or (image.shape[1], image.shape[2])
    demand_inside(points, size)
    outputs, record = _run(model, image)
    detections = _detections(postprocess(outputs, torch.tensor([size]))[0], min_score)
    chosen = tuple(points) or _suggested_points(detections, size)
    tokens = torch.tensor([record.grid.token_at(point, size) for point in chosen])
    layers = tuple(_layer_view(call, tokens, record.grid) for call in record.calls)
    return Explanation(image.cpu(), size, chosen, detections, layers)


def demand_inside(points: Sequence[Point], size: Size) -> None:
    """Refuse points that lie outside a picture (InputError)."""
    height, width = size
    for x, y in points:
        if not (0 <= x < width and 0 <= y < height):
            raise InputError(f"the point {x:g},{y:g} is outside the picture, which is {width} x {height} pixels")


class Grid(NamedTuple):
    """Which cell of the feature map a token stands for; nothing else knows the order of the encoder's tokens."""

    height: int
    width: int
    cells: Tensor  # (N,) int64: row * width + column of each token

    def to_map(self, per_token: Tensor) -> Tensor:
        """(..., N) -> (..., h, w), on the CPU."""
        values = per_token.detach().cpu()
        in_raster_order = torch.empty_like(values).index_copy(-1, self.cells, values)
        return in_raster_order.view(*values.shape[:-1], self.height, self.width)

    def token_at(self, point: Point, size: Size) -> int:
        """The token whose cell holds a point of a picture; the map covers the picture, and its cells are equal."""
        row, column = int(point[1] * self.height / size[0]), int(point[0] * self.width / size[1])
        return int((self.cells == row * self.width + column).nonzero())


class _Call(NamedTuple):
    """A call of an attention, of an image alone."""

    module: nn.Module
    inputs: tuple[Tensor, ...]
    keywords: dict[str, Any]

    def keys(self) -> Tensor:
        """What the clusters are made of: (1, N, C), or (1, h, w, C) in the row-column form."""
        return self.inputs[2 if isinstance(self.module, ROW_COLUMN) else 1]


@dataclass
class _Record:
    """What the encoder of a model was called with."""

    model: nn.Module
    calls: list[_Call] = field(default_factory=list)
    grid: Grid = field(init=False)

    def keep_call(self, module: nn.Module, inputs: tuple[Tensor, ...], keywords: dict[str, Any]) -> None:
        self.calls.append(_Call(module, inputs, keywords))

    def keep_grid(self, module: nn.Module, inputs: Any, features: Tensor) -> None:
        height, width = features.shape[-2:]
        self.grid = Grid(height, width, _cells_in_order(self.model, height, width))


@contextlib.contextmanager
def _recording(model: nn.Module) -> Iterator[_Record]:
    record, encoder = _Record(model), model.get_submodule("encoder")
    hooks = [model.get_submodule("backbone").register_forward_hook(record.keep_grid)]
    attentions = (module for module in encoder.modules() if isinstance(module, ATTENTIONS))
    hooks += [module.register_forward_pre_hook(record.keep_call, with_kwargs=True) for module in attentions]
    try:
        yield record
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def _run(model: nn.Module, image: Tensor) -> tuple[dict[str, Any], _Record]:
    batch = Batch(image.unsqueeze(0), torch.zeros(1, *image.shape[1:], dtype=torch.bool), [])
    model.eval()
    with _recording(model) as record:
        outputs = engine.forward(model, batch.to(next(model.parameters()).device), amp=False)
    if not record.calls:
        raise InputError("the model's encoder has no layers, so there is nothing to show")
    return outputs, record


def _cells_in_order(owner: nn.Module, height: int, width: int) -> Tensor:
    """The cells, numbered row by row, in the order in which a detector or a row-column attention runs through them.

    Returns:
        (height * width,) int64.
    """
    token_order = getattr(owner, "token_order", None)
    if token_order is None or not getattr(owner, "skip_padding", True):
        return torch.arange(height * width)
    places: Tensor = token_order(height, width, torch.device("cpu"))
    return places.argsort()


def _detections(found: dict[str, Tensor], min_score: float) -> dict[str, Tensor]:
    best_first = found["scores"].argsort(descending=True)
    kept = best_first[found["scores"][best_first] >= min_score]
    return {name: values[kept].cpu() for name, values in found.items()}


def _suggested_points(detections: dict[str, Tensor], size: Size) -> tuple[Point, ...]:
    """The centres of the best boxes that overlap no better one much; the picture's centre if there is no box."""
    height, width = size
    best = nms(detections["boxes"], detections["scores"], iou_threshold=0.3)[:MOST_POINTS]
    centres = box_convert(detections["boxes"][best], "xyxy", "cxcywh").tolist()
    inside = ((min(max(x, 0.0), width - 0.5), min(max(y, 0.0), height - 0.5)) for x, y, _, _ in centres)
    return tuple(inside) or ((width / 2, height / 2),)


def _layer_view(call: _Call, tokens: Tensor, grid: Grid) -> LayerView:
    attention = _row_column_attention if isinstance(call.module, ROW_COLUMN) else _attention
    clusters = _cluster_view(call, grid) if isinstance(call.module, CLUSTERED) else None
    return LayerView(grid.to_map(attention(call, tokens)), clusters)


@torch.no_grad()
def _cluster_view(call: _Call, grid: Grid) -> ClusterView:
    module, keys = call.module, call.keys()
    assert isinstance(module, CLUSTERED)
    clusters = module.clusters(keys, call.keywords.get("key_padding_mask"))
    logits = module.information.logits(keys.reshape(1, -1, keys.shape[-1]))
    if isinstance(module, EnactRowColumnAttention):  # it gets the cells row by row and puts them in order itself
        order = _cells_in_order(module, grid.height, grid.width).to(logits.device)
        smoothed = torch.empty_like(logits).index_copy(1, order, module.information(logits[:, order]))
    else:
        smoothed = module.information(logits)
    return ClusterView(
        grid.to_map(clusters.index[0]),
        int(clusters.count[0]),
        grid.to_map(logits[0].softmax(0)),
        grid.to_map(smoothed[0]),
    )


@torch.no_grad()
def _attention(call: _Call, tokens: Tensor) -> Tensor:
    """(P, N): the attention of some tokens to all, averaged over the heads."""
    query, key, value = call.inputs
    chosen = query[:, tokens.to(query.device)]
    weights: Tensor = call.module(chosen, key, value, **{**call.keywords, "need_weights": True})[1]
    return weights[0]


@torch.enable_grad()
def _row_column_attention(call: _Call, tokens: Tensor) -> Tensor:
    """As `_attention`, for row-column attention, which makes no map: the derivative of its result by its values.

    Every head gets the first channel of the values as it is, and the first channel of the result is the heads' mean,
    so that the derivative of one by the other is the attention, whatever the way to it.
    """
    *others, value = call.inputs
    value = value.detach().requires_grad_()
    result = functional_call(call.module, _transparent(call.module), (*others, value), call.keywords)
    first_channel = result[0, ..., 0].flatten()[tokens.to(result.device)]
    rows = [torch.autograd.grad(one, value, retain_graph=True)[0] for one in first_channel]
    return torch.stack([row[0, ..., 0].flatten() for row in rows])


@torch.no_grad()
def _transparent(module: nn.Module) -> dict[str, Tensor]:
    """Projections of a row-column attention that let the first channel of the values through."""
    weight, bias = (module.get_parameter(f"in_proj_{name}").clone() for name in ("weight", "bias"))
    channels, heads = weight.shape[1], int(module.num_heads)  # type: ignore[arg-type]
    first = torch.arange(0, channels, channels // heads)  # the first channel of each head
    weight[-channels:], bias[-channels:] = 0, 0  # values come last
    weight[-channels + first, 0] = 1
    merge = torch.zeros_like(module.get_parameter("out_proj.weight"))
    merge[0, first] = 1 / heads
    return {"in_proj_weight": weight, "in_proj_bias": bias, "out_proj.weight": merge}
