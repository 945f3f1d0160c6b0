"""tools/visualize.py, the command: its files, what it takes and what it refuses."""

from __future__ import annotations

import dataclasses
import json
import runpy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from test_clusters_view import MODELS, TINY, VARIANTS, picture
from torch import nn

from configs.schema import recipe
from models import build_model_from, build_postprocessor
from tools import visualize
from tools.clusters_view import ClusterView, LayerView, explain
from tools.detector_files import class_names, validation_images
from tools.pictures import read_picture, unique_stems

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.usefixtures("empty_folder")


def save_checkpoint(model: str, enact: str | None, path: str = "model.pth", **fields: Any) -> nn.Module:
    config = recipe(model, enact, **{**TINY, **fields})
    built = build_model_from(config).eval()
    torch.save({"model": built.state_dict(), "config": dataclasses.asdict(config)}, path)
    return built


def save_picture(name: str, height: int = 60, width: int = 80) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (height // 10, width // 10, 3), dtype=np.uint8)
    Path(name).parent.mkdir(exist_ok=True)
    Image.fromarray(pixels).resize((width, height)).save(name)


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
    stems = [f"00000000000{number}" for number in range(1, visualize.VALIDATION_IMAGES + 1)]
    assert names == {f"{stem}_{kind}.png" for stem in stems for kind in ("layer0", "contact")}
    [root] = cache.iterdir()
    config = recipe("detr", **{**TINY, "coco_path": str(root)})
    files = [root / "val2017" / f"{stem}.jpg" for stem in stems]
    assert validation_images(config, 4) == files
    assert class_names(config) == class_names(dataclasses.replace(config, coco_path=None))
    assert class_names(dataclasses.replace(config, coco_path="nowhere")) == {}


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
    assert unique_stems(paths) == ["duck", "duck_2", "duck_2_2", "duck_3"]


def test_a_photograph_lies_as_its_camera_says() -> None:
    save_picture("duck.png", height=20, width=40)
    turned = Image.open("duck.png")
    turned.getexif()[0x0112] = 6  # a quarter turn to the right
    turned.save("turned.jpg", exif=turned.getexif())
    assert read_picture(Path("turned.jpg")).size == (20, 40)


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
    broken("model.pth does not say which variant of ENACT it is", capsys=capsys)
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
