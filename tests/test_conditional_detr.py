"""Conditional DETR: its attention and decoder against loops, and its first weights."""

from __future__ import annotations

import pytest
import torch
from test_models import SMALL, batch_of
from torch import Tensor, nn
from torch.testing import assert_close

from models import build_model
from models.conditional_detr import ConditionalDecoder, ConditionalDecoderLayer, ConditionalDetr, ProjectedAttention
from models.layers import inverse_sigmoid


def attention_by_hand(queries: list[Tensor], keys: list[Tensor], value: Tensor, pad_mask: Tensor, heads: int) -> Tensor:
    """One image, query after query and head after head; queries (Q, C), keys and value (N, C), pad_mask (N)."""
    size = value.shape[-1] // heads
    result = torch.zeros_like(queries[0])
    for query in range(len(result)):
        for part in (slice(head * size, (head + 1) * size) for head in range(heads)):
            logits = torch.zeros(len(value))
            for asked, offered in zip(queries, keys, strict=True):
                logits += offered[:, part] @ asked[query, part]
            logits = (logits / (size * len(queries)) ** 0.5).masked_fill(pad_mask, float("-inf"))
            result[query, part] = logits.softmax(0) @ value[:, part]
    return result


@pytest.mark.parametrize("parts", [1, 2])
@torch.no_grad()
def test_attention_adds_the_logits_of_its_parts(parts: int) -> None:
    attention = ProjectedAttention(12, 3, dropout=0.0)
    queries, keys, value = torch.randn(parts, 2, 5, 12), torch.randn(parts, 2, 9, 12), torch.randn(2, 9, 12)
    pad_mask = torch.arange(9) >= torch.tensor([[9], [6]])
    found = attention(tuple(queries), tuple(keys), value, pad_mask)
    for image in range(2):
        expected = attention_by_hand(list(queries[:, image]), list(keys[:, image]), value[image], pad_mask[image], 3)
        assert_close(found[image], attention.out_proj(expected), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("first", [True, False])
@torch.no_grad()
def test_a_layer_attends_by_content_and_by_reference_point(first: bool) -> None:
    layer = ConditionalDecoderLayer(12, 3, 16, dropout=0.1, attention_dropout=0.1, first=first).eval()
    x, embedding, sine = torch.randn(3, 1, 5, 12)
    memory, position = torch.randn(2, 1, 9, 12)
    pad_mask = torch.arange(9)[None] >= 7
    query = layer.sa_qcontent_proj(x) + layer.sa_qpos_proj(embedding)
    key = layer.sa_kcontent_proj(x) + layer.sa_kpos_proj(embedding)
    attended = attention_by_hand([query[0]], [key[0]], layer.sa_v_proj(x)[0], torch.zeros(5).bool(), 3)
    x1 = layer.norm1(x + layer.self_attn.out_proj(attended))
    query, key, key_position = layer.ca_qcontent_proj(x1), layer.ca_kcontent_proj(memory), layer.ca_kpos_proj(position)
    if first:
        query, key = query + layer.ca_qpos_proj(embedding), key + key_position
    queries, keys = [query[0], layer.ca_qpos_sine_proj(sine)[0]], [key[0], key_position[0]]
    attended = attention_by_hand(queries, keys, layer.ca_v_proj(memory)[0], pad_mask[0], 3)
    x2 = layer.norm2(x1 + layer.cross_attn.out_proj(attended))
    expected = layer.norm3(x2 + layer.linear2(layer.linear1(x2).relu()))
    assert_close(layer(x, embedding, sine, memory, position, pad_mask), expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_later_layers_scale_the_reference_point_by_the_state_before_its_norm() -> None:
    decoder, seen = ConditionalDecoder(3, 12, 3, 16, dropout=0.0, attention_dropout=0.0).eval(), []
    nn.init.normal_(decoder.norm.bias)  # so that a state differs from its norm
    for layer in decoder.layers:
        layer.register_forward_hook(lambda _, inputs, output: seen.append((inputs[2], output)))
    query_pos, memory, position = torch.randn(1, 5, 12), torch.randn(1, 9, 12), torch.randn(1, 9, 12)
    states, points_xy = decoder(query_pos, memory, position, torch.zeros(1, 9).bool())
    (unscaled, state), (scaled, _), _ = seen
    assert_close(scaled, unscaled * decoder.query_scale(state))
    assert_close(states[0], decoder.norm(state))
    assert_close(points_xy, decoder.ref_point_head(query_pos).sigmoid())
    y_then_x = points_xy.flip(-1)[..., None] * 2 * torch.pi
    assert_close(unscaled[..., 0:12:6], y_then_x.sin()[..., 0])  # the fastest sine of each half
    assert_close(unscaled[..., 1:12:6], y_then_x.cos()[..., 0])


@torch.no_grad()
def test_boxes_are_offsets_from_reference_points() -> None:
    model = build_model("conditional_detr", **SMALL).eval()
    assert isinstance(model, ConditionalDetr)
    points_xy = model.decoder.ref_point_head(model.query_embed.weight).sigmoid()
    outputs = model(*batch_of((64, 96)))
    assert outputs["pred_logits"].shape == (1, 7, 5)
    assert_close(outputs["pred_boxes"][0], torch.cat((points_xy, torch.full_like(points_xy, 0.5)), -1))
    model.bbox_embed.layers[-1].bias.copy_(torch.tensor([0.3, -0.2, 0.1, 0.4]))
    moved = model(*batch_of((64, 96)))["pred_boxes"][0]
    assert_close(inverse_sigmoid(moved[:, :2]), inverse_sigmoid(points_xy) + torch.tensor([0.3, -0.2]))
    assert_close(inverse_sigmoid(moved[:, 2:]), torch.tensor([0.1, 0.4]).expand(7, 2))


def test_initialisation_is_the_published_one() -> None:
    model = build_model("conditional_detr", **{**SMALL, "hidden_dim": 256})
    for layer in model.decoder.layers:
        assert layer.ca_qpos_sine_proj.weight.abs().max().item() == pytest.approx((6 / 512) ** 0.5, abs=2e-4)
        assert not layer.cross_attn.out_proj.bias.any()
        assert not layer.self_attn.out_proj.bias.any()
        assert layer.sa_v_proj.bias.any()
    assert model.class_embed.bias.unique().tolist() == pytest.approx([-4.59512])
    assert not model.bbox_embed.layers[-1].weight.any()
    assert not model.bbox_embed.layers[-1].bias.any()
