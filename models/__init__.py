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
from typing import Any, NamedTuple

from torch import nn

from configs.schema import Config, recipe
from enact import EnactAttention, EnactRowColumnAttention
from enact.kernels import DenseAttention
from enact.order import token_order
from models.anchor_detr import AnchorDecoder, AnchorDetr, RowColumnEncoder
from models.backbone import Backbone
from models.checkpoints import load_weights, warm_start
from models.compilation import compile_model
from models.conditional_detr import ConditionalDecoder, ConditionalDetr
from models.criterion import ClassLoss, Criterion, FocalClassLoss, SoftmaxClassLoss
from models.detr import Decoder, Detr
from models.encoder import Encoder
from models.matcher import ClassCost, HungarianMatcher, focal_class_cost, softmax_class_cost
from models.position_encoding import build_position_embedding
from models.postprocess import Postprocessor, focal_detections, softmax_detections
from models.row_column import RowColumnAttention

__all__ = ["build_criterion", "build_model", "build_postprocessor", "compile_model", "load_weights", "warm_start"]

# COCO's largest category id, and 1.
COCO_CLASSES = 91


def build_model(name: str, enact: str | None = None, **overrides: Any) -> nn.Module:
    """A detector with new weights.

    Args:
        name: "detr", "conditional_detr" or "anchor_detr".
        enact: None for a dense encoder, "paper" or "official".
        overrides: fields of `Config`; the rest is the recipe of this row of the results table.

    Returns:
        A module: (images float (B, 3, H, W), pad_mask bool (B, H, W) True where padded) -> {"pred_logits" (B, Q, K),
        "pred_boxes" (B, Q, 4) cxcywh in [0, 1], "aux_outputs": the same two for each earlier decoder layer}.
        It has `num_queries`, Q.
    """
    return build_model_from(recipe(name, enact, **overrides))


def build_model_from(config: Config) -> nn.Module:
    """The detector that `config` describes."""
    return _FAMILIES[config.model].build(config)


def build_criterion(name: str, **overrides: Any) -> Criterion:
    """The training loss of a detector; `overrides` as in `build_model`."""
    return build_criterion_from(recipe(name, **overrides))


def build_criterion_from(config: Config) -> Criterion:
    """The training loss that `config` describes."""
    family = _FAMILIES[config.model]
    return Criterion(
        HungarianMatcher(family.class_cost, config.set_cost_class, config.set_cost_bbox, config.set_cost_giou),
        family.class_loss(config),
        _num_classes(config),
        class_coef=config.cls_loss_coef,
        bbox_coef=config.bbox_loss_coef,
        giou_coef=config.giou_loss_coef,
        num_layers=config.dec_layers if config.aux_loss else 1,
    )


def build_postprocessor(name: str) -> Postprocessor:
    """(outputs, sizes (B, 2) height and width) -> [{"scores", "labels", "boxes" xyxy in pixels}]."""
    return _FAMILIES[recipe(name).model].postprocess


def _num_classes(config: Config) -> int:
    return config.num_classes or COCO_CLASSES


def _enact_options(config: Config) -> dict[str, Any]:
    return {
        "smoothing_sigma": config.smoothing_sigma,
        "variant": config.enact,
        "regions": config.regions,
        "pooling": config.pooling,
        "cluster_bias": config.cluster_bias,
        "boundary": config.boundary,
        "max_clusters": config.max_clusters,
    }


def _self_attention(config: Config) -> Callable[[], nn.Module]:
    """Makes the self-attention of one encoder layer: the seam at which ENACT enters a detector."""
    make: Callable[..., nn.Module] = DenseAttention
    if config.enact is not None:
        make = partial(EnactAttention, **_enact_options(config))
    return partial(make, config.hidden_dim, config.nheads, attention_dropout(config), batch_first=True)


def _row_column_self_attention(config: Config) -> Callable[[], nn.Module]:
    """As `_self_attention`, for Anchor DETR."""
    make: Callable[..., nn.Module] = RowColumnAttention
    if config.enact is not None:
        order = token_order(config.token_order)
        make = partial(EnactRowColumnAttention, token_order=order, **_enact_options(config))
    return partial(make, config.hidden_dim, config.nheads, attention_dropout(config))


def attention_dropout(config: Config) -> float:
    """The rate on attention weights that `config` means."""
    return config.dropout if config.attention_dropout is None else config.attention_dropout


def _backbone(config: Config) -> Backbone:
    frozen_stages = config.backbone_frozen_stages if config.lr_backbone > 0 else 4
    return Backbone(
        config.backbone,
        config.backbone_weights,
        config.dilation,
        config.backbone_stage,
        frozen_stages,
        config.backbone_norm,
        recompute=config.checkpoint_activations in ("backbone", "all"),
    )


def _encoder(config: Config) -> Encoder:
    return Encoder(_self_attention(config), *_encoder_sizes(config))


def _encoder_sizes(config: Config) -> tuple[int, int, int, float, bool]:
    recompute = config.checkpoint_activations in ("encoder", "all")
    return config.enc_layers, config.hidden_dim, config.dim_feedforward, config.dropout, recompute


def _decoder_sizes(config: Config) -> tuple[int, int, int, int, float, float]:
    sizes = config.dec_layers, config.hidden_dim, config.nheads, config.dim_feedforward
    return *sizes, config.dropout, attention_dropout(config)


def _detr(config: Config) -> Detr:
    model = Detr(
        _backbone(config),
        build_position_embedding(config.position_embedding, config.hidden_dim),
        _encoder(config),
        Decoder(*_decoder_sizes(config)),
        num_logits=_num_classes(config) + 1,
        **_common_options(config),
    )
    return _as_published(model, config)


def _conditional_detr(config: Config) -> Detr:
    model = ConditionalDetr(
        _backbone(config),
        build_position_embedding(config.position_embedding, config.hidden_dim),
        _encoder(config),
        ConditionalDecoder(*_decoder_sizes(config)),
        num_classes=_num_classes(config),
        **_common_options(config),
    )
    return _as_published(model, config)


def _common_options(config: Config) -> dict[str, Any]:
    return {
        "num_queries": config.num_queries,
        "embed_dim": config.hidden_dim,
        "aux_loss": config.aux_loss,
        "skip_padding": config.enact != "official",
        "token_order": token_order(config.token_order),
    }


def _as_published(model: Detr, config: Config) -> Detr:
    """The first weights of the released ENACT differ from its host's (spec 3.3, item 21)."""
    if config.enact == "official":
        for module in model.encoder.modules():
            if isinstance(module, EnactAttention):
                module.reset_parameters()
    return model


def _anchor_detr(config: Config) -> AnchorDetr:
    encoder = RowColumnEncoder(_row_column_self_attention(config), *_encoder_sizes(config))
    return AnchorDetr(
        _backbone(config),
        encoder,
        AnchorDecoder(*_decoder_sizes(config)),
        num_classes=_num_classes(config),
        num_query_position=config.num_query_position,
        num_query_pattern=config.num_query_pattern,
        spatial_prior=config.spatial_prior,
        embed_dim=config.hidden_dim,
        aux_loss=config.aux_loss,
        skip_padding=config.enact not in (None, "official"),
        token_order=token_order(config.token_order),
    )


def _softmax_loss(config: Config) -> ClassLoss:
    return SoftmaxClassLoss(config.eos_coef)


def _focal_loss(config: Config) -> ClassLoss:
    return FocalClassLoss(config.focal_alpha)


class _Family(NamedTuple):
    """A detector, and how it scores classes: in training, in matching, in detections."""

    build: Callable[[Config], nn.Module]
    class_loss: Callable[[Config], ClassLoss]
    class_cost: ClassCost
    postprocess: Postprocessor


_FAMILIES = {
    "detr": _Family(_detr, _softmax_loss, softmax_class_cost, softmax_detections),
    "conditional_detr": _Family(_conditional_detr, _focal_loss, focal_class_cost, focal_detections),
    "anchor_detr": _Family(_anchor_detr, _focal_loss, focal_class_cost, focal_detections),
}
