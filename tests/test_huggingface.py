"""Hugging Face's DETR and Conditional DETR: the same outputs from the same weights, there and back."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from configs.schema import recipe
from models import build_model, load_weights, warm_start
from models.huggingface import class_names_of, config_of, fields_of, from_huggingface, to_huggingface
from models.pretrained import pretrained_weights, read_config, save_huggingface
from util.errors import InputError

transformers = pytest.importorskip("transformers")
pytest.importorskip("safetensors")

CLASSES = {"detr": "Detr", "conditional_detr": "ConditionalDetr"}
NAMES = list(CLASSES)
NUM_CLASSES = 7
OURS: dict[str, Any] = {
    "backbone": "resnet10", "backbone_weights": None, "hidden_dim": 32, "nheads": 4, "enc_layers": 2, "dec_layers": 3,
    "dim_feedforward": 48, "dropout": 0.0, "num_queries": 6, "num_classes": NUM_CLASSES, "dilation": False,
}  # fmt: skip


def theirs(name: str, position: str = "sine") -> nn.Module:
    resnet = transformers.ResNetConfig(
        embedding_size=64, hidden_sizes=[64, 128, 256, 512], depths=[1] * 4, layer_type="basic", out_features=["stage4"]
    )
    config = getattr(transformers, f"{CLASSES[name]}Config")(
        backbone_config=resnet, use_timm_backbone=False, use_pretrained_backbone=False, backbone=None,
        d_model=32, encoder_attention_heads=4, decoder_attention_heads=4, encoder_layers=2, decoder_layers=3,
        encoder_ffn_dim=48, decoder_ffn_dim=48, dropout=0.0, num_queries=6, num_labels=NUM_CLASSES,
        position_embedding_type=position,
    )  # fmt: skip
    return getattr(transformers, f"{CLASSES[name]}ForObjectDetection")(config)  # type: ignore[no-any-return]


def ours(name: str, enact: str | None = None, **fields: Any) -> nn.Module:
    return build_model(name, enact, **{**OURS, **fields}).eval()


@torch.no_grad()
def shake(model: nn.Module) -> nn.Module:
    """New numbers everywhere, in the statistics of the backbone too, so that no two weights may be confused."""
    for tensor in model.state_dict().values():
        if tensor.dim() > 1:
            nn.init.xavier_uniform_(tensor)
        elif tensor.is_floating_point():
            tensor.uniform_(0.5, 1.5)
    return model.eval()


def batch_of_two() -> tuple[Tensor, Tensor]:
    pad_mask = torch.zeros(2, 150, 190, dtype=torch.bool)
    pad_mask[1, 100:], pad_mask[1, :, 130:] = True, True
    return torch.randn(2, 3, 150, 190).masked_fill(pad_mask.unsqueeze(1), 0), pad_mask


def assert_same_outputs(model: nn.Module, their_model: nn.Module) -> None:
    images, pad_mask = batch_of_two()
    with torch.no_grad():
        found = model(images, pad_mask)
        expected = their_model(pixel_values=images, pixel_mask=(~pad_mask).long())
    assert expected.logits.std() > 0.01
    assert_close(found["pred_logits"], expected.logits, atol=1e-4, rtol=1e-5)
    assert_close(found["pred_boxes"], expected.pred_boxes, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("position", ["sine", "learned"])
@pytest.mark.parametrize("name", NAMES)
def test_their_weights_give_their_outputs_from_memory_and_from_a_folder(
    name: str, position: str, tmp_path: Path
) -> None:
    source = shake(theirs(name, position))
    source.save_pretrained(tmp_path)  # type: ignore[operator]
    for weights in (source.state_dict(), pretrained_weights(tmp_path)):
        model = shake(ours(name, position_embedding=position))
        load_weights(model, weights)
        assert_same_outputs(model, source)


@pytest.mark.parametrize("position", ["sine", "learned"])
@pytest.mark.parametrize("name", NAMES)
def test_our_weights_give_our_outputs_there(name: str, position: str, tmp_path: Path) -> None:
    model = shake(ours(name, position_embedding=position))
    fields = vars(recipe(name, None, **{**OURS, "position_embedding": position}))
    save_huggingface(tmp_path / "new", model.state_dict(), fields, {1: "cat", 3: "dog"}, NUM_CLASSES)
    loaded = getattr(transformers, f"{CLASSES[name]}ForObjectDetection").from_pretrained(tmp_path / "new").eval()
    assert_same_outputs(model, loaded)
    assert loaded.config.id2label[3] == "dog"
    again = ours(name, position_embedding=position)
    load_weights(again, pretrained_weights(tmp_path / "new"))
    assert_close(dict(again.state_dict()), dict(model.state_dict()), atol=0, rtol=0)


@pytest.mark.parametrize("backbone", ["transformers", "timm"])
@pytest.mark.parametrize("name", NAMES)
def test_every_name_comes_back(name: str, backbone: str) -> None:
    state = ours(name).state_dict()
    converted = to_huggingface(state, backbone)
    assert not converted.keys() & state.keys()
    assert ("model.backbone.conv_encoder.model.layer1.0.conv1.weight" in converted) == (backbone == "timm")
    assert_close(from_huggingface(converted), dict(state), atol=0, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_a_published_backbone_of_either_depth_has_their_names_and_shapes(name: str) -> None:
    with torch.device("meta"):
        config = getattr(transformers, f"{CLASSES[name]}Config")(
            backbone_config=transformers.ResNetConfig(out_features=["stage4"]), num_labels=91, num_queries=300,
            use_timm_backbone=False, use_pretrained_backbone=False, backbone=None,
        )  # fmt: skip
        source = getattr(transformers, f"{CLASSES[name]}ForObjectDetection")(config)
        model = build_model(name, backbone="resnet50", backbone_weights=None, num_classes=91, num_queries=300)
    converted = from_huggingface(source.state_dict())
    own = {key: value.shape for key, value in model.state_dict().items() if "num_batches" not in key}
    found = {key: value.shape for key, value in converted.items() if "num_batches" not in key}
    assert found == own


def test_a_file_of_either_kind_is_read(tmp_path: Path) -> None:
    state = to_huggingface(ours("detr").state_dict())
    torch.save(state, tmp_path / "pytorch_model.bin")
    assert_close(pretrained_weights(tmp_path), state)
    assert_close(pretrained_weights(tmp_path / "pytorch_model.bin"), state)
    from safetensors.torch import save_file

    save_file(state, tmp_path / "other.safetensors")
    assert_close(pretrained_weights(tmp_path / "other.safetensors"), state)
    own = ours("detr").state_dict()
    torch.save({"model": own}, tmp_path / "ours.pth")
    assert_close(pretrained_weights(tmp_path / "ours.pth"), dict(own))


@pytest.mark.parametrize("name", NAMES)
def test_their_weights_start_a_detector_for_other_classes_with_enact(name: str, tmp_path: Path) -> None:
    source = shake(theirs(name))
    source.save_pretrained(tmp_path)  # type: ignore[operator]
    model = ours(name, "paper", num_classes=3)
    drawn = model.get_parameter("class_embed.weight").clone()
    notes = warm_start(model, pretrained_weights(tmp_path))
    rows = (NUM_CLASSES + 1, 4) if name == "detr" else (NUM_CLASSES, 3)
    assert notes == [
        "2 layers of ENACT are new and stay as drawn",
        f"the class head has {rows[0]} rows in the weights, {rows[1]} in the model, and stays as drawn",
    ]
    assert_close(model.get_parameter("class_embed.weight"), drawn)
    key = "encoder.layers.1.linear1.weight"
    assert_close(model.get_parameter(key), from_huggingface(source.state_dict())[key])


@pytest.mark.parametrize("name", NAMES)
def test_a_config_names_the_model_and_its_classes(name: str, tmp_path: Path) -> None:
    theirs(name).save_pretrained(tmp_path)  # type: ignore[operator]
    fields = fields_of(read_config(tmp_path))
    assert build_model(**{"name": fields.pop("model"), **OURS, **fields})
    assert {key: fields[key] for key in OURS.keys() & fields.keys()} == {key: OURS[key] for key in OURS.keys() & fields}
    assert OURS.keys() - fields.keys() == {"backbone_weights", "num_classes"}
    assert class_names_of(read_config(tmp_path)) == {}
    config = config_of(vars(recipe(name, None, **OURS)), NUM_CLASSES, {0: "cat", 6: "dog"})
    assert class_names_of(config) == {0: "cat", 6: "dog"}
    assert fields_of(config) == {"model": name, **fields}


@pytest.mark.parametrize(
    ("config", "backbone", "dilation"),
    [
        ({"backbone": "resnet101", "use_timm_backbone": True, "dilation": True}, "resnet101", True),
        ({"backbone_config": {"model_type": "timm_backbone", "backbone": "resnet50.a1_in1k"}}, "resnet50", False),
        ({"backbone_config": {"model_type": "timm_backbone", "backbone": "resnet50", "output_stride": 16}},
         "resnet50", True),
    ],
)  # fmt: skip
def test_a_config_with_a_backbone_of_timm_is_understood(
    config: dict[str, Any], backbone: str, dilation: bool
) -> None:
    fields = fields_of({"model_type": "detr", **config})
    assert (fields["backbone"], fields["dilation"]) == (backbone, dilation)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"model_type": "yolos"}, "model_type is 'yolos'"),
        ({"decoder_ffn_dim": 5}, "encoder_ffn_dim is None and decoder_ffn_dim 5"),
        ({"activation_function": "gelu"}, "activation_function is 'gelu'"),
        ({"backbone": "swin_tiny"}, "the backbone is swin_tiny"),
        ({"backbone_config": {"model_type": "resnet", "depths": [2, 1], "hidden_sizes": [8, 8]}}, "depths (2, 1)"),
    ],
)
def test_a_model_that_is_not_built_here_is_refused(change: dict[str, Any], text: str) -> None:
    with pytest.raises(InputError) as caught:
        fields_of({"model_type": "detr", **change})
    assert text in str(caught.value)


@pytest.mark.parametrize(
    ("name", "enact", "fields", "text"),
    [
        ("detr", "paper", {}, "no ENACT"),
        ("anchor_detr", None, {"num_query_position": 4}, "no Anchor DETR"),
        ("detr", None, {"backbone_norm": "group"}, "batch normalisation"),
    ],
)
def test_what_has_no_form_there_is_refused(name: str, enact: str | None, fields: dict[str, Any], text: str) -> None:
    state = ours(name, enact, **fields).state_dict()
    with pytest.raises(ValueError, match=text):
        to_huggingface(state)
    with pytest.raises(ValueError, match="Hugging Face"):
        config_of(vars(recipe("detr", "paper", **OURS)), NUM_CLASSES, {})


def test_weights_of_another_shape_are_named_in_our_terms() -> None:
    with pytest.raises(ValueError, match=r"query_embed\.weight has shape \(6, 32\), the model \(5, 32\)"):
        load_weights(ours("detr", num_queries=5), theirs("detr").state_dict())


def refusal(path: Path) -> str:
    with pytest.raises(InputError) as caught:
        pretrained_weights(path)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_files_that_hold_no_weights_are_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "check --pretrained" in refusal(tmp_path / "nowhere.bin")
    assert "neither model.safetensors nor pytorch_model.bin" in refusal(tmp_path)
    for name, text in (("a.safetensors", "not a safetensors file"), ("a.bin", "not a chec"), ("a.pth", "not a chec")):
        (tmp_path / name).write_bytes(b"Dear reader")
        assert text in refusal(tmp_path / name)
    torch.save({"lr": 1}, tmp_path / "b.bin")
    assert "not a state dict of tensors" in refusal(tmp_path / "b.bin")
    with pytest.raises(InputError, match=r"config\.json is missing"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text("[")
    with pytest.raises(InputError, match=r"config\.json cannot be read"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps([1]))
    with pytest.raises(InputError, match="must hold a JSON object"):
        read_config(tmp_path)
    monkeypatch.setitem(__import__("sys").modules, "safetensors.torch", None)
    assert "pip install safetensors" in refusal(tmp_path / "a.safetensors")


def test_nothing_is_said_of_weights_that_fit(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert warm_start(ours("detr"), theirs("detr").state_dict()) == []
    assert caplog.text == ""
