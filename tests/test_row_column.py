"""EnactRowColumnAttention: against loops over cells and clusters, and the published test vectors (spec 2.9, TV2)."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from enact import Clusters, EnactRowColumnAttention
from models.anchor_detr import RowColumnEncoderLayer

VARIANTS = ("paper", "official")
Maps = tuple[Tensor, Tensor, Tensor]  # x, x + row position, x + column position, each (B, H, W, C)


def make_attention(variant: str = "paper", **options: Any) -> EnactRowColumnAttention:
    attention = EnactRowColumnAttention(16, 2, variant=variant, **options)  # type: ignore[arg-type]
    for parameter in attention.parameters():  # nothing of what is learned is zero, and attention is far from flat
        nn.init.normal_(parameter, std=0.5)
    return attention


def make_map(batch: int = 3, height: int = 5, width: int = 9) -> Maps:
    """A map, and it with a position added that varies with x, and with one that varies with y."""
    x = torch.randn(batch, height, width, 16)
    return x, x + torch.randn(batch, 1, width, 16), x + torch.randn(batch, height, 1, 16)


def attend(attention: nn.Module, maps: Maps, pad_mask: Tensor | None = None) -> Tensor:
    x, row, col = maps
    result: Tensor = attention(row, col, row, col, x, key_padding_mask=pad_mask)
    return result


def mask_of(canvas: tuple[int, int], *sizes: tuple[int, int]) -> Tensor:
    mask = torch.ones(len(sizes), *canvas, dtype=torch.bool)
    for image, (height, width) in zip(mask, sizes, strict=True):
        image[:height, :width] = False
    return mask


def attention_by_hand(attention: EnactRowColumnAttention, maps: Maps, clusters: Clusters) -> Tensor:
    """One image, cell after cell and head after head: two softmaxes over clusters, and their product."""
    x, row, col = (tensor[0] for tensor in maps)
    official, size = attention.variant == "official", attention.head_dim
    height, width, _ = x.shape
    if official:
        row, col = row.mean(0, keepdim=True).expand(height, -1, -1), col.mean(1, keepdim=True).expand(-1, width, -1)
    inputs = [row, col, *(clusters.pool(tensor.flatten(1, 2))[0] for tensor in (maps[1], maps[2], maps[0]))]
    weights, biases = attention.in_proj_weight.chunk(5), attention.in_proj_bias.chunk(5)
    roles = (2, 3, 0, 1, 4) if official else (0, 1, 2, 3, 4)
    q_row, q_col, k_row, k_col, v = (
        tensor @ weights[role].T + biases[role] for tensor, role in zip(inputs, roles, strict=True)
    )
    result = torch.zeros_like(x)
    for i, j, head in itertools.product(range(height), range(width), range(attention.num_heads)):
        part = slice(head * size, (head + 1) * size)
        over_row = (k_row[:, part] @ q_row[i, j, part] / size**0.5).softmax(0)
        over_col = (k_col[:, part] @ q_col[i, j, part] / size**0.5).softmax(0)
        product = over_row * over_col
        result[i, j, part] = (product if official else product / product.sum()) @ v[:, part]
    return attention.out_proj(result)[None]


@pytest.mark.parametrize("variant", VARIANTS)
def test_weights_are_the_product_of_row_and_column_distributions(variant: str) -> None:
    attention, maps = make_attention(variant), make_map(batch=1, height=4, width=7)
    clusters = attention.clusters(maps[1])
    assert 2 < clusters.num_clusters < 28
    assert_close(attend(attention, maps), attention_by_hand(attention, maps, clusters), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("variant", VARIANTS)
def test_batch_mates_never_change_an_image(variant: str) -> None:
    attention, maps = make_attention(variant), make_map()
    for tensor in maps:
        tensor[1] = torch.linspace(0, 1, 45).view(5, 9, 1) * tensor[1, 0, 0]  # smooth: far fewer clusters
    mask = mask_of((5, 9), (5, 9), (5, 9), (3, 6))
    assert len(attention.clusters(maps[1], mask).count.unique()) > 1
    together = attend(attention, maps, mask)
    for image in range(3):
        one = slice(image, image + 1)
        alone = attend(attention, tuple(tensor[one] for tensor in maps), mask[one])  # type: ignore[arg-type]
        assert_close(together[one], alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("canvas", [(8, 9), (5, 20), (11, 13)])
def test_the_canvas_never_changes_a_real_cell(canvas: tuple[int, int]) -> None:
    attention, maps = make_attention(), make_map(batch=1)
    expected = attend(attention, maps, mask_of((5, 9), (5, 9)))
    larger = tuple(10 * torch.randn(1, *canvas, 16) for _ in maps)
    for large, small in zip(larger, maps, strict=True):
        large[:, :5, :9] = small
    found = attend(attention, larger, mask_of(canvas, (5, 9)))  # type: ignore[arg-type]
    assert_close(found[:, :5, :9], expected, atol=1e-5, rtol=1e-5)


def test_official_counts_padding_as_published() -> None:
    attention, maps = make_attention("official"), make_map(batch=1)
    assert_close(attend(attention, maps, mask_of((5, 9), (2, 3))), attend(attention, maps))


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_parameter_learns(variant: str) -> None:
    attention = make_attention(variant)
    attend(attention, make_map(), mask_of((5, 9), (5, 9), (3, 4), (5, 2))).square().sum().backward()
    silent = [name for name, p in attention.named_parameters() if p.grad is None or not p.grad.abs().max() > 1e-9]
    assert silent == ["information.probability.bias"]  # a softmax does not see what is added to all logits


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_match_finite_differences(variant: str) -> None:
    attention = EnactRowColumnAttention(4, 2, variant=variant).double()  # type: ignore[arg-type]
    maps = tuple(torch.randn(2, 2, 4, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    mask = mask_of((2, 4), (2, 4), (1, 3))
    assert torch.autograd.gradcheck(lambda *tensors: attend(attention, tensors, mask), maps)


def test_an_image_of_padding_alone_stays_finite() -> None:
    assert attend(make_attention(), make_map(batch=2), mask_of((5, 9), (5, 9), (0, 0))).isfinite().all()


def test_dropout_acts_in_training_only() -> None:
    attention, maps = make_attention(dropout=0.5), make_map()
    assert (attend(attention, maps) - attend(attention, maps)).abs().max() > 1e-3
    attention.eval()
    assert_close(attend(attention, maps), attend(attention, maps), rtol=0, atol=0)


def test_an_unknown_variant_is_refused() -> None:
    with pytest.raises(ValueError, match="paper, official"):
        make_attention("best")


@pytest.mark.parametrize("variant", VARIANTS)
def test_no_map_of_cells_by_clusters_is_kept(variant: str) -> None:
    """What autograd keeps has the size of the tokens, of one row or column of maps, never of H x W x T."""
    attention, maps = make_attention(variant), make_map(batch=1, height=20, width=24)
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t.numel()), t)[1], lambda t: t):
        attend(attention, maps)
    heads_by_cells_by_clusters = 2 * 480 * attention.clusters(maps[1]).num_clusters
    assert max(kept) < heads_by_cells_by_clusters / 2


def draw(shape: tuple[int, ...], phase: float) -> Tensor:
    """The generator of spec 2.9."""
    index = torch.arange(1, torch.Size(shape).numel() + 1, dtype=torch.float64)
    u = 43758.5453123 * torch.sin(12.9898 * index + phase)
    return (2 * (u - u.floor()) - 1).float().view(shape)


@torch.no_grad()
def published_layer() -> RowColumnEncoderLayer:
    attention = EnactRowColumnAttention(256, 8, smoothing_sigma=5.0, variant="official")
    layer = RowColumnEncoderLayer(attention, 256, 1024, dropout=0.0).eval()
    attention.information.probability.weight.copy_(0.15 * draw((1, 256), 1))
    attention.information.probability.bias.copy_(0.1 * draw((1,), 2))
    attention.in_proj_weight.copy_(0.2 * draw((1280, 256), 3))
    attention.in_proj_weight[1024:] *= 40
    attention.in_proj_bias.copy_(0.06 * draw((1280,), 4))
    linears = (attention.out_proj, 0.108, 5), (layer.ffn.linear1, 0.06, 7), (layer.ffn.linear2, 0.06, 9)
    for linear, gain, phase in linears:
        linear.weight.copy_(gain * draw(tuple(linear.weight.shape), phase))
        linear.bias.copy_(0.06 * draw(tuple(linear.bias.shape), phase + 1))
    return layer


PUBLISHED_VECTORS = [
    # B, place (image, y, x, channels) -> values of the attention's result, of the layer's output; sum of magnitudes.
    (1, (0, 0, 0, slice(0, 3)), (-0.269437, 0.699639, -0.265410), (0.67695, 0.07723, -1.48236), 32436.45),
    (1, (0, 5, 7, slice(100, 103)), (0.098030, -0.469787, 0.841605), (0.10688, -1.17312, 1.02028), 32436.45),
    # The published layer mixes up rows here; these are its numbers with that repaired. Both images have c = 5.
    (2, (1, 5, 7, slice(100, 103)), (0.446207, -0.522726, -0.422596), (-1.17291, -0.64692, -0.96648), 64833.18),
]


@pytest.mark.parametrize(("batch", "place", "attended", "output", "magnitude"), PUBLISHED_VECTORS)
@torch.no_grad()
def test_official_gives_the_published_vectors(
    batch: int, place: Any, attended: tuple[float, ...], output: tuple[float, ...], magnitude: float
) -> None:
    layer, pad_mask = published_layer(), torch.zeros(batch, 11, 14, dtype=torch.bool)
    x = (1.7 * draw((batch, 256, 11, 14), 11)).permute(0, 2, 3, 1)
    pos_row, pos_col = draw((batch, 14, 256), 12).unsqueeze(1), draw((batch, 11, 256), 13).unsqueeze(2)
    assert layer.self_attn.clusters(x + pos_row).count.tolist() == [154 // 5] * batch
    result = attend(layer.self_attn, (x, x + pos_row, x + pos_col))
    assert_close(result[place], torch.tensor(attended), atol=1e-5, rtol=0)
    result = layer(x, pos_row, pos_col, pad_mask)
    assert_close(result[place], torch.tensor(output), atol=2e-5, rtol=0)
    assert result.abs().sum().item() == pytest.approx(magnitude, abs=2e-2)
