"""A detector out of a file: ours, a published one, or Hugging Face's; and the images it was validated on."""

from __future__ import annotations

import argparse
import dataclasses
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from configs.schema import FIELD_NAMES, Config, recipe
from datasets import prepare_shapes
from datasets.annotations import read_annotations
from datasets.scenes import CLASS_NAMES
from datasets.yolo import is_yolo, read_yolo
from models import build_model_from, load_weights
from models.checkpoints import OUR_ENACT, from_published, is_official
from models.huggingface import class_names_of, fields_of
from models.pretrained import pretrained_weights, read_config
from preparation import pick_device
from util import checkpoint
from util.errors import InputError
from util.yaml_files import read_yaml

logger = logging.getLogger(__name__)

BARE_SUFFIXES = (".safetensors", ".bin")
# Fields that the argparse Namespace of a published checkpoint says, under the same names.
PUBLISHED_FIELDS = ("backbone", "dilation", "position_embedding", "nheads", "smoothing_sigma", "spatial_prior")
# Blocks of a ResNet's third stage, and whether they are bottlenecks -> its name.
BACKBONES = {(1, False): "resnet10", (2, False): "resnet18", (6, False): "resnet34", (6, True): "resnet50",
             (23, True): "resnet101"}  # fmt: skip
COCO_CLASSES = 91


class LoadedDetector(NamedTuple):
    """A detector, ready to detect; its configuration; and the names of its labels, as far as they are known."""

    model: nn.Module
    config: Config
    class_names: Mapping[int, str]


class _File(NamedTuple):
    """What a file holds: weights in any layout, fields of the config, names of the labels if it has them."""

    weights: Mapping[str, Tensor]
    fields: dict[str, Any]
    class_names: Mapping[int, str] | None
    complete: bool  # the fields are a whole configuration


def add_detector_flags(parser: argparse.ArgumentParser, other_files: str = "") -> None:
    """--checkpoint and what else may have to be said about it; see `fields_from`."""
    parser.add_argument(
        "--checkpoint", type=Path, required=True,
        help=f"a checkpoint that main.py wrote, a published one, or a Hugging Face folder or file{other_files}",
    )  # fmt: skip
    parser.add_argument(
        "--model", choices=("detr", "conditional_detr", "anchor_detr"), help="default: as the checkpoint says"
    )
    parser.add_argument(
        "--enact", choices=("paper", "official", "plus"), help="its encoder's variant; default: as the checkpoint says"
    )
    parser.add_argument(
        "--config", type=Path,
        help="YAML with fields that the checkpoint does not say, such as configs/detr_r50_dc5.yaml for a published one",
    )  # fmt: skip


def fields_from(options: argparse.Namespace) -> dict[str, Any]:
    """The fields of the config that the flags of `add_detector_flags` give."""
    fields: dict[str, Any] = {}
    if options.config is not None:
        try:
            content = read_yaml(options.config)
        except OSError as error:
            raise InputError(f"cannot read the config {options.config}: {error.strerror}; check --config") from None
        if not isinstance(content, dict) or content.keys() - FIELD_NAMES:
            raise InputError(f"{options.config} must hold fields of the config, such as `model: detr`")
        fields |= content
    return fields | {name: getattr(options, name) for name in ("model", "enact") if getattr(options, name) is not None}


def load_detector(path: Path, device: torch.device, fields: Mapping[str, Any] | None = None) -> LoadedDetector:
    """The detector of a file.

    Args:
        path: a checkpoint that main.py wrote; a published one, which says nothing or little about its model: what its
            tensors do not show is as in `recipe`; a folder or a file in Hugging Face's form.
        device: to put it on.
        fields: of the config, that hold over what the file says.

    Raises:
        InputError: there is no such file, or it does not say enough, or what it says does not fit its weights.
    """
    file = _read(Path(path))
    try:
        config = _config_of(file, dict(fields or {}), path)
        model = build_model_from(config)
        load_weights(model, file.weights)
    except ValueError as error:
        raise error if isinstance(error, InputError) else InputError(f"{path}: {error}") from None
    names = file.class_names
    if names is None:
        names = class_names(config) if file.complete else _coco_names(config)
    return LoadedDetector(model.to(device).eval(), config, names)


def inference_device(name: str) -> torch.device:
    """The device of a command that only detects; "auto" takes CUDA, else the CPU, and "mps" is taken where asked."""
    device = pick_device(name)
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise InputError("--device mps: this torch sees no Apple GPU; use --device cpu")
    return device


def validation_images(config: Config, count: int) -> list[Path]:
    """The first images of the validation set that a detector was trained with."""
    image_dir, dataset = _validation_set(config)
    images = sorted(dataset["images"], key=lambda image: int(image["id"]))
    return [image_dir / image["file_name"] for image in images[:count]]


def class_names(config: Config) -> Mapping[int, str]:
    """The names of the labels, from the data set; none where it is not on this machine."""
    if config.coco_path is None:
        return CLASS_NAMES
    try:
        categories = _validation_set(config)[1]["categories"]
    except InputError as error:
        logger.info("classes are shown by number: %s", error)
        return {}
    return {category["id"]: category["name"] for category in categories}


def _validation_set(config: Config) -> tuple[Path, dict[str, Any]]:
    """The folder of the validation images, and their annotations in COCO's form."""
    if config.coco_path is None:
        root = prepare_shapes(num_train=config.shapes_train, num_val=config.shapes_val)
    else:
        root = Path(config.coco_path)
    if is_yolo(root):
        split = read_yolo(root, "val")
        return split.image_dir, split.dataset
    dataset: dict[str, Any] = read_annotations(root / "annotations" / "instances_val2017.json").dataset
    return root / "val2017", dataset


def _read(path: Path) -> _File:
    if not path.exists():
        raise InputError(f"no checkpoint at {path}; check --checkpoint")
    if path.is_dir():
        return _read_huggingface(path)
    if path.suffix in BARE_SUFFIXES:
        return _File(pretrained_weights(path), {}, None, complete=False)
    saved = checkpoint.load(path)
    config: Any = saved.get("config")
    if not isinstance(config, dict):
        said = vars(saved["args"]) if isinstance(saved.get("args"), argparse.Namespace) else {}
        return _File(saved["model"], {name: said[name] for name in PUBLISHED_FIELDS if name in said}, None, False)
    foreign = config.keys() - FIELD_NAMES
    if foreign:
        logger.warning("%s: fields that are not known any more are left out: %s", path, ", ".join(sorted(foreign)))
    known = {name: value for name, value in config.items() if name in FIELD_NAMES}
    return _File(saved["model"], known, saved.get("class_names"), complete=True)


def _read_huggingface(folder: Path) -> _File:
    weights, config = pretrained_weights(folder), read_config(folder)
    try:
        return _File(weights, fields_of(config), class_names_of(config), complete=False)
    except InputError as error:
        raise InputError(f"{folder}: {error}") from None


def _config_of(file: _File, fields: dict[str, Any], path: Path) -> Config:
    fields = {**fields, "backbone_weights": None}
    if file.complete:
        return dataclasses.replace(Config(**file.fields), **fields)
    state = from_published(file.weights)
    known = {"model": _model_of(state), **_fields_of_shapes(state), **file.fields, **fields}
    if any(OUR_ENACT in key for key in state) and "enact" not in known:
        if not is_official(file.weights):
            raise InputError(f"{path} does not say which variant of ENACT it is; give it: --enact paper or plus")
        known["enact"] = "official"
    return recipe(known.pop("model"), known.pop("enact", None), **known)


def _model_of(state: Mapping[str, Tensor]) -> str:
    if "pattern.weight" in state:
        return "anchor_detr"
    return "conditional_detr" if any(".ca_kcontent_proj." in key for key in state) else "detr"


def _fields_of_shapes(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """What the tensors of a detector in our layout say of its config."""
    if "class_embed.weight" not in state:
        raise ValueError("it holds no detector of ours, nor a published or Hugging Face one: no class head is found")
    rows, width = state["class_embed.weight"].shape
    lengths = {
        "num_queries": "query_embed.weight",
        "num_query_pattern": "pattern.weight",
        "num_query_position": "position.weight",
    }
    feed_forward = next((state[key] for key in state if key.endswith("linear1.weight")), None)
    blocks = _count(state, r"backbone\.body\.layer3\.(\d+)\.")
    backbone = BACKBONES.get((blocks, "backbone.body.layer3.0.conv3.weight" in state))
    return {
        "num_classes": rows - 1 if _model_of(state) == "detr" else rows,
        "hidden_dim": width,
        "enc_layers": _count(state, r"encoder\.layers\.(\d+)\."),
        "dec_layers": _count(state, r"decoder\.layers\.(\d+)\."),
        "position_embedding": "learned" if "position_embedding.row_embed.weight" in state else "sine",
        **({} if feed_forward is None else {"dim_feedforward": feed_forward.shape[0]}),
        **({} if backbone is None else {"backbone": backbone}),
        **({} if "position.weight" in state else {"spatial_prior": "grid"}),  # a lattice is not stored
        **{name: len(state[key]) for name, key in lengths.items() if key in state},
    }


def _count(state: Mapping[str, Tensor], pattern: str) -> int:
    """How many numbers stand at a place of the names."""
    found = (re.match(pattern, key) for key in state)
    return len({match[1] for match in found if match})


def _coco_names(config: Config) -> Mapping[int, str]:
    """COCO's names, for a published detector of its classes."""
    if config.num_classes != COCO_CLASSES:
        return {}
    from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights

    names = FasterRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"]
    return {number: name for number, name in enumerate(names) if number and name != "N/A"}
