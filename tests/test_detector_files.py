"""The files that a detector comes in: ours, published, Hugging Face's, bare weights."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from test_predict import NAMES, NUM_CLASSES, SMALL, picture, save_checkpoint, save_picture, table
from torch import nn
from torch.testing import assert_close

from configs.schema import recipe
from models.checkpoints import to_published
from models.pretrained import save_huggingface
from tools import predict
from tools.predict import Detector
from util.errors import InputError

pytestmark = pytest.mark.usefixtures("empty_folder")


def save_published(model: nn.Module, **arguments: Any) -> None:
    torch.save({"model": to_published(model.state_dict()), "args": argparse.Namespace(**arguments)}, "published.pth")


@pytest.mark.parametrize(
    ("name", "enact"),
    [("detr", None), ("detr", "official"), ("conditional_detr", None), ("anchor_detr", None),
     ("anchor_detr", "official")],
)  # fmt: skip
def test_a_published_checkpoint_is_recognised(name: str, enact: str | None) -> None:
    """Its tensors and its Namespace say what it is; sizes that it cannot say come from --config."""
    backbone = {"backbone_stage": 4, "backbone_norm": "frozen"}
    model = save_checkpoint(name, enact, **backbone)
    expected = Detector.from_checkpoint("model.pth", device="cpu", score=0.0)(picture())
    save_published(model, backbone="resnet10", dilation=SMALL["dilation"], nheads=SMALL["nheads"], lr=1, masks=False)
    sides = {side: SMALL[side] for side in ("eval_short_side", "max_long_side")}
    smoothing = {"smoothing_sigma": recipe(name, enact, **SMALL).smoothing_sigma}
    for fields in ({}, {"model": name} | ({"enact": enact} if enact else {})):
        detector = Detector.from_checkpoint("published.pth", device="cpu", score=0.0, **sides, **smoothing, **fields)
        found = detector(picture())
        assert_close(found["boxes"], expected["boxes"], atol=1e-3, rtol=0)
        assert found["labels"].tolist() == expected["labels"].tolist()
        assert found["names"] == [str(label) for label in found["labels"].tolist()]


def test_a_published_checkpoint_of_cocos_classes_has_their_names(capsys: pytest.CaptureFixture[str]) -> None:
    model = save_checkpoint(num_classes=91, backbone_stage=4, backbone_norm="frozen")
    save_published(model, nheads=SMALL["nheads"], dilation=SMALL["dilation"])
    save_picture("duck.png")
    Path("sizes.yaml").write_text("eval_short_side: 40\nmax_long_side: 60\nmodel: detr")
    words = ["duck.png", "--checkpoint", "published.pth", "--config", "sizes.yaml", "--score", "0"]
    assert predict.main([*words, "--output", "out", "--device", "cpu"]) == 0
    names = {int(row["label"]): row["name"] for row in table("out")}
    coco = {1: "person", 3: "car", 13: "stop sign", 90: "toothbrush"}
    assert all(names[label] == coco[label] for label in names.keys() & coco)
    assert all(name.isdecimal() or not name.isdigit() for name in names.values())
    assert predict.main([*words, "--model", "anchor_detr"]) == 2
    assert "published.pth: the weights do not fit the model" in capsys.readouterr().err


def test_weights_alone_of_enact_need_its_variant() -> None:
    model = save_checkpoint("detr", "plus", backbone_stage=4, backbone_norm="frozen")
    torch.save({"model": model.state_dict()}, "bare.pth")
    with pytest.raises(InputError, match=r"bare\.pth does not say which variant of ENACT it is; give it: --enact"):
        Detector.from_checkpoint("bare.pth", device="cpu")
    sizes = {key: SMALL[key] for key in ("nheads", "dilation", "eval_short_side", "max_long_side")}
    found = Detector.from_checkpoint("bare.pth", device="cpu", enact="plus", score=0.0, **sizes)(picture())
    expected = Detector.from_checkpoint("model.pth", device="cpu", score=0.0)(picture())
    assert_close(found["boxes"], expected["boxes"])
    torch.save({"model": {"weight": torch.zeros(3)}}, "other.pth")
    with pytest.raises(InputError, match=r"other\.pth: it holds no detector of ours"):
        Detector.from_checkpoint("other.pth", device="cpu")


@pytest.mark.parametrize("name", ["detr", "conditional_detr"])
def test_a_hugging_face_folder_is_a_checkpoint(name: str) -> None:
    pytest.importorskip("safetensors")
    fields = {"backbone_stage": 4, "backbone_norm": "frozen", "dilation": False}
    model = save_checkpoint(name, **fields)
    config = dataclasses.asdict(recipe(name, None, **{**SMALL, **fields}))
    save_huggingface(Path("folder"), model.state_dict(), config, NAMES, NUM_CLASSES)
    sides = {side: SMALL[side] for side in ("eval_short_side", "max_long_side")}
    found = Detector.from_checkpoint("folder", device="cpu", score=0.0, **sides)(picture())
    expected = Detector.from_checkpoint("model.pth", device="cpu", score=0.0)(picture())
    assert found["names"] == expected["names"]
    assert_close(found["boxes"], expected["boxes"])
    bare = Detector.from_checkpoint(
        "folder/model.safetensors", device="cpu", score=0.0, nheads=SMALL["nheads"], dilation=False, **sides
    )
    assert_close(bare(picture())["boxes"], expected["boxes"])
    Path("folder/config.json").write_text('{"model_type": "yolos"}')
    with pytest.raises(InputError, match="folder: model_type is 'yolos'"):
        Detector.from_checkpoint("folder", device="cpu")


def test_names_come_from_the_data_where_a_checkpoint_has_none(cache: Path) -> None:
    save_checkpoint()
    saved = torch.load("model.pth", weights_only=True)
    del saved["class_names"]
    [root] = cache.iterdir()
    for path, name in ((None, "circle"), (str(root), "circle"), ("nowhere", "1")):
        torch.save({**saved, "config": {**saved["config"], "coco_path": path}}, "old.pth")
        assert Detector.from_checkpoint("old.pth", device="cpu").name(1) == name
