"""What a command needs before it can run: device, data, checkpoint, optimizer, out of its configuration."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from configs.schema import Config
from datasets import CocoDetection, build_coco, eval_transform, prepare_shapes, train_transform
from models.pretrained import pretrained_weights
from util import checkpoint, distributed
from util.errors import InputError


def pick_device(name: str) -> torch.device:
    """The device of this process; "auto" takes a GPU where there is one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"no such device: {name}; try --device cpu or --device cuda") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: this torch sees no GPU; use --device cpu, or install a CUDA build of torch")
    if device.type == "cuda" and distributed.is_launched():
        return torch.device("cuda", distributed.local_rank())
    return device


def demand_same_settings(config: Config) -> None:
    """Processes that were started with different flags would wait for one another for ever."""
    settings = [dataclasses.asdict(config), *distributed.gather_objects(dataclasses.asdict(config))]
    different = [name for name in settings[0] if any(other[name] != settings[0][name] for other in settings)]
    if different:
        values = [other[different[0]] for other in settings[1:]]
        raise InputError(f"the processes were started with different --{different[0]}: {values}; give all the same")


def build_data(config: Config) -> tuple[CocoDetection, CocoDetection]:
    """The training and the validation set."""
    if config.coco_path is not None:
        root = Path(config.coco_path)
    else:
        with distributed.node_leader_first():
            root = prepare_shapes(num_train=config.shapes_train, num_val=config.shapes_val)
    augment = train_transform(
        config.train_short_sides, config.max_long_side, config.crop_short_sides, config.crop_range
    )
    resize = eval_transform(config.eval_short_side, config.max_long_side)
    train = build_coco(root, "train", augment, config.seed, config.max_bad_images)
    return train, build_coco(root, "val", resize, config.seed)


def checkpoint_to_resume(config: Config) -> Path | None:
    """The file that --resume names; for "auto" the output folder's newest, if it has one."""
    if config.resume != "auto":
        return Path(config.resume) if config.resume else None
    own = checkpoint.newest(default_folder(config))
    found = set(distributed.gather_objects(own))
    if len(found) > 1:
        raise InputError(f"--resume auto: the processes see different checkpoints: {found}; share one --output_dir")
    return own


def default_folder(config: Config) -> Path:
    variant = {None: "", "paper": "_enact"}.get(config.enact, f"_enact_{config.enact}")
    return Path(config.output_dir or f"outputs/{config.model}{variant}")


def complete(config: Config, train_set: CocoDetection, val_set: CocoDetection, resumed: bool) -> Config:
    """Fill in what the data decides; weights that a checkpoint brings need not be fetched first."""
    num_classes = config.num_classes or train_set.num_classes
    for name, dataset in (("training", train_set), ("validation", val_set)):
        if dataset.num_classes > num_classes:
            raise InputError(
                f"the {name} annotations have the category id {dataset.num_classes - 1}, and the detector is for ids "
                f"below {num_classes}; give --num_classes {dataset.num_classes}, or renumber the categories"
            )
    return dataclasses.replace(
        config,
        num_classes=num_classes,
        output_dir=str(default_folder(config)),
        backbone_weights=None if resumed or config.pretrained else config.backbone_weights,
    )


def weights_to_start_from(path: Path) -> tuple[dict[str, Tensor], bool | None]:
    """The weights in any file that `pretrained_weights` reads; whether they are of ENACT official, if the file says."""
    if path.suffix == ".pth" and path.is_file():
        saved = checkpoint.load(path)
        config = saved.get("config")
        return saved["model"], config.get("enact") == "official" if isinstance(config, dict) else None
    return pretrained_weights(path), None


def freeze(model: nn.Module, parts: Sequence[str]) -> None:
    """Train no parameter of some parts.

    Args:
        model: a detector.
        parts: beginnings of names, such as "backbone" or "encoder.layers.0".

    Raises:
        InputError: there is no such part, or nothing would be left to train.
    """
    for part in parts:
        chosen = [parameter for name, parameter in model.named_parameters() if f"{name}.".startswith(f"{part}.")]
        if not chosen:
            known = ", ".join(dict.fromkeys(name.split(".")[0] for name, _ in model.named_parameters()))
            raise InputError(f"--freeze: the detector has no part {part!r}; its parts are {known}")
        for parameter in chosen:
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise InputError("--freeze: nothing is left to train; name fewer parts, or use --eval")


def build_optimizer(model: nn.Module, config: Config) -> torch.optim.Optimizer:
    """AdamW with one learning rate for the backbone and one for the rest (spec 5.2)."""
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [parameter for name, parameter in trained if not name.startswith("backbone.")]},
        {
            "params": [parameter for name, parameter in trained if name.startswith("backbone.")],
            "lr": config.lr_backbone,
        },
    ]
    fused = trained[0][1].device.type == "cuda"  # which `StepGuard` needs there
    return torch.optim.AdamW(groups, lr=config.lr, weight_decay=config.weight_decay, fused=fused)
