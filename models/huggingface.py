"""State dicts and configurations of Hugging Face's DETR and Conditional DETR <-> ours.

The layout is that of the files (`model.safetensors`, `pytorch_model.bin`) of DetrForObjectDetection and
ConditionalDetrForObjectDetection. It has not changed since their first release; what `state_dict()` of a model in
memory calls some of its parts from release 5 on is read too.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from util.errors import InputError

StateDict = Mapping[str, Tensor]

MARKER = "class_labels_classifier.weight"
# Ours, and theirs in a file.
PREFIXES = (
    ("input_proj.", "model.input_projection."),
    ("query_embed.", "model.query_position_embeddings."),
    ("encoder.layers.", "model.encoder.layers."),
    ("decoder.layers.", "model.decoder.layers."),
    ("decoder.norm.", "model.decoder.layernorm."),
    ("decoder.query_scale.", "model.decoder.query_scale."),
    ("decoder.ref_point_head.", "model.decoder.ref_point_head."),
    ("class_embed.", "class_labels_classifier."),
    ("bbox_embed.", "bbox_predictor."),
    ("position_embedding.row_embed.", "model.backbone.position_embedding.row_embeddings."),
    ("position_embedding.col_embed.", "model.backbone.position_embedding.column_embeddings."),
    ("backbone.body.", "model.backbone.conv_encoder.model."),
)
FEED_FORWARD = {"linear1": "fc1", "linear2": "fc2"}
ENCODER_PARTS = FEED_FORWARD | {"norm1": "self_attn_layer_norm", "norm2": "final_layer_norm"}
DECODER_PARTS = FEED_FORWARD | {
    "norm1": "self_attn_layer_norm", "norm2": "encoder_attn_layer_norm", "norm3": "final_layer_norm",
}  # fmt: skip
LAYER = re.compile(r"^(?P<stack>(?:en|de)coder)\.layers\.(?P<number>\d+)\.(?P<part>\w+)\.(?P<rest>.+)$")
# In memory from release 5 on -> in a file.
NEW_NAMES = tuple((re.compile(pattern), name) for pattern, name in (
    (r"^model\.backbone\.model\.", "model.backbone.conv_encoder.model."),
    (r"^model\.position_embedding\.", "model.backbone.position_embedding."),
    (r"\.o_proj\.", ".out_proj."),
    (r"\.mlp\.(fc[12])\.", r".\1."),
    (r"\.self_attn\.([qk])_(content|pos)_proj\.", r".sa_\1\2_proj."),
    (r"\.encoder_attn\.([qk])_(content|pos|pos_sine)_proj\.", r".ca_\1\2_proj."),
))  # fmt: skip
NEW_CONDITIONAL_NAMES = tuple((re.compile(pattern), name) for pattern, name in (
    (r"(\.decoder\.layers\.\d+)\.self_attn\.v_proj\.", r"\1.sa_v_proj."),
    (r"(\.decoder\.layers\.\d+)\.encoder_attn\.v_proj\.", r"\1.ca_v_proj."),
))  # fmt: skip
PROJECTIONS = ("q_proj", "k_proj", "v_proj")

# Depths of a ResNet's stages and the kind of its blocks -> its name here.
RESNETS = {
    ((1, 1, 1, 1), "basic"): "resnet10",
    ((2, 2, 2, 2), "basic"): "resnet18",
    ((3, 4, 6, 3), "basic"): "resnet34",
    ((3, 4, 6, 3), "bottleneck"): "resnet50",
    ((3, 4, 23, 3), "bottleneck"): "resnet101",
}
STAGE_WIDTHS = {"basic": (64, 128, 256, 512), "bottleneck": (256, 512, 1024, 2048)}
# A field of our config -> a key of theirs.
FIELDS = {
    "hidden_dim": "d_model",
    "nheads": "encoder_attention_heads",
    "enc_layers": "encoder_layers",
    "dec_layers": "decoder_layers",
    "dim_feedforward": "encoder_ffn_dim",
    "dropout": "dropout",
    "num_queries": "num_queries",
    "position_embedding": "position_embedding_type",
}
SAME_IN_DECODER = {
    "encoder_attention_heads": "decoder_attention_heads",
    "encoder_ffn_dim": "decoder_ffn_dim",
}
ARCHITECTURES = {"detr": "DetrForObjectDetection", "conditional_detr": "ConditionalDetrForObjectDetection"}
NO_NAME = "N/A"  # in Hugging Face's COCO lists, for the ids that COCO does not use


def is_huggingface(state_dict: StateDict) -> bool:
    """Whether these are weights of Hugging Face's DETR or Conditional DETR for detection."""
    return MARKER in state_dict


def from_huggingface(state_dict: StateDict) -> dict[str, Tensor]:
    """Hugging Face's layout -> ours; a name that is not known stays as it is, so that loading names it.

    Args:
        state_dict: of a file, or of a model in memory; the backbone by their own ResNet or by timm's.
    """
    state = _as_in_file(state_dict)
    conditional = _is_conditional(state)
    return _pack_projections({_our_name(key, conditional): value for key, value in state.items()})


def to_huggingface(state_dict: StateDict, backbone: str = "transformers") -> dict[str, Tensor]:
    """Our layout -> that of a Hugging Face file, which `from_pretrained` of every release reads.

    Args:
        state_dict: of a dense DETR or Conditional DETR.
        backbone: whose names the backbone's weights get: "transformers" (`use_timm_backbone=False`) or "timm".

    Raises:
        ValueError: Hugging Face has no such model.
    """
    _demand_known(state_dict)
    state = _as_in_their_file(state_dict, backbone)
    for key in [key for key in state if ".position_embedding." in key]:  # the name in files of release 5
        state[key.replace("model.backbone.", "model.")] = state[key].clone()
    return state


def encoder_to_huggingface(state_dict: StateDict, names: Iterable[str]) -> dict[str, Tensor]:
    """The weights of our encoder under the names that one of Hugging Face's has in memory.

    Args:
        state_dict: of a dense `models.encoder.Encoder`.
        names: the keys of their list of layers, in any release: DetrEncoderLayers, ConditionalDetrEncoderLayers or
            RTDetrEncoderLayers.

    Raises:
        KeyError: ours has no such weight.
    """
    ours = _as_in_their_file({f"encoder.{key}": value for key, value in state_dict.items()}, "transformers")
    return {name: ours[_replaced(f"model.encoder.layers.{name}", NEW_NAMES)] for name in names}


def fields_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of our config that a Hugging Face `config.json` decides, "model" among them.

    Raises:
        InputError: it is of another model, or of a form of this one that is not built here.
    """
    model = config.get("model_type")
    if model not in ARCHITECTURES:
        raise InputError(f"model_type is {model!r}, not one of {', '.join(ARCHITECTURES)}")
    for here, there in SAME_IN_DECODER.items():
        if config.get(here) != config.get(there):
            raise InputError(f"{here} is {config.get(here)!r} and {there} {config.get(there)!r}; here both are one")
    if config.get("activation_function", "relu") != "relu":
        raise InputError(f"activation_function is {config['activation_function']!r}; here it is always relu")
    fields = {ours: config[theirs] for ours, theirs in FIELDS.items() if theirs in config}
    return {"model": model, **fields, **_backbone_fields(config)}


def class_names_of(config: Mapping[str, Any]) -> dict[int, str]:
    """The names of the labels in a Hugging Face `config.json`; without those that it made up itself."""
    names = {int(label): str(name) for label, name in (config.get("id2label") or {}).items()}
    return {label: name for label, name in names.items() if name not in (NO_NAME, f"LABEL_{label}")}


def config_of(fields: Mapping[str, Any], num_classes: int, class_names: Mapping[int, str]) -> dict[str, Any]:
    """What `config.json` must say of a detector, for `to_huggingface` weights with the backbone "transformers".

    Args:
        fields: those of our config.
        num_classes: the largest label + 1.
        class_names: by label; the others are called "N/A".

    Raises:
        ValueError: Hugging Face has no such model.
    """
    if fields["model"] not in ARCHITECTURES or fields["enact"] is not None or fields["dilation"]:
        raise ValueError("Hugging Face's own models have no ENACT, no Anchor DETR and no dilation")
    depths, blocks = next(key for key, name in RESNETS.items() if name == fields["backbone"])
    stages = fields["backbone_stage"]
    names = {label: class_names.get(label, NO_NAME) for label in range(num_classes)}
    sizes = {theirs: fields[ours] for ours, theirs in FIELDS.items()}
    return {
        "architectures": [ARCHITECTURES[fields["model"]]],
        "model_type": fields["model"],
        **sizes,
        **{there: sizes[here] for here, there in SAME_IN_DECODER.items()},
        "use_timm_backbone": False,
        "use_pretrained_backbone": False,
        "backbone": None,
        "backbone_config": {
            "model_type": "resnet",
            "embedding_size": 64,
            "hidden_sizes": list(STAGE_WIDTHS[blocks][:stages]),
            "depths": list(depths[:stages]),
            "layer_type": blocks,
            "out_features": [f"stage{stages}"],
        },
        "id2label": {str(label): name for label, name in names.items()},
        "label2id": {name: label for label, name in names.items()},
    }


def _is_conditional(state: StateDict) -> bool:
    return any(".ca_kcontent_proj." in key for key in state)


def _as_in_their_file(state_dict: StateDict, backbone: str) -> dict[str, Tensor]:
    conditional = _is_conditional(state_dict)
    return {
        _their_name(part, conditional, backbone): tensor.contiguous()  # safetensors wants no other
        for key, value in state_dict.items()
        for part, tensor in _separate_projections(key, value)
    }


def _as_in_file(state_dict: StateDict) -> dict[str, Tensor]:
    state = {_replaced(key, NEW_NAMES): value for key, value in state_dict.items()}
    if _is_conditional(state):
        state = {_replaced(key, NEW_CONDITIONAL_NAMES): value for key, value in state.items()}
    return state


def _replaced(key: str, table: tuple[tuple[re.Pattern[str], str], ...]) -> str:
    for pattern, name in table:
        key = pattern.sub(name, key)
    return key


def _parts(stack: str, conditional: bool) -> dict[str, str]:
    """Names of the parts of a layer, ours and theirs."""
    if stack == "encoder":
        return ENCODER_PARTS
    return DECODER_PARTS | {"cross_attn" if conditional else "multihead_attn": "encoder_attn"}


def _our_name(key: str, conditional: bool) -> str:
    for ours, theirs in PREFIXES:
        if key.startswith(theirs):
            key = ours + key.removeprefix(theirs)
            break
    layer = LAYER.match(key)
    if layer is not None:
        parts = {theirs: ours for ours, theirs in _parts(layer["stack"], conditional).items()}
        key = "{stack}.layers.{number}.{part}.{rest}".format(
            **{**layer.groupdict(), "part": parts.get(layer["part"], layer["part"])}
        )
    return _torchvision_name(key) if key.startswith("backbone.body.") else key


def _their_name(key: str, conditional: bool, backbone: str) -> str:
    layer = LAYER.match(key)
    if layer is not None:
        parts = _parts(layer["stack"], conditional)
        key = "{stack}.layers.{number}.{part}.{rest}".format(
            **{**layer.groupdict(), "part": parts.get(layer["part"], layer["part"])}
        )
    if key.startswith("backbone.body.") and backbone == "transformers":
        key = _transformers_name(key)
    return next(theirs + key.removeprefix(ours) for ours, theirs in PREFIXES if key.startswith(ours))


def _torchvision_name(key: str) -> str:
    """Hugging Face's ResNet -> torchvision's, which timm shares; what has that form already stays."""
    key = key.replace("embedder.embedder.convolution.", "conv1.").replace("embedder.embedder.normalization.", "bn1.")
    key = re.sub(r"encoder\.stages\.(\d)\.", lambda found: f"layer{int(found[1]) + 1}.", key)
    key = re.sub(r"(layer\d)\.layers\.(\d+)\.", r"\1.\2.", key)
    key = re.sub(r"\.layer\.(\d)\.convolution\.", lambda found: f".conv{int(found[1]) + 1}.", key)
    key = re.sub(r"\.layer\.(\d)\.normalization\.", lambda found: f".bn{int(found[1]) + 1}.", key)
    return key.replace("shortcut.convolution.", "downsample.0.").replace("shortcut.normalization.", "downsample.1.")


def _transformers_name(key: str) -> str:
    """Torchvision's ResNet -> Hugging Face's."""
    key = key.replace("downsample.0.", "shortcut.convolution.").replace("downsample.1.", "shortcut.normalization.")
    key = re.sub(r"(layer\d\.\d+)\.conv(\d)\.", lambda found: f"{found[1]}.layer.{int(found[2]) - 1}.convolution.", key)
    key = re.sub(r"(layer\d\.\d+)\.bn(\d)\.", lambda found: f"{found[1]}.layer.{int(found[2]) - 1}.normalization.", key)
    key = re.sub(r"layer(\d)\.(\d+)\.", lambda found: f"encoder.stages.{int(found[1]) - 1}.layers.{found[2]}.", key)
    return key.replace("body.conv1.", "body.embedder.embedder.convolution.").replace(
        "body.bn1.", "body.embedder.embedder.normalization."
    )


def _pack_projections(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """q_proj, k_proj and v_proj of each attention -> in_proj_weight and in_proj_bias; an incomplete three stays."""
    packed = dict(state)
    marker = f".{PROJECTIONS[0]}."
    for key in state:
        keys = [key.replace(marker, f".{name}.") for name in PROJECTIONS]
        if marker in key and all(part in state for part in keys):
            attention, _, kind = key.partition(marker)
            packed[f"{attention}.in_proj_{kind}"] = torch.cat([packed.pop(part) for part in keys])
    return packed


def _separate_projections(key: str, value: Tensor) -> list[tuple[str, Tensor]]:
    """in_proj_weight or in_proj_bias -> q_proj, k_proj and v_proj; anything else alone."""
    attention, packed, kind = key.partition(".in_proj_")
    if not packed:
        return [(key, value)]
    return [
        (f"{attention}.{name}.{kind}", part.clone())
        for name, part in zip(PROJECTIONS, value.chunk(3), strict=True)
    ]


def _demand_known(state_dict: StateDict) -> None:
    reasons = {
        "pattern.weight": "no Anchor DETR",
        ".information.probability.": "no ENACT (enact.apply adds it to their models)",
    }
    for marker, reason in reasons.items():
        if any(marker in key for key in state_dict):
            raise ValueError(f"Hugging Face has {reason}; nothing is converted")
    if "backbone.body.bn1.running_mean" not in state_dict:
        raise ValueError("Hugging Face's ResNet has batch normalisation, these weights have none; nothing is converted")


def _backbone_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    own = config.get("backbone_config") or {}
    if own.get("model_type") == "resnet":
        return _resnet_fields(own)
    name = own.get("backbone") or config.get("backbone") or "resnet50"
    name = str(name).split(".")[0]
    if name not in RESNETS.values():
        raise InputError(f"the backbone is {name}; choose a model with one of {', '.join(RESNETS.values())}")
    return {"backbone": name, "dilation": bool(config.get("dilation")) or own.get("output_stride") == 16}


def _resnet_fields(resnet: Mapping[str, Any]) -> dict[str, Any]:
    blocks = resnet.get("layer_type", "bottleneck")
    depths, widths = tuple(resnet["depths"]), tuple(resnet["hidden_sizes"])
    stages = len(depths)
    for (known_depths, known_blocks), name in RESNETS.items():
        shape = known_depths[:stages], known_blocks, STAGE_WIDTHS[known_blocks][:stages]
        if (depths, blocks, widths) == shape and resnet.get("out_features") == [f"stage{stages}"]:
            return {"backbone": name, "dilation": False, "backbone_stage": stages}
    raise InputError(f"the ResNet has {blocks} blocks, depths {depths} and widths {widths}; no backbone here is that")
