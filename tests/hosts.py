"""Small models that are not ours, for the tests of `enact.apply`: each with its encoder's attentions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from models.encoder import Encoder
from tools.hosts import HuggingFaceEncoder, RTDetrEncoder

TOKENS, CHANNELS = 48, 32
TORCH = ["encoder", "sequence_first", "layer", "transformer", "detr_form"]
HUGGING_FACE = ["hf_detr", "hf_conditional_detr", "hf_rt_detr"]
KINDS = TORCH + HUGGING_FACE
MASKED = TORCH + HUGGING_FACE[:2]  # RT-DETR knows no padding


class Host(NamedTuple):
    """A model, the names of its encoder attentions, and its encoder: tokens (B, N, C), padded or None -> (B, N, C)."""

    model: Any
    names: list[str]
    encode: Callable[[Any, Tensor, Tensor | None], Tensor]

    def __call__(self, tokens: Tensor, pad_mask: Tensor | None = None) -> Tensor:
        return self.encode(self.model, tokens, pad_mask)


def torch_layer(batch_first: bool = True, norm_first: bool = False) -> nn.TransformerEncoderLayer:
    return nn.TransformerEncoderLayer(CHANNELS, 4, 64, dropout=0.0, batch_first=batch_first, norm_first=norm_first)


def position(tokens: Tensor) -> Tensor:
    return torch.linspace(-1, 1, CHANNELS, dtype=tokens.dtype).sin().expand(1, tokens.shape[1], -1)


def hugging_face(kind: str) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    widths = {"embedding_size": 8, "hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1], "layer_type": "basic"}
    shape = {"d_model": CHANNELS, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "encoder_attention_heads": 4,
             "decoder_attention_heads": 4, "decoder_layers": 1, "num_queries": 5, "dropout": 0.0}  # fmt: skip
    if kind == "hf_rt_detr":
        backbone = transformers.RTDetrResNetConfig(**widths, out_features=["stage2", "stage3", "stage4"])
        config = transformers.RTDetrConfig(
            backbone_config=backbone, encoder_in_channels=[8, 16, 16], encoder_hidden_dim=CHANNELS,
            decoder_in_channels=[CHANNELS] * 3, num_attention_heads=4, num_denoising=0, **shape,
        )  # fmt: skip
        return transformers.RTDetrForObjectDetection(config)  # type: ignore[no-any-return]
    family = {"hf_detr": "Detr", "hf_conditional_detr": "ConditionalDetr"}[kind]
    config = getattr(transformers, f"{family}Config")(
        backbone_config=transformers.ResNetConfig(**widths, out_features=["stage4"]), use_timm_backbone=False,
        use_pretrained_backbone=False, backbone=None, encoder_layers=2, **shape,
    )  # fmt: skip
    return getattr(transformers, f"{family}ForObjectDetection")(config)  # type: ignore[no-any-return]


def encode_hugging_face(model: Any, tokens: Tensor, pad_mask: Tensor | None) -> Tensor:
    return HuggingFaceEncoder(model.model.encoder).forward(tokens, position(tokens), pad_mask)


def rt_detr_stack(model: Any) -> str:
    return "aifi" if hasattr(model.model.encoder, "aifi") else "encoder"  # before release 5


def encode_rt_detr(model: Any, tokens: Tensor, pad_mask: Tensor | None) -> Tensor:
    layers = getattr(model.model.encoder, rt_detr_stack(model))[0].layers
    return RTDetrEncoder(layers).forward(tokens, position(tokens), None)  # which no padding reaches there


def make_host(kind: str) -> Host:
    two = ["layers.0.self_attn", "layers.1.self_attn"]
    if kind == "encoder":
        host = Host(nn.TransformerEncoder(torch_layer(), 2), two, lambda m, x, pad: m(x, src_key_padding_mask=pad))
    elif kind == "sequence_first":
        encoder = nn.TransformerEncoder(torch_layer(batch_first=False), 2, enable_nested_tensor=False)
        host = Host(encoder, two, lambda m, x, pad: m(x.transpose(0, 1), src_key_padding_mask=pad).transpose(0, 1))
    elif kind == "layer":
        layer = torch_layer(norm_first=True)
        host = Host(layer, ["self_attn"], lambda m, x, pad: m(x, src_key_padding_mask=pad))
    elif kind == "transformer":
        transformer = nn.Transformer(CHANNELS, 4, 2, 1, 64, dropout=0.0, batch_first=True)
        names = [f"encoder.{name}" for name in two]
        host = Host(transformer, names, lambda m, x, pad: m.encoder(x, src_key_padding_mask=pad))
    elif kind == "detr_form":
        encoder = Encoder(lambda: nn.MultiheadAttention(CHANNELS, 4, batch_first=True), 2, CHANNELS, 64, 0.0)
        host = Host(encoder, two, lambda m, x, pad: m(x, position(x), pad))
    elif kind == "hf_rt_detr":
        model = hugging_face(kind)
        host = Host(model, [f"model.encoder.{rt_detr_stack(model)}.0.layers.0.self_attn"], encode_rt_detr)
    else:
        host = Host(hugging_face(kind), [f"model.encoder.{name}" for name in two], encode_hugging_face)
    for parameter in host.model.parameters():
        if parameter.dim() > 1:
            nn.init.xavier_uniform_(parameter)
    return host
