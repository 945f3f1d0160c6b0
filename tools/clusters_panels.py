"""The panels of which `clusters_plot` makes figures: a picture, or a map over it.

Shapes: h x w cells of the feature map, H x W pixels of the picture as the model saw it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke
from matplotlib.transforms import Bbox
from torch import Tensor

from tools.clusters_view import ClusterView, Explanation, LayerView

# Okabe and Ito's colours without black, which colour-blind readers tell apart.
PALETTE = ("#56B4E9", "#E69F00", "#009E73", "#CC79A7", "#F0E442", "#0072B2", "#D55E00")
IN_NO_CLUSTER = "#808080"
INFORMATION, PROBABILITY, ATTENTION = "viridis", "cividis", "magma"
OUTLINE = [withStroke(linewidth=2.5, foreground="black")]


def show_picture(axes: Axes, view: Explanation, class_names: Mapping[int, str]) -> None:
    """The picture, the chosen points with their numbers, and its detections."""
    axes.imshow(view.image.permute(1, 2, 0).numpy(), extent=_extent(view))
    found = {name: values.tolist() for name, values in view.detections.items()}
    count = len(found["boxes"])
    _finish(axes, view, f"{count} detection{'' if count == 1 else 's'}")
    taken = [_mark(axes, view, number) for number in range(len(view.points))]
    for number, (box, label, score) in enumerate(zip(found["boxes"], found["labels"], found["scores"], strict=True)):
        _draw_box(axes, box, f"{class_names.get(label, label)} {score:.2f}", PALETTE[number % len(PALETTE)], taken)


def show_clusters(axes: Axes, view: Explanation, clusters: ClusterView) -> None:
    """Each cluster in a colour that none of its neighbours has, with its outline; tokens in none are hatched."""
    palette = np.array([to_rgba(color, 0.55) for color in (*PALETTE, IN_NO_CLUSTER)])
    colors = cluster_colors(clusters)
    axes.imshow(_grey(view), extent=_extent(view), cmap="gray", vmin=-0.3, vmax=1.2)
    axes.imshow(palette[colors.numpy()], extent=_extent(view), interpolation="nearest")
    axes.add_collection(LineCollection(cluster_outlines(clusters, view), colors="black", linewidths=0.7))
    _hatch(axes, view, clusters.unclustered())
    mean, left_out = clusters.sizes().float().mean(), int(clusters.unclustered().sum())
    text = f"{clusters.num_clusters} clusters of {clusters.index.numel()} tokens, mean run {mean:.1f}"
    _finish(axes, view, f"{text}, {left_out} in none" if left_out else text)


def show_information(axes: Axes, view: Explanation, clusters: ClusterView) -> None:
    """The smoothed information of each token."""
    show_map(axes, view, clusters.information, "smoothed information (bits)", INFORMATION)


def show_attention(axes: Axes, view: Explanation, layer: LayerView, point: int) -> None:
    """The attention of the token at one of the chosen points."""
    show_map(axes, view, layer.attention[point], f"attention of point {point + 1}", ATTENTION)
    _mark(axes, view, point)


def show_probability(axes: Axes, view: Explanation, clusters: ClusterView) -> None:
    """The learned probability of each token."""
    show_map(axes, view, clusters.probability, "learned probability", PROBABILITY)


def show_map(axes: Axes, view: Explanation, values: Tensor, title: str, colors: str) -> None:
    """A map (h, w) over the picture, with a bar from its least to its greatest value."""
    low, high = values.min().item(), values.max().item()
    axes.imshow(_grey(view), extent=_extent(view), cmap="gray", vmin=0, vmax=1)
    heat = axes.imshow(values.numpy(), extent=_extent(view), cmap=colors, interpolation="nearest", alpha=0.65)
    figure = axes.get_figure()
    assert isinstance(figure, Figure)
    bar = figure.colorbar(heat, cax=axes.inset_axes((1.02, 0, 0.045, 1)))
    ends = [low, high] if high > low else [low]
    bar.set_ticks(ends)
    bar.set_ticklabels([f"{value:.2g}" for value in ends], fontsize=8)
    _finish(axes, view, title)


def cluster_colors(clusters: ClusterView) -> Tensor:
    """Which of the palette's colours each token gets, (h, w) int64; the one after the last for tokens in no cluster.

    Clusters are removed one by one, the one with fewest neighbours left first, and coloured in the opposite order:
    five neighbours at most have a colour then, since runs of a raster scan make a planar map.
    """
    neighbours = _neighbours(clusters)
    left, order = {cluster: len(others) for cluster, others in neighbours.items()}, []
    while left:
        order.append(min(left, key=left.__getitem__))
        del left[order[-1]]
        for other in neighbours[order[-1]] & left.keys():
            left[other] -= 1
    colors = torch.full((clusters.num_clusters + 1,), len(PALETTE))
    used = [0] * len(PALETTE)
    for cluster in reversed(order):
        taken = {int(colors[other]) for other in neighbours[cluster]}
        free = [color for color in range(len(PALETTE)) if color not in taken] or range(len(PALETTE))
        colors[cluster] = color = min(free, key=used.__getitem__)
        used[color] += 1
    return colors[clusters.index.clamp(max=clusters.num_clusters)]


def _neighbours(clusters: ClusterView) -> dict[int, set[int]]:
    """The clusters beside, above or below each cluster."""
    index = clusters.index
    pairs = torch.cat([
        torch.stack([index[:, 1:], index[:, :-1]], -1).flatten(0, 1),
        torch.stack([index[1:], index[:-1]], -1).flatten(0, 1),
    ])
    result: dict[int, set[int]] = {cluster: set() for cluster in range(clusters.num_clusters)}
    for one, other in set(map(tuple, pairs.tolist())):
        if one != other and max(one, other) < clusters.num_clusters:
            result[one].add(other)
            result[other].add(one)
    return result


def cluster_outlines(clusters: ClusterView, view: Explanation) -> list[list[tuple[float, float]]]:
    """The edges between tokens of different clusters, each from one (x, y) to another, in pixels of the picture."""
    index = clusters.index
    across, down = _cell(view, index)
    upright = (index[:, 1:] != index[:, :-1]).nonzero().tolist()
    level = (index[1:] != index[:-1]).nonzero().tolist()
    edges = [[((x + 1) * across, y * down), ((x + 1) * across, (y + 1) * down)] for y, x in upright]
    return edges + [[(x * across, (y + 1) * down), ((x + 1) * across, (y + 1) * down)] for y, x in level]


def _hatch(axes: Axes, view: Explanation, where: Tensor) -> None:
    across, down = _cell(view, where)
    for y, x in where.nonzero().tolist():
        axes.add_patch(Rectangle((x * across, y * down), across, down, hatch="/////", fill=False, linewidth=0))


def _cell(view: Explanation, values: Tensor) -> tuple[float, float]:
    """Width and height of a token's cell, in pixels of the picture."""
    return view.size[1] / values.shape[1], view.size[0] / values.shape[0]


def _draw_box(axes: Axes, box: list[float], caption: str, color: str, taken: list[Bbox]) -> None:
    """A box, and its caption at the first of its corners where no other text is."""
    left, top, right, bottom = box
    axes.add_patch(Rectangle((left, top), right - left, bottom - top, fill=False, edgecolor=color, linewidth=2))
    background = {"facecolor": "white", "edgecolor": color, "pad": 1, "alpha": 0.85}
    text = axes.text(left, top, caption, fontsize=7, bbox=background)
    for x, y, ha, va in (
        (left, top, "left", "bottom"), (left, top, "left", "top"), (left, bottom, "left", "bottom"),
        (left, bottom, "left", "top"), (right, top, "right", "bottom"), (right, top, "right", "top"),
        (right, bottom, "right", "bottom"), (right, bottom, "right", "top"),
    ):  # fmt: skip
        text.set(x=x, y=y, ha=ha, va=va)
        extent = text.get_window_extent().padded(2)
        inside = Bbox.intersection(extent, axes.bbox)
        if inside is not None and inside.width > 0.99 * extent.width and not extent.count_overlaps(taken):
            break
    taken.append(extent)


def _mark(axes: Axes, view: Explanation, number: int) -> Bbox:
    """A cross at a point, with its number beside it; where the number is."""
    x, y = view.points[number]
    axes.plot(x, y, marker="+", color="white", markersize=11, markeredgewidth=2, path_effects=OUTLINE)
    text = axes.annotate(
        str(number + 1), (x, y), (4, 3), textcoords="offset points", color="white", fontsize=10, weight="bold",
        path_effects=OUTLINE,
    )  # fmt: skip
    return text.get_window_extent()


def _finish(axes: Axes, view: Explanation, title: str) -> None:
    height, width = view.size
    axes.set(xlim=(0, width), ylim=(height, 0), xticks=[], yticks=[])
    axes.set_title(title, fontsize=8.5)


def _grey(view: Explanation) -> Any:
    """Brightness of the picture, (H, W) in [0, 1]."""
    weights = torch.tensor([0.299, 0.587, 0.114])
    return (view.image.float() / 255 * weights[:, None, None]).sum(0).numpy()


def _extent(view: Explanation) -> tuple[float, float, float, float]:
    return 0, view.size[1], view.size[0], 0
