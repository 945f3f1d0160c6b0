"""Pictures of what ENACT does: `explain` against the modules themselves, and the command."""

from __future__ import annotations

import dataclasses
import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor, nn
from torch.testing import assert_close

from configs.schema import recipe
from datasets import prepare_shapes
from enact import Clusters, EnactAttention, EnactRowColumnAttention
from models import build_model_from, build_postprocessor
from tools import visualize
from tools.clusters_panels import PALETTE, cluster_colors, cluster_outlines, show_attention, show_clusters
from tools.clusters_view import ClusterView, LayerView, explain

ROOT = Path(__file__).parents[1]
MODELS = ("detr", "conditional_detr", "anchor_detr")
VARIANTS = ("paper", "official", "plus")
TINY: dict[str, Any] = {
    "backbone": "resnet10", "backbone_stage": 1, "backbone_norm": "group", "backbone_weights": None, "hidden_dim": 32,
    "nheads": 2, "dim_feedforward": 32, "enc_layers": 2, "dec_layers": 1, "num_queries": 6, "num_query_position": 6,
    "num_query_pattern": 1, "num_classes": 6, "eval_short_side": 40, "max_long_side": 64, "smoothing_sigma": 3.0,
    "dilation": False, "shapes_train": 1, "shapes_val": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    prepare_shapes(folder, num_train=1, num_val=2)
    return folder


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ENACT_CACHE", str(cache))
    monkeypatch.chdir(tmp_path)


def build(model: str, enact: str | None, **fields: Any) -> nn.Module:
    return build_model_from(recipe(model, enact, **{**TINY, **fields})).eval()


def save_checkpoint(model: str, enact: str | None, path: str = "model.pth", **fields: Any) -> nn.Module:
    config = recipe(model, enact, **{**TINY, **fields})
    built = build_model_from(config).eval()
    torch.save({"model": built.state_dict(), "config": dataclasses.asdict(config)}, path)
    return built


def save_picture(name: str, height: int = 60, width: int = 80) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (height // 10, width // 10, 3), dtype=np.uint8)
    Path(name).parent.mkdir(exist_ok=True)
    Image.fromarray(pixels).resize((width, height)).save(name)


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
        self.information.append(smoothed.detach().squeeze(0))

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


def assert_picture(path: Path, rows: list[int]) -> None:
    """A PNG file of rows of panels, in which something is drawn in the first few of each row."""
    with Image.open(path) as image:
        assert image.format == "PNG"
        pixels = np.asarray(image.convert("RGB"))
    height, width = pixels.shape[0] // len(rows), pixels.shape[1] // max(rows)
    assert 200 < height < 900
    assert 250 < width < 900
    for row, panels in enumerate(rows):
        for column in range(panels):
            part = pixels[row * height :, column * width :]
            middle = part[height * 2 // 5 : height * 3 // 5, width // 4 : width // 2]
            assert middle.std() > 3, (path, row, column)
    assert (pixels > 250).mean() > 0.05  # the paper between the panels


def assert_text_beside_picture(path: Path) -> None:
    with Image.open(path) as image:
        place = image.convert("L").crop((image.width // 4 + 10, 50, image.width, image.height // 4))
        assert place.getextrema() == (pytest.approx(0, abs=60), 255)


def run(*flags: str) -> int:
    return visualize.main(["--checkpoint", "model.pth", "--device", "cpu", *flags])


@pytest.mark.parametrize(("name", "enact"), list(zip(MODELS, VARIANTS, strict=True)))
def test_the_command_writes_pictures_and_counts(name: str, enact: str) -> None:
    model = save_checkpoint(name, enact)
    save_picture("folder/duck.png")
    assert run("--images", "folder", "--queries", "10,20", "70.5,59", "--output", "out/put") == 0
    folder = Path("out/put")
    files = {"duck_layer0.png", "duck_layer1.png", "duck_contact.png", "clusters.json"}
    assert {path.name for path in folder.iterdir()} == files
    assert_picture(folder / "duck_layer0.png", [3, 3])
    assert_picture(folder / "duck_contact.png", [1, 4, 4])
    assert_text_beside_picture(folder / "duck_contact.png")
    report = json.loads((folder / "clusters.json").read_text())
    assert (report["encoder"], report["skipped"]) == (f"{name}, ENACT {enact}", [])
    [entry] = report["images"]
    assert (entry["image"], entry["height"], entry["width"]) == ("folder/duck.png", 60, 80)
    with Image.open("folder/duck.png") as image:
        pixels = torch.from_numpy(np.array(image.resize((53, 40), Image.Resampling.BILINEAR))).permute(2, 0, 1)
    for layer, view in zip(entry["layers"], explain(model, pixels, build_postprocessor(name)).layers, strict=True):
        assert view.clusters is not None
        index = view.clusters.index.flatten().tolist()
        sizes = [index.count(cluster) for cluster in range(view.clusters.num_clusters)]
        assert layer["tokens"] == len(index) == 10 * 14
        assert layer["clusters"] == view.clusters.num_clusters
        assert (layer["min_size"], layer["max_size"]) == (min(sizes), max(sizes))
        assert layer["mean_size"] == pytest.approx(sum(sizes) / len(sizes))
        assert layer["tokens_in_no_cluster"] == len(index) - sum(sizes)
        assert layer["min_information"] == pytest.approx(view.clusters.information.min().item())
        assert layer["max_information"] == pytest.approx(view.clusters.information.max().item())


def test_tokens_in_no_cluster_count_for_none() -> None:
    index = torch.tensor([[3, 0, 0, 1], [1, 1, 2, 3]])
    bits = torch.tensor([[0.5, 1, 2, 1], [1, 1, 1, 0.25]])
    assert visualize.layer_counts(LayerView(torch.zeros(1, 2, 4), ClusterView(index, 3, bits / 8, bits))) == {
        "tokens": 8, "clusters": 3, "tokens_in_no_cluster": 2, "mean_size": 2.0, "min_size": 1, "max_size": 3,
        "min_information": 0.25, "max_information": 2.0,
    }  # fmt: skip


@pytest.mark.parametrize("name", ["detr", "anchor_detr"])
def test_a_dense_checkpoint_shows_attention_alone(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    save_checkpoint(name, None, enc_layers=1)
    save_picture("duck.png")
    assert run("--images", "duck.png", "--queries", "5,5", "60,30", "--output", "out") == 0
    assert "has no clusters" in capsys.readouterr().err
    assert_picture(Path("out/duck_layer0.png"), [3])
    [layer] = json.loads(Path("out/clusters.json").read_text())["images"][0]["layers"]
    assert layer == {"layer": 0, "tokens": 140}


def test_without_images_it_shows_validation_images(cache: Path) -> None:
    save_checkpoint("detr", "paper", enc_layers=1)
    assert run() == 0
    names = {path.name for path in Path("clusters").glob("*.png")}
    assert names == {f"00000000000{number}_{kind}.png" for number in (1, 2) for kind in ("layer0", "contact")}
    [root] = cache.iterdir()
    config = recipe("detr", **{**TINY, "coco_path": str(root)})
    files = [root / "val2017" / f"00000000000{number}.jpg" for number in (1, 2)]
    assert visualize.validation_images(config) == files
    assert visualize.class_names(config) == visualize.class_names(dataclasses.replace(config, coco_path=None))
    assert visualize.class_names(dataclasses.replace(config, coco_path="nowhere")) == {}


def test_a_bad_image_is_named_and_skipped(capsys: pytest.CaptureFixture[str]) -> None:
    save_checkpoint("detr", "paper", enc_layers=1)
    save_picture("a/duck.png")
    save_picture("b/duck.jpg", height=20)
    Path("letter.png").write_text("Dear reader")
    Image.new("I;16", (80, 60)).save("deep.png")
    images = ["a", "letter.png", "nowhere.jpg", "deep.png", "b"]
    assert run("--images", *images, "--queries", "10,30", "--output", "out") == 0
    said = capsys.readouterr().err
    for reason in (
        "letter.png: image cannot be read",
        "nowhere.jpg: image cannot be read (No such file",
        "deep.png: image has pixels of mode I;16",
        "duck.jpg: the point 10,30 is outside the picture, which is 80 x 20 pixels",
        "1 of 5 images",
    ):
        assert reason in said
    report = json.loads(Path("out/clusters.json").read_text())
    assert [entry["name"] for entry in report["images"]] == ["duck"]
    assert [entry["image"] for entry in report["skipped"]] == ["letter.png", "nowhere.jpg", "deep.png", "b/duck.jpg"]
    assert run("--images", "letter.png", "--output", "none") == 1


def test_pictures_of_the_same_name_do_not_replace_each_other() -> None:
    paths = [Path(name) for name in ("a/duck.png", "b/duck.jpg", "b/duck_2.png", "c/duck.jpg")]
    assert visualize.unique_stems(paths) == ["duck", "duck_2", "duck_2_2", "duck_3"]


def test_a_photograph_lies_as_its_camera_says() -> None:
    save_picture("duck.png", height=20, width=40)
    turned = Image.open("duck.png")
    turned.getexif()[0x0112] = 6  # a quarter turn to the right
    turned.save("turned.jpg", exif=turned.getexif())
    assert visualize.read_picture(Path("turned.jpg")).size == (20, 40)


def broken(text: str, *flags: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The command fails with one line that says `text`."""
    capsys.readouterr()
    assert run(*flags) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert text in error


def test_bad_input_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    broken("no checkpoint at model.pth; check --checkpoint", capsys=capsys)
    Path("model.pth").write_text("Dear reader")
    broken("model.pth is not a checkpoint", capsys=capsys)
    model = save_checkpoint("detr", "paper", enc_layers=1)
    saved = torch.load("model.pth", weights_only=True)
    torch.save({"model": saved["model"]}, "model.pth")
    broken("model.pth holds no configuration", capsys=capsys)
    torch.save({**saved, "model": {**saved["model"], "foreign": torch.zeros(1)}}, "model.pth")
    broken("model.pth: the weights do not fit the model: foreign is unexpected", capsys=capsys)
    torch.save({**saved, "config": {**saved["config"], "nheads": 5}}, "model.pth")
    broken("model.pth: hidden_dim must be a multiple", capsys=capsys)
    torch.save({**saved, "config": {**saved["config"], "colour": "red"}}, "model.pth")
    save_picture("duck.png")
    Path("empty").mkdir()
    broken("there are no images in empty", "--images", "empty", capsys=capsys)
    broken("no such device", "--device", "abacus", capsys=capsys)
    broken("cannot write duck.png", "--images", "duck.png", "--output", "duck.png", capsys=capsys)
    assert run("--images", "duck.png", "--output", "out") == 0
    assert "left out: colour" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run("--queries", "12;5")
    assert "'12;5' is not X,Y in pixels" in capsys.readouterr().err
    model.encoder.layers = nn.ModuleList()  # type: ignore[union-attr, assignment]
    with pytest.raises(ValueError, match="no layers"):
        explain(model, picture(), build_postprocessor("detr"))


def test_the_command_finds_the_project_from_anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """As `python tools/visualize.py`, for which Python looks for modules in tools/ only."""
    for name in [name for name in sys.modules if name.split(".")[0] == "tools"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path and Path(path).resolve() != ROOT])
    assert "main" in runpy.run_path(str(ROOT / "tools" / "visualize.py"), run_name="visualize")
