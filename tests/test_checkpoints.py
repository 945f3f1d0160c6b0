"""Published layouts <-> ours, and warm starts."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from test_models import SMALL, batch_of
from torch import Tensor, nn
from torch.testing import assert_close

from enact import EnactAttention, EnactRowColumnAttention
from enact.method import Method
from models import build_model, load_weights, warm_start
from models.checkpoints import from_published, to_published

FIXTURES = sorted((Path(__file__).parent / "parity").glob("*.json"))
NAMES = ("detr", "conditional_detr", "anchor_detr")


def build(name: str, enact: str | None = None, **overrides: Any) -> nn.Module:
    """A small detector none of whose weights are zero or the same in two layers."""
    sizes = {"backbone_stage": 1, "dilation": False, "num_query_position": 5, "num_query_pattern": 2}
    model = build_model(name, enact, **{**SMALL, **sizes, **overrides}).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


@pytest.mark.parametrize("fixture", FIXTURES, ids=lambda path: path.stem)
def test_published_layouts_are_written_key_for_key(fixture: Path) -> None:
    spec = json.loads(fixture.read_text())
    options = dict(spec["build"])
    with torch.device("meta"):
        model = build_model(options.pop("name"), **options)
    written = {key: list(value.shape) for key, value in to_published(model.state_dict()).items()}
    assert written == {key: shape for key, shape in spec["keys"].items() if not key.endswith("num_batches_tracked")}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("enact", [None, "paper", "official"])
def test_what_was_written_in_the_published_layout_loads(name: str, enact: str | None) -> None:
    source, model = build(name, enact), build(name, enact)
    published = to_published(source.state_dict())
    assert published.keys() != source.state_dict().keys()
    load_weights(model, published)
    assert_close(dict(model.state_dict()), dict(source.state_dict()))
    assert from_published(source.state_dict()).keys() == source.state_dict().keys()


def test_copies_of_a_shared_head_must_be_equal() -> None:
    model = build("anchor_detr")
    published = to_published(model.state_dict())
    published["transformer.bbox_embed.1.layers.2.bias"] = torch.ones(4)
    with pytest.raises(ValueError, match=r"bbox_embed.1.layers.2.bias is not equal .* bbox_embed.layers.2.bias"):
        load_weights(model, published)


def test_released_enact_in_a_paper_model_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    source = to_published(build("detr", "official").state_dict())
    with caplog.at_level(logging.WARNING):
        load_weights(build("detr", "official"), source)
        assert caplog.text == ""
        load_weights(build("detr", "paper"), source)
    assert "warm_start" in caplog.text


@pytest.mark.parametrize("name", NAMES)
def test_another_number_of_classes_keeps_the_drawn_head_and_says_so(name: str) -> None:
    source, model = build(name), build(name, num_classes=9)
    drawn = {key: value.clone() for key, value in model.state_dict().items()}
    rows = [len(m.get_parameter("class_embed.bias")) for m in (source, model)]
    notes = warm_start(model, to_published(source.state_dict()))
    assert notes == [f"the class head has {rows[0]} rows in the weights, {rows[1]} in the model, and stays as drawn"]
    for key, value in model.state_dict().items():
        assert_close(value, drawn[key] if key.startswith("class_embed.") else source.state_dict()[key], msg=key)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("enact", [None, "paper", "official"])
def test_weights_that_fit_are_copied_without_a_word(name: str, enact: str | None) -> None:
    source, model = build(name, enact), build(name, enact)
    assert warm_start(model, source.state_dict()) == []
    assert_close(dict(model.state_dict()), dict(source.state_dict()))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("enact", ["paper", "official"])
def test_a_dense_checkpoint_starts_enact(name: str, enact: str) -> None:
    source, model = build(name), build(name, enact)
    drawn = {key: value.clone() for key, value in model.state_dict().items()}
    notes = warm_start(model, to_published(source.state_dict()))
    assert notes[-1] == "2 layers of ENACT are new and stay as drawn"
    assert len(notes) == (1 if enact == "paper" else 2)
    for key, value in model.state_dict().items():
        if ".information." in key:
            assert_close(value, drawn[key])
        elif "encoder" not in key or "in_proj" not in key or enact == "paper":
            assert_close(value, source.state_dict()[key], msg=key)


def cluster_nothing(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, EnactAttention | EnactRowColumnAttention):
            module.method = Method(regions="tokens")


def outputs_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        outputs = model(*batch)
    return outputs["pred_logits"], outputs["pred_boxes"]


@pytest.mark.parametrize("name", ["detr", "conditional_detr"])
@pytest.mark.parametrize(
    ("source", "target"), [(None, "paper"), (None, "official"), ("official", "paper"), ("paper", "official")]
)
def test_the_function_survives_a_change_of_variant(name: str, source: str | None, target: str) -> None:
    """Without clustering and padding all variants are dense attention, once the weights are carried over."""
    first, second, batch = build(name, source), build(name, target), batch_of((24, 32))
    cluster_nothing(first)
    cluster_nothing(second)
    if source == "paper":
        notes = warm_start(second, first.state_dict(), official=False)
    else:
        notes = warm_start(second, to_published(first.state_dict()))
    scaled = "the query and value slices of the encoder's projections are scaled"
    assert (scaled in notes) == ("official" in (source, target))
    assert_close(outputs_of(first, batch), outputs_of(second, batch), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("source", "target"), [(None, "official"), ("official", "paper")])
def test_anchor_detr_changes_variant_with_its_slices_exchanged(source: str | None, target: str) -> None:
    first, second = build("anchor_detr", source), build("anchor_detr", target)
    notes = warm_start(second, to_published(first.state_dict()))
    assert notes[0] == "the query and key slices of the encoder's projections are exchanged"
    for kind in ("weight", "bias"):
        key = f"encoder.layers.1.self_attn.in_proj_{kind}"
        found, given = (model.get_parameter(key).chunk(5) for model in (second, first))
        for role, slot in enumerate((2, 3, 0, 1, 4)):
            assert_close(found[role], given[slot])
    key = "decoder.layers.0.cross_attn.in_proj_weight"
    assert_close(second.get_parameter(key), first.get_parameter(key))


@torch.no_grad()
def test_a_dense_anchor_detr_gives_the_same_through_official_enact_where_both_agree() -> None:
    """On a map of one cell every distribution is 1, and only the values are left."""
    first, second = build("anchor_detr"), build("anchor_detr", "official")
    warm_start(second, first.state_dict())
    x, position = torch.randn(2, 1, 1, 64), torch.randn(2, 1, 1, 64)
    mask = torch.zeros(2, 1, 1, dtype=torch.bool)
    assert_close(first.encoder(x, position, position, mask), second.encoder(x, position, position, mask))


@pytest.mark.parametrize("name", NAMES)
def test_anything_else_that_does_not_fit_is_named(name: str) -> None:
    model, state = build(name, "paper"), dict(build(name, "paper").state_dict())
    with pytest.raises(ValueError, match=r"information.probability.weight is unexpected"):
        warm_start(build(name), state)
    del state["encoder.layers.1.self_attn.information.probability.bias"]
    state["bbox_embed.layers.2.bias"] = torch.zeros(5)
    state["encoder.layers.0.self_attn.in_proj_bias"] = torch.zeros(1)
    with pytest.raises(ValueError, match=r"probability.bias is missing; .*in_proj_bias has shape.*layers.2.bias has"):
        warm_start(model, state, official=True)
