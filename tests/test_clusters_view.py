"""What tools/visualize.py shows: `explain` and its panels, against the modules themselves."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.testing import assert_close

from configs.schema import recipe
from enact import Clusters, EnactAttention, EnactRowColumnAttention
from models import build_model_from, build_postprocessor
from tools.clusters_panels import PALETTE, cluster_colors, cluster_outlines, show_attention, show_clusters
from tools.clusters_view import ClusterView, explain

ROOT = Path(__file__).parents[1]
MODELS = ("detr", "conditional_detr", "anchor_detr")
VARIANTS = ("paper", "official", "plus")
TINY: dict[str, Any] = {
    "backbone": "resnet10", "backbone_stage": 1, "backbone_norm": "group", "backbone_weights": None, "hidden_dim": 32,
    "nheads": 2, "dim_feedforward": 32, "enc_layers": 2, "dec_layers": 1, "num_queries": 6, "num_query_position": 6,
    "num_query_pattern": 1, "num_classes": 6, "eval_short_side": 40, "max_long_side": 64, "smoothing_sigma": 3.0,
    "dilation": False, "shapes_train": 16, "shapes_val": 6,
}  # fmt: skip


def build(model: str, enact: str | None, **fields: Any) -> nn.Module:
    return build_model_from(recipe(model, enact, **{**TINY, **fields})).eval()


def picture(height: int = 40, width: int = 52) -> Tensor:
    return torch.randint(0, 256, (3, height, width), dtype=torch.uint8)


class Watch:
    """What the attentions of an encoder do while the model runs, seen from outside."""

    def __init__(self, model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
        self.information: list[Tensor] = []
        self.clusters: list[Clusters] = []
        self.calls: list[tuple[nn.Module, tuple[Tensor, ...], Tensor]] = []
        for layer in model.get_submodule("encoder.layers").children():
            attention = layer.get_submodule("self_attn")
            attention.register_forward_hook(self.on_attention)
            if isinstance(attention, EnactAttention | EnactRowColumnAttention):
                attention.information.register_forward_hook(self.on_information)
                monkeypatch.setattr(attention, "clusters", self.on_clusters(attention.clusters))

    def on_information(self, module: nn.Module, inputs: Any, smoothed: Tensor) -> None:
        self.information.append(smoothed.detach().squeeze(0).float())  # from fp64

    def on_attention(self, module: nn.Module, inputs: Any, result: Any) -> None:
        self.calls.append((module, inputs, result[0] if isinstance(result, tuple) else result))

    def on_clusters(self, clusters: Callable[..., Clusters]) -> Callable[..., Clusters]:
        def watched(*arguments: Any) -> Clusters:
            self.clusters.append(clusters(*arguments))
            return self.clusters[-1]

        return watched


@pytest.mark.parametrize("enact", VARIANTS)
@pytest.mark.parametrize("name", MODELS)
def test_what_is_shown_is_what_the_modules_did(name: str, enact: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, image = build(name, enact), picture()
    with monkeypatch.context() as patched, torch.no_grad():
        watch = Watch(model, patched)
        model(*normalized(image))
        seen = list(zip(watch.information, watch.clusters, strict=True))
    layers = explain(model, image, build_postprocessor(name)).layers
    assert len(layers) == 2
    for layer, (information, clusters) in zip(layers, seen, strict=True):
        assert layer.clusters is not None
        assert_close(layer.clusters.information, information.view(10, 13))
        assert_close(layer.clusters.index, clusters.index.view(10, 13))
        assert layer.clusters.num_clusters == clusters.num_clusters > 10
        lengths = [clusters.index.tolist()[0].count(cluster) for cluster in range(clusters.num_clusters)]
        assert layer.clusters.sizes().tolist() == lengths
        assert_close(layer.clusters.probability.sum(), torch.tensor(1.0))


def normalized(image: Tensor) -> tuple[Tensor, Tensor]:
    """The image alone, normalised by hand, and its mask."""
    mean, std = (torch.tensor(values)[:, None, None] for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    return ((image / 255 - mean) / std).unsqueeze(0), torch.zeros(1, *image.shape[1:], dtype=torch.bool)


@pytest.mark.parametrize("enact", [None, *VARIANTS])
@pytest.mark.parametrize("name", MODELS)
def test_the_attention_shown_makes_the_result_of_the_attention(
    name: str, enact: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With one head, the result at a token is the attention-weighted sum of the projected values."""
    model = build(name, enact, nheads=1, enc_layers=1)
    watch = Watch(model, monkeypatch)
    points = ((51.9, 0.0), (3.0, 39.0), (26.0, 15.0))
    shown = explain(model, picture(), build_postprocessor(name), points=points)
    assert shown.points == points
    weights, (attention, inputs, result) = shown.layers[0].attention, watch.calls[0]
    assert weights.shape == (3, 10, 13)
    assert weights.sum((1, 2)).allclose(torch.ones(3), atol=1e-5) == (enact != "official")
    projection = (attention.get_parameter(f"in_proj_{kind}")[-32:] for kind in ("weight", "bias"))
    values = F.linear(inputs[-1].reshape(130, 32), *projection)
    expected = attention.get_submodule("out_proj")(weights.flatten(1) @ values)
    # Points are (x, y) in 52 x 40 pixels, and the map has 13 x 10 cells of 4 x 4 pixels.
    cells = torch.tensor([0 * 13 + 12, 9 * 13 + 0, 3 * 13 + 6])
    assert_close(expected, result.reshape(130, 32)[cells], rtol=1e-4, atol=1e-5)


def test_the_attention_shown_is_the_mean_over_the_heads() -> None:
    model = build("anchor_detr", None)
    shown, calls = [], []
    attention = model.get_submodule("encoder.layers.0.self_attn")
    attention.register_forward_pre_hook(lambda _, inputs: calls.append(inputs))
    shown = explain(model, picture(), build_postprocessor("anchor_detr"), points=[(6.0, 9.0)]).layers[0].attention[0]
    query_row, query_col, key_row, key_col, _ = calls[0]
    weights, biases = (attention.get_parameter(f"in_proj_{kind}").chunk(5) for kind in ("weight", "bias"))
    expected = torch.zeros(10, 13)
    for head in (slice(0, 16), slice(16, 32)):
        row, col = query_row[0, 2, 1], query_col[0, 2, 1]  # the cell of x = 6, y = 9
        x, y = key_row[0].mean(0), key_col[0].mean(1)
        row, col, x, y = (
            F.linear(tokens, weights[fifth][head], biases[fifth][head]) for fifth, tokens in enumerate((row, col, x, y))
        )
        expected += torch.outer((y @ col / 4).softmax(0), (x @ row / 4).softmax(0)) / 2
    assert_close(shown, expected)


@pytest.mark.parametrize("name", MODELS)
def test_the_order_of_the_tokens_does_not_move_the_pictures(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With one cluster a token, attention is dense, and a dense model has no order."""
    image, points = picture(), [(50.0, 2.0), (6.0, 30.0)]
    raster, hilbert = (
        build(name, "paper", enc_layers=1, regions="tokens", token_order=order) for order in ("raster", "hilbert")
    )
    hilbert.load_state_dict(raster.state_dict())
    watch = Watch(hilbert, monkeypatch)
    one, other = (
        explain(model, image, build_postprocessor(name), points=points).layers[0] for model in (raster, hilbert)
    )
    assert one.clusters is not None
    assert other.clusters is not None
    assert_close(other.attention, one.attention)
    assert_close(other.clusters.probability, one.clusters.probability)
    path = other.clusters.index.flatten().argsort()  # the cells in the order of their clusters
    steps = path[1:] - path[:-1]
    assert torch.isin(steps.abs(), torch.tensor([1, 13])).float().mean() > 0.9  # from a cell to its neighbour
    assert len(steps.unique()) >= 4  # on all four sides
    assert_close(other.clusters.information.flatten()[path], watch.information[0])


def test_points_are_the_centres_of_the_best_detections_or_the_middle() -> None:
    model, image = build("detr", "paper", num_queries=20), picture()
    found = explain(model, image, build_postprocessor("detr"), size=(80, 104), min_score=0.0)
    scores, (left, top, right, bottom) = found.detections["scores"], found.detections["boxes"][0].tolist()
    assert len(scores) == 20
    assert (scores.diff() <= 0).all()
    half = explain(model, image, build_postprocessor("detr"), min_score=0.0)
    assert_close(found.detections["boxes"], 2 * half.detections["boxes"])
    assert found.points[0] == pytest.approx(((left + right) / 2, (top + bottom) / 2), abs=1e-3)
    assert len(found.points) <= 4
    assert len(found.layers[0].attention) == len(found.points)
    none = explain(model, image, build_postprocessor("detr"), size=(80, 104), min_score=1.1)
    assert none.points == ((52.0, 40.0),)
    assert len(none.detections["scores"]) == 0


def test_neighbouring_clusters_never_share_a_colour() -> None:
    generator = torch.Generator().manual_seed(3)
    for density in (0.1, 0.3, 0.6, 1.0):
        starts = torch.rand(20 * 31, generator=generator) < density
        starts[0] = False
        index = starts.cumsum(0).view(20, 31)
        clusters = int(index.max()) - 1  # the last runs are in none
        colors = cluster_colors(ClusterView(index, clusters, index.float(), index.float()))
        for one, other, color, neighbour in (
            (index[1:], index[:-1], colors[1:], colors[:-1]),
            (index[:, 1:], index[:, :-1], colors[:, 1:], colors[:, :-1]),
        ):
            both = (one != other) & (one < clusters) & (other < clusters)
            assert both.any()
            assert (color != neighbour)[both].all()
        assert ((colors == len(PALETTE)) == (index >= clusters)).all()
        assert all(len(colors[index == cluster].unique()) == 1 for cluster in range(clusters))


def test_the_panels_hold_the_maps() -> None:
    view = explain(build("detr", "official"), picture(), build_postprocessor("detr"), points=[(1, 1), (9, 9)])
    layer = view.layers[1]
    assert layer.clusters is not None
    heat, tiles = Figure().subplots(1, 2)
    show_attention(heat, view, layer, point=1)
    shown = heat.images[-1]
    assert np.array_equal(shown.get_array(), layer.attention[1].numpy())
    assert shown.get_clim() == (layer.attention[1].min(), layer.attention[1].max())
    show_clusters(tiles, view, layer.clusters)
    index, colors = layer.clusters.index.numpy(), tiles.images[-1].get_array()
    for one, other, color, neighbour in (
        (index[1:], index[:-1], colors[1:], colors[:-1]),
        (index[:, 1:], index[:, :-1], colors[:, 1:], colors[:, :-1]),
    ):
        assert np.array_equal((color != neighbour).any(-1), one != other)
    assert {tuple(image.get_extent()) for image in (*heat.images, *tiles.images)} == {(0, 52, 40, 0)}


def test_outlines_run_between_clusters() -> None:
    index = torch.tensor([[0, 0, 1], [1, 1, 1]])
    clusters = ClusterView(index, 2, index.float(), index.float())
    view = explain(build("detr", None), picture(), build_postprocessor("detr"), size=(20, 30))
    expected = {((20, 0), (20, 10)), ((0, 10), (10, 10)), ((10, 10), (20, 10))}
    assert set(map(tuple, cluster_outlines(clusters, view))) == expected
