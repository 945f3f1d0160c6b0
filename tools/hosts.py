"""Trained detectors on the built-in scenes whose encoders are those that `enact.apply` supports, one for each kind.

Hugging Face's detectors have no backbone such as the small recipe's, so that only their encoders stand here, in the
place of ours and with its weights, which give the same outputs there.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from configs.schema import Config
from main import Run
from models.huggingface import ARCHITECTURES, config_of, encoder_to_huggingface
from preparation import pick_device
from tools.detector_files import load_detector
from tools.transformer_detr import TransformerDetr, is_transformer_detr
from util import checkpoint
from util.errors import InputError


class HuggingFaceEncoder(nn.Module):
    """An encoder of Hugging Face's DETR or Conditional DETR, called as `models.encoder.Encoder` is.

    Args:
        encoder: a DetrEncoder or ConditionalDetrEncoder.
    """

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder: Any = encoder
        known = inspect.signature(encoder.forward).parameters
        release_5 = "spatial_position_embeddings" in known
        self.position_name = "spatial_position_embeddings" if release_5 else "object_queries"

    @property
    def layers(self) -> nn.ModuleList:
        """Theirs."""
        layers: nn.ModuleList = self.encoder.layers
        return layers

    def forward(self, tokens: Tensor, position: Tensor, padding: Tensor | None) -> Tensor:
        """Tokens and position (B, N, C), padding (B, N) bool, True where padded, or None -> (B, N, C)."""
        real = tokens.new_ones(tokens.shape[:2], dtype=torch.long) if padding is None else (~padding).long()
        encoded = self.encoder(inputs_embeds=tokens, attention_mask=real, **{self.position_name: position})
        result: Tensor = encoded.last_hidden_state
        return result


class RTDetrEncoder(nn.Module):
    """Layers of Hugging Face's RT-DETR encoder, called as `models.encoder.Encoder` is.

    They know no padding, so that each image goes alone.

    Args:
        layers: RTDetrEncoderLayers.
    """

    def __init__(self, layers: nn.ModuleList) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, tokens: Tensor, position: Tensor, padding: Tensor | None) -> Tensor:
        """As `HuggingFaceEncoder`; zero where padded."""
        if padding is None:
            return self._encode(tokens, position)
        encoded = torch.zeros_like(tokens)
        for image, real in enumerate(~padding):
            encoded[image, real] = self._encode(tokens[image, real].unsqueeze(0), position[image, real].unsqueeze(0))[0]
        return encoded

    def _encode(self, tokens: Tensor, position: Tensor) -> Tensor:
        for layer in self.layers:
            encoded = layer(tokens, None, position)
            tokens = encoded[0] if isinstance(encoded, tuple) else encoded  # before release 5
        return tokens


MakeEncoder = Callable[[Config], HuggingFaceEncoder | RTDetrEncoder]


def _detr_encoder(config: Config) -> HuggingFaceEncoder:
    """Of their DETR or Conditional DETR."""
    family = ARCHITECTURES[config.model].removesuffix("ForObjectDetection")
    assert config.num_classes is not None
    theirs = _transformers(f"{family}Config").from_dict(config_of(vars(config), config.num_classes, {}))
    return HuggingFaceEncoder(_transformers(f"{family}Encoder", config.model)(theirs))


def _rt_detr_encoder(config: Config) -> RTDetrEncoder:
    theirs = _transformers("RTDetrConfig")(
        encoder_hidden_dim=config.hidden_dim, num_attention_heads=config.nheads, dropout=config.dropout,
        encoder_ffn_dim=config.dim_feedforward, encoder_activation_function="relu", attn_implementation="sdpa",
    )  # fmt: skip
    layer = _transformers("RTDetrEncoderLayer", "rt_detr")
    return RTDetrEncoder(nn.ModuleList(layer(theirs) for _ in range(config.enc_layers)))


def _transformers(name: str, model: str | None = None) -> Any:
    """A class of the package, or of its module for a model."""
    try:
        module = importlib.import_module(f"transformers.models.{model}.modeling_{model}" if model else "transformers")
    except ImportError:
        raise InputError("the package transformers is missing; install it, or leave its hosts out: --hosts") from None
    return getattr(module, name)


class Host(NamedTuple):
    """A kind of model that `enact.apply` supports.

    title: its name in tables.
    model: whose checkpoint it is measured with: "detr", "conditional_detr", or "transformer_detr".
    encoder: makes the encoder that stands in the place of ours; None: the model's own.
    part: the name of what is given to `enact.apply`; empty: the whole detector.
    """

    title: str
    model: str
    encoder: MakeEncoder | None = None
    part: str = ""


HOSTS = {
    "detr": Host("DETR", "detr"),
    "conditional_detr": Host("Conditional DETR", "conditional_detr"),
    "transformer": Host("nn.Transformer", "transformer_detr"),
    "transformer_encoder": Host("nn.TransformerEncoder", "transformer_detr", part="encoder"),
    "hf_detr": Host("Hugging Face DETR", "detr", _detr_encoder),
    "hf_conditional_detr": Host("Hugging Face Conditional DETR", "conditional_detr", _detr_encoder),
    "hf_rt_detr": Host("Hugging Face RT-DETR", "detr", _rt_detr_encoder),
}


def model_of(path: Path) -> str:
    """Whose checkpoint a file is, as in `Host.model` (InputError: of none that is dense)."""
    if is_transformer_detr(path):
        return "transformer_detr"
    config = load_detector(path, torch.device("cpu")).config
    if config.enact is not None or config.model == "anchor_detr":
        raise InputError(f"{path} is no dense DETR or Conditional DETR; give one that is")
    return config.model


def open_run(path: Path, folder: str, device: str) -> Run:
    """The detector of a checkpoint with its validation set, for `Run.evaluate`; its files go to `folder`."""
    other = is_transformer_detr(path)
    config = Config(**checkpoint.load(path)["config"]) if other else load_detector(path, torch.device("cpu")).config
    config = dataclasses.replace(config, eval=True, resume=str(path), output_dir=folder, num_workers=0)
    run = Run(config, pick_device(device), TransformerDetr if other else None)
    run.model.eval()
    return run


def move_encoder(run: Run, make: MakeEncoder) -> None:
    """Put the encoder that `make` builds in the place of the detector's own, with the same weights."""
    model: Any = run.model
    encoder = make(run.config)
    encoder.layers.load_state_dict(encoder_to_huggingface(model.encoder.state_dict(), encoder.layers.state_dict()))
    model.encoder = encoder.to(run.device).eval()
    model.skip_padding = False  # these take a mask, and no packed tokens
