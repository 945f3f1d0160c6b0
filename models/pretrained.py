"""Weights to start from, out of any file that holds them; and folders in Hugging Face's form."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from models.huggingface import config_of, to_huggingface
from util import checkpoint
from util.errors import InputError

CONFIG_NAME = "config.json"
SAFETENSORS_NAME = "model.safetensors"
WEIGHT_NAMES = (SAFETENSORS_NAME, "pytorch_model.bin")


def pretrained_weights(path: Path) -> dict[str, Tensor]:
    """The weights in a file: what `load_weights` and `warm_start` take.

    Args:
        path: a checkpoint of ours or a published one; a `.safetensors` file or a bare state dict with the suffix
            `.bin`, as Hugging Face has them; or a folder with `model.safetensors` or `pytorch_model.bin`.

    Raises:
        InputError: there is no such file, it holds no weights, or safetensors is not installed.
    """
    file = _file_of(Path(path))
    if file.suffix == ".safetensors":
        return _read_safetensors(file)
    if file.suffix == ".bin":
        return _read_bare(file)
    weights: dict[str, Tensor] = checkpoint.load(file)["model"]
    return weights


def read_config(folder: Path) -> dict[str, Any]:
    """The `config.json` of a folder in Hugging Face's form.

    Raises:
        InputError: it is missing or is no JSON object.
    """
    path = Path(folder) / CONFIG_NAME
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path} is missing; it says which model the weights are of") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {' '.join(str(error).split())}") from None
    if not isinstance(config, dict):
        raise InputError(f"{path} must hold a JSON object")
    return config


def save_huggingface(
    folder: Path,
    state_dict: Mapping[str, Tensor],
    fields: Mapping[str, Any],
    class_names: Mapping[int, str],
    num_classes: int,
) -> None:
    """Write a detector so that Hugging Face's `from_pretrained(folder)` reads it.

    Args:
        folder: is made; gets `config.json` and `model.safetensors`.
        state_dict: of a dense DETR or Conditional DETR of ours.
        fields: those of its config.
        class_names: by label.
        num_classes: the largest label + 1.

    Raises:
        ValueError: Hugging Face has no such model.
        InputError: safetensors is not installed.
    """
    config = config_of(fields, num_classes, class_names)
    safetensors = _safetensors()
    state = to_huggingface(state_dict)
    folder.mkdir(parents=True, exist_ok=True)
    safetensors.save_file(state, folder / SAFETENSORS_NAME, {"format": "pt"})
    (folder / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _file_of(path: Path) -> Path:
    """`path`, or the file with the weights in it."""
    if not path.is_dir():
        if path.is_file():
            return path
        raise InputError(f"no weights at {path}; check --pretrained")
    for name in WEIGHT_NAMES:
        if (path / name).is_file():
            return path / name
    raise InputError(f"the folder {path} holds neither {' nor '.join(WEIGHT_NAMES)}; name the file itself")


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        weights: dict[str, Tensor] = _safetensors().load_file(path)
    except InputError:
        raise
    except Exception as error:  # the library has its own kinds, whatever the damage
        raise InputError(f"{path} is not a safetensors file: {' '.join(str(error).split())}") from None
    return weights


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError:
        raise InputError("safetensors is not installed; install it: pip install safetensors") from None
    return safetensors.torch


def _read_bare(path: Path) -> dict[str, Tensor]:
    weights = checkpoint.read_safely(path)
    if not isinstance(weights, dict) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise InputError(f"{path} is not a state dict of tensors")
    return weights
