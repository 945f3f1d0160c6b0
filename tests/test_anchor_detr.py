"""Anchor DETR: row-column attention against loops, anchor points, positions, initialisation, batches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_models import SMALL, batch_of
from torch import Tensor, nn
from torch.testing import assert_close

from models import build_model
from models.anchor_detr import AnchorDetr, relative_position
from models.row_column import RowColumnAttention

ANCHORS: dict[str, Any] = {**SMALL, "num_query_position": 6, "num_query_pattern": 2}


def build(enact: str | None = None, **overrides: Any) -> AnchorDetr:
    model = build_model("anchor_detr", enact, **{**ANCHORS, **overrides})
    assert isinstance(model, AnchorDetr)
    return model


def row_column_attention_by_hand(
    attention: RowColumnAttention, query_row: Tensor, query_col: Tensor, key_row: Tensor, key_col: Tensor,
    value: Tensor, pad_mask: Tensor,
) -> Tensor:  # fmt: skip
    """One image, cell after cell: queries (Q, C), maps (H, W, C), pad_mask (H, W)."""
    height, width, channels = value.shape
    weights, biases = attention.in_proj_weight.chunk(5), attention.in_proj_bias.chunk(5)
    q_row, q_col, k_row, k_col, v = (
        tensor @ weight.T + bias
        for tensor, weight, bias in zip((query_row, query_col, key_row, key_col, value), weights, biases, strict=True)
    )
    size = channels // attention.num_heads
    result = torch.zeros_like(query_row)
    for query in range(len(query_row)):
        for part in (slice(start, start + size) for start in range(0, channels, size)):
            columns = torch.stack([q_row[query, part] @ k_row[:, x, part].mean(0) for x in range(width)]) / size**0.5
            rows = torch.stack([q_col[query, part] @ k_col[y, :, part].mean(0) for y in range(height)]) / size**0.5
            columns[pad_mask[0]], rows[pad_mask[:, 0]] = float("-inf"), float("-inf")
            columns, rows = columns.softmax(0), rows.softmax(0)
            for y in range(height):
                for x in range(width):
                    result[query, part] += rows[y] * columns[x] * v[y, x, part]
    return attention.out_proj(result)


@pytest.mark.parametrize(("height", "width"), [(3, 5), (5, 3), (4, 4), (1, 6)])
@torch.no_grad()
def test_row_column_attention_is_what_a_loop_gives(height: int, width: int) -> None:
    attention = RowColumnAttention(12, 3)
    nn.init.normal_(attention.in_proj_bias)
    nn.init.normal_(attention.in_proj_weight, std=0.5)
    queries, maps = torch.randn(2, 2, 7, 12), torch.randn(3, 2, height, width, 12)
    pad_mask = torch.zeros(2, height, width, dtype=torch.bool)
    pad_mask[1, :, 2:] = True
    pad_mask[1, 2:] = True
    found = attention(*queries, *maps, key_padding_mask=pad_mask)
    for image in range(2):
        expected = row_column_attention_by_hand(attention, *queries[:, image], *maps[:, image], pad_mask[image])
        assert_close(found[image], expected, atol=1e-5, rtol=1e-5)


def test_row_column_attention_takes_a_map_of_queries() -> None:
    attention, maps = RowColumnAttention(12, 3), torch.randn(5, 2, 3, 4, 12)
    pad_mask = torch.zeros(2, 3, 4, dtype=torch.bool)
    found = attention(*maps, key_padding_mask=pad_mask)
    listed = attention(*(query.flatten(1, 2) for query in maps[:2]), *maps[2:], key_padding_mask=pad_mask)
    assert_close(found.flatten(1, 2), listed)


def test_positions_are_cell_centres_of_the_part_without_padding() -> None:
    pad_mask = torch.tensor([[False] * 5, [False, False, True, True, True]])
    found = relative_position(pad_mask)
    assert_close(found[0], torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9]))
    assert_close(found[1, :2], torch.tensor([0.25, 0.75]))


def test_queries_are_patterns_at_points() -> None:
    """Query index is pattern * points + point: the same point gives the same centre, whatever the pattern."""
    model = build().eval()
    assert model.num_queries == 12
    outputs = model(*batch_of((64, 64)))
    assert outputs["pred_logits"].shape == (1, 12, 5)
    centres = outputs["pred_boxes"][0, :, :2]
    assert_close(centres[:6], model.position.weight)
    assert_close(centres[6:], model.position.weight)
    assert (outputs["pred_logits"][0, :6] - outputs["pred_logits"][0, 6:]).abs().max() > 1e-3


def test_the_grid_prior_is_a_lattice_that_does_not_learn() -> None:
    model = build(spatial_prior="grid", num_query_position=10)
    line = (1 / 6, 1 / 2, 5 / 6)
    assert sorted(model.position.weight.tolist()) == [pytest.approx([x, y]) for x in line for y in line]
    assert model.num_queries == 18
    assert not any(name.startswith("position") for name, _ in model.named_parameters())
    assert not any(name.startswith("position") for name in model.state_dict())
    assert model(*batch_of((64, 64)))["pred_boxes"].shape == (1, 18, 4)


@pytest.mark.parametrize("enact", [None, "paper", "official"])
def test_initialisation_is_the_published_one(enact: str | None) -> None:
    model = build(enact, hidden_dim=256, nheads=8, backbone="resnet10")
    first, second = (layer.state_dict() for layer in model.encoder.layers)
    assert_close(dict(first), dict(second))  # layers are copies of one another
    assert_close(dict(model.decoder.layers[0].state_dict()), dict(model.decoder.layers[1].state_dict()))
    assert first["self_attn.in_proj_weight"].abs().max().item() == pytest.approx(0.0625, abs=1e-4)
    assert first["self_attn.out_proj.weight"].abs().max().item() == pytest.approx(0.0625, abs=1e-4)
    assert not first["self_attn.in_proj_bias"].any()
    assert not first["self_attn.out_proj.bias"].any()
    assert model.class_embed.bias.unique().tolist() == pytest.approx([-4.59512])
    last = model.bbox_embed.layers[-1]
    assert not last.weight.any()
    assert last.bias.tolist() == [0, 0, -2, -2]
    assert not model.input_proj[0].bias.any()
    assert 0 <= model.position.weight.min() <= model.position.weight.max() <= 1


@pytest.mark.parametrize("enact", [None, "paper", "official"])
@torch.no_grad()
def test_each_image_gets_what_it_gets_alone_on_the_same_canvas(enact: str | None) -> None:
    """The published code gave image 0 rows of its batch mates (spec 3.1, item 1)."""
    model = build(enact, backbone_stage=2, dilation=False).eval()
    images, pad_mask = batch_of((96, 128), (128, 64), (72, 104))
    images[1] = images[1, :, :1, :1] * ~pad_mask[1]  # one colour: other clusters than noise has
    together = model(images, pad_mask)
    for image in range(3):
        one = slice(image, image + 1)
        alone = model(images[one], pad_mask[one])
        for key in ("pred_logits", "pred_boxes"):
            assert_close(together[key][one], alone[key], atol=1e-5, rtol=0)


@torch.no_grad()
def test_the_paper_encoder_gives_real_cells_the_same_on_any_canvas() -> None:
    model = build("paper").eval()
    x, row, col = torch.randn(1, 6, 7, 64), torch.randn(1, 1, 7, 64), torch.randn(1, 6, 1, 64)
    alone = model.encoder(x, row, col, torch.zeros(1, 6, 7, dtype=torch.bool))
    for height, width, mates in ((9, 11, 0), (6, 20, 0), (13, 7, 2)):
        images = torch.randn(1 + mates, height, width, 64)
        pos_row, pos_col = torch.randn(1 + mates, 1, width, 64), torch.randn(1 + mates, height, 1, 64)
        images[0, :6, :7], pos_row[0, :, :7], pos_col[0, :6] = x, row, col
        pad_mask = torch.ones(1 + mates, height, width, dtype=torch.bool)
        pad_mask[0, :6, :7], pad_mask[1:, : height - 1] = False, False
        found = model.encoder(images, pos_row, pos_col, pad_mask)
        assert_close(found[:1, :6, :7], alone, atol=1e-5, rtol=0)


def test_an_image_smaller_than_a_cell_is_detected_on() -> None:
    outputs = build("paper").eval()(*batch_of((5, 3), (64, 64)))
    assert outputs["pred_logits"].isfinite().all()
