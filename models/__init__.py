"""The detectors, and the one place where they are put together.

    model = build_model("detr", enact="paper", num_classes=91)
    load_weights(model, torch.load("checkpoint.pth", weights_only=True)["model"])
    outputs = model(images, pad_mask)
    losses = build_criterion("detr", num_classes=91)(outputs, targets)
    detections = build_postprocessor("detr")(outputs, sizes)
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from configs.schema import Config, recipe
from enact import EnactAttention
from models.backbone import Backbone
from models.checkpoints import load_weights
from models.criterion import Criterion, SoftmaxClassLoss
from models.detr import Detr
from models.encoder import Encoder
from models.matcher import HungarianMatcher, softmax_class_cost
from models.position_encoding import build_position_embedding
from models.postprocess import Postprocessor, softmax_detections

__all__ = ["build_criterion", "build_model", "build_postprocessor", "load_weights"]

# COCO's largest category id, and 1.
COCO_CLASSES = 91


def build_model(name: str, enact: str | None = None, **overrides: Any) -> nn.Module:
    """A detector with new weights.

    Args:
        name: "detr".
        enact: None for a dense encoder, "paper" or "official".
        overrides: fields of `Config`; the rest is the recipe of this row of the results table.

    Returns:
        A module: (images float (B, 3, H, W), pad_mask bool (B, H, W) True where padded) -> {"pred_logits" (B, Q, K),
        "pred_boxes" (B, Q, 4) cxcywh in [0, 1], "aux_outputs": the same two for each earlier decoder layer}.
    """
    return build_model_from(recipe(name, enact, **overrides))


def build_model_from(config: Config) -> nn.Module:
    """The detector that `config` describes."""
    return _BUILDERS[config.model](config)


def build_criterion(name: str, **overrides: Any) -> Criterion:
    """The training loss of a detector; `overrides` as in `build_model`."""
    return build_criterion_from(recipe(name, **overrides))


def build_criterion_from(config: Config) -> Criterion:
    """The training loss that `config` describes."""
    matcher = HungarianMatcher(
        softmax_class_cost, config.set_cost_class, config.set_cost_bbox, config.set_cost_giou
    )
    return Criterion(
        matcher,
        SoftmaxClassLoss(config.eos_coef),
        config.num_classes or COCO_CLASSES,
        class_coef=config.cls_loss_coef,
        bbox_coef=config.bbox_loss_coef,
        giou_coef=config.giou_loss_coef,
        num_layers=config.dec_layers if config.aux_loss else 1,
    )


def build_postprocessor(name: str) -> Postprocessor:
    """(outputs, sizes (B, 2) height and width) -> [{"scores", "labels", "boxes" xyxy in pixels}]."""
    return {"detr": softmax_detections}[name]


def _self_attention(config: Config) -> Callable[[], nn.Module]:
    """Makes the self-attention of one encoder layer: the seam at which ENACT enters a detector."""
    options = {"dropout": config.dropout, "batch_first": True}
    if config.enact is None:
        return partial(nn.MultiheadAttention, config.hidden_dim, config.nheads, **options)
    return partial(
        EnactAttention,
        config.hidden_dim,
        config.nheads,
        smoothing_sigma=config.smoothing_sigma,
        variant=config.enact,
        **options,
    )


def _backbone(config: Config) -> Backbone:
    frozen_stages = config.backbone_frozen_stages if config.lr_backbone > 0 else 4
    return Backbone(
        config.backbone,
        config.backbone_weights,
        config.dilation,
        config.backbone_stage,
        frozen_stages,
        config.backbone_norm,
    )


def _detr(config: Config) -> Detr:
    encoder = Encoder(
        _self_attention(config), config.enc_layers, config.hidden_dim, config.dim_feedforward, config.dropout
    )
    model = Detr(
        _backbone(config),
        build_position_embedding(config.position_embedding, config.hidden_dim),
        encoder,
        num_classes=config.num_classes or COCO_CLASSES,
        num_queries=config.num_queries,
        num_layers=config.dec_layers,
        embed_dim=config.hidden_dim,
        num_heads=config.nheads,
        dim_feedforward=config.dim_feedforward,
        dropout=config.dropout,
        aux_loss=config.aux_loss,
        skip_padding=config.enact != "official",
    )
    if config.enact == "official":  # the released code's first weights differ from the host's (spec 3.3, item 21)
        for layer in encoder.layers:
            layer.self_attn.reset_parameters()
    return model


_BUILDERS: dict[str, Callable[[Config], nn.Module]] = {"detr": _detr}
