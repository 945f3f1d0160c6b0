"""Detectors as users build them: sizes, padding, parameters, initialisation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from enact import EnactAttention, EnactRowColumnAttention
from enact.method import Method
from enact.order import hilbert
from models import build_criterion, build_model, load_weights
from models.backbone import Backbone, GroupNorm
from models.checkpoints import to_published
from models.packing import Packing
from util.errors import InputError

SMALL: dict[str, Any] = {
    "backbone": "resnet10", "backbone_weights": None, "enc_layers": 2, "dec_layers": 2, "hidden_dim": 64, "nheads": 4,
    "dim_feedforward": 96, "num_queries": 7, "num_classes": 5,
}  # fmt: skip
VARIANTS = (None, "paper", "official")

# Spec 4: keys, total and trainable parameters.
PUBLISHED_SIZES = [
    ("detr", None, "resnet50", 458, 41_524_768, 41_302_368),
    ("detr", "paper", "resnet50", 494, 41_526_310, 41_303_910),
    ("detr", None, "resnet101", 713, 60_464_672, 60_242_272),
    ("detr", "official", "resnet101", 749, 60_466_214, 60_243_814),
    ("conditional_detr", None, "resnet50", 564, 43_418_401, 43_196_001),
    ("conditional_detr", "paper", "resnet50", 600, 43_419_943, 43_197_543),
    ("conditional_detr", None, "resnet101", 819, 62_358_305, 62_135_905),
    ("conditional_detr", "official", "resnet101", 855, 62_359_847, 62_137_447),
    ("anchor_detr", None, "resnet50", 507, 37_038_711, 36_816_311),
    ("anchor_detr", "paper", "resnet50", 519, 37_040_253, 36_817_853),
    ("anchor_detr", None, "resnet101", 762, 55_978_615, 55_756_215),
    ("anchor_detr", "official", "resnet101", 774, 55_980_157, 55_757_757),
]


def batch_of(*sizes: tuple[int, int], canvas: tuple[int, int] | None = None) -> tuple[Tensor, Tensor]:
    """Random images of these heights and widths on one canvas, and its mask."""
    height, width = canvas or (max(size[0] for size in sizes), max(size[1] for size in sizes))
    images, pad_mask = torch.zeros(len(sizes), 3, height, width), torch.ones(len(sizes), height, width).bool()
    for image, mask, (h, w) in zip(images, pad_mask, sizes, strict=True):
        image[:, :h, :w], mask[:h, :w] = torch.randn(3, h, w), False
    return images, pad_mask


@pytest.mark.parametrize(("name", "enact", "backbone", "keys", "total", "trainable"), PUBLISHED_SIZES)
def test_parameters_are_as_many_as_published(
    name: str, enact: str | None, backbone: str, keys: int, total: int, trainable: int
) -> None:
    with torch.device("meta"):
        model = build_model(name, enact, backbone=backbone, backbone_weights=None)
    parameters = list(model.parameters())
    assert sum(parameter.numel() for parameter in parameters) == total
    assert sum(parameter.numel() for parameter in parameters if parameter.requires_grad) == trainable
    assert len(to_published(model.state_dict())) == keys


@pytest.mark.parametrize("enact", VARIANTS)
@pytest.mark.parametrize(("name", "options", "logits"), [
    ("detr", {}, 6),
    ("detr", {"dilation": True, "position_embedding": "learned"}, 6),
    ("conditional_detr", {}, 5),
    ("conditional_detr", {"dilation": True, "position_embedding": "learned"}, 5),
    ("anchor_detr", {"num_query_position": 7, "num_query_pattern": 1}, 5),
    ("anchor_detr", {"num_query_position": 7, "num_query_pattern": 1, "dilation": False}, 5),
])  # fmt: skip
def test_every_variant_detects_and_learns(name: str, options: dict[str, Any], logits: int, enact: str | None) -> None:
    model = build_model(name, enact, **SMALL, **options)
    images, pad_mask = batch_of((96, 128), (128, 64))
    outputs = model(images, pad_mask)
    assert model.num_queries == 7
    assert outputs["pred_logits"].shape == (2, 7, logits)
    assert outputs["pred_boxes"].shape == (2, 7, 4)
    assert 0 <= outputs["pred_boxes"].min() <= outputs["pred_boxes"].max() <= 1
    assert len(outputs["aux_outputs"]) == 1
    (outputs["pred_logits"].square().sum() + outputs["pred_boxes"].sum()).backward()
    silent = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert silent == []


@pytest.mark.parametrize("enact", [None, "paper"])
@pytest.mark.parametrize("name", ["detr", "conditional_detr"])
def test_who_shares_the_canvas_never_changes_an_image(name: str, enact: str | None) -> None:
    model = build_model(name, enact, **SMALL).eval()
    images, pad_mask = batch_of((96, 160), (160, 64), (128, 128))
    with torch.no_grad():
        together = model(images, pad_mask)
        for image in range(3):
            alone = model(images[image : image + 1], pad_mask[image : image + 1])
            for key in ("pred_logits", "pred_boxes"):
                assert_close(together[key][image : image + 1], alone[key], atol=1e-5, rtol=0)


@pytest.mark.parametrize("enact", [None, "paper"])
@pytest.mark.parametrize("skip_padding", [True, False])
def test_padding_never_changes_a_real_token(enact: str | None, skip_padding: bool) -> None:
    """Given the same features, the encoder gives real tokens the same on any canvas, beside any batch mates."""
    model = build_model("detr", enact, **SMALL).eval()
    feature_map, position_map = torch.randn(6, 7, 64), torch.randn(6, 7, 64)

    def encode(canvas: tuple[int, int], mates: int) -> Tensor:
        tokens = torch.randn(1 + mates, *canvas, 64)
        position, pad_mask = torch.randn_like(tokens), torch.ones(1 + mates, *canvas, dtype=torch.bool)
        tokens[0, :6, :7], position[0, :6, :7], pad_mask[0, :6, :7] = feature_map, position_map, False
        pad_mask[1:, : canvas[0] - 1] = False
        sequences = tokens.flatten(1, 2), position.flatten(1, 2)
        if skip_padding:
            packing = Packing(pad_mask, tokens.device)
            memory = packing.unpack(model.encoder(*(packing.pack(x) for x in sequences), packing))
            return memory[0][~packing.pad_mask()[0]]
        return model.encoder(*sequences, pad_mask.flatten(1))[0][~pad_mask[0].flatten()]

    with torch.no_grad():
        alone = encode((6, 7), 0)
        for canvas, mates in (((9, 11), 0), ((6, 20), 0), ((13, 7), 2)):
            assert_close(encode(canvas, mates), alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize("order", [[0, 1, 2, 3, 4, 5], [50, 40, 30, 20, 10, 0]])
def test_packing_keeps_real_tokens_in_order(order: list[int]) -> None:
    tokens = torch.arange(12.0).view(2, 6, 1)
    pad_mask = torch.tensor([[False, True, False, False, True, True], [True, True, False, True, True, False]])
    packing = Packing(pad_mask.view(2, 2, 3), tokens.device, lambda height, width, device: torch.tensor(order))
    forwards = order[0] < order[1]
    expected = [[0, 2, 3], [8, 11]] if forwards else [[3, 2, 0], [11, 8]]
    packed = packing.pack(tokens)
    assert packed.flatten().tolist() == expected[0] + expected[1]
    assert packing.unpack(packed)[..., 0].tolist() == [expected[0], [*expected[1], 0]]
    assert packing.pad_mask().tolist() == [[False] * 3, [False, False, True]]
    assert packing.to_map(packed, 6)[..., 0].tolist() == [[0, 0, 2, 3, 0, 0], [0, 0, 8, 0, 0, 11]]


@pytest.mark.parametrize("options", [
    {}, {"token_order": "hilbert"}, {"boundary": "soft"}, {"regions": "tokens", "boundary": "hard"},
    {"cluster_bias": "size"},
])  # fmt: skip
@pytest.mark.parametrize("enact", [None, "paper", "plus", "official"])
@pytest.mark.parametrize("name", ["detr", "anchor_detr"])
def test_packed_tokens_give_what_the_padded_map_gives(name: str, enact: str | None, options: dict[str, Any]) -> None:
    """Results and gradients: a mask that the host may not read (here: while compiling, pretended) is not packed."""
    if options and enact not in ("paper", "plus"):
        pytest.skip("no choice to make")
    model = build_model(name, enact, **SMALL, dropout=0.0, **options)
    images, pad_mask = batch_of((64, 96), (96, 32), (64, 64))
    found = {}
    for compiling in (False, True):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.compiler, "is_compiling", lambda compiling=compiling: compiling)
            outputs = model(images, pad_mask)
        model.zero_grad()
        outputs["pred_logits"].square().sum().backward()
        gradients = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
        found[compiling] = outputs["pred_logits"], outputs["pred_boxes"], gradients
    assert_close(found[False][:2], found[True][:2], atol=1e-5, rtol=1e-4)
    for key, gradient in found[True][2].items():
        if key.endswith("probability.bias"):
            continue  # its true gradient is zero: a softmax does not see what all logits have in common
        scale = float(gradient.abs().max())
        assert_close(found[False][2][key], gradient, atol=2e-3 * scale + 1e-5, rtol=1e-3, msg=key)


def test_any_attention_serves_packed_tokens() -> None:
    """One called as nn.MultiheadAttention is, which knows nothing of packing, gets its tokens padded."""
    model = build_model("detr", None, **SMALL, dropout=0.0)
    batch = batch_of((64, 96), (96, 32), (64, 64))
    expected = model(*batch)["pred_boxes"]
    for layer in model.encoder.layers:
        plain = nn.MultiheadAttention(layer.self_attn.embed_dim, layer.self_attn.num_heads, batch_first=True)
        plain.load_state_dict(layer.self_attn.state_dict())
        layer.self_attn = plain
    assert_close(model(*batch)["pred_boxes"], expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("enact", [None, "paper", "plus"])
def test_the_encoder_never_sees_padding(enact: str | None) -> None:
    model = build_model("detr", enact, **SMALL)
    rows = []
    model.encoder.layers[0].norm1.register_forward_pre_hook(lambda _, inputs: rows.append(inputs[0].shape))
    images, pad_mask = batch_of((96, 160), (160, 64), (128, 128))
    model(images, pad_mask)
    cells = [3 * 5, 5 * 2, 4 * 4]  # DC5 would be four times as many
    assert rows[0].numel() // rows[0][-1] == sum(cells) * (4 if model.backbone.stride == 16 else 1)


def test_a_batch_without_padding_has_no_mask() -> None:
    model = build_model("detr", "paper", **SMALL)
    masks = []
    attention = model.encoder.layers[0].self_attn
    attention.register_forward_pre_hook(lambda _, inputs, named: masks.append(named), with_kwargs=True)
    model(*batch_of((96, 96), (96, 96)))
    assert masks[0]["key_padding_mask"] is None


def test_an_image_smaller_than_a_cell_is_detected_on() -> None:
    model = build_model("detr", "paper", **SMALL).eval()
    outputs = model(*batch_of((5, 3), (64, 64)))
    assert outputs["pred_logits"].isfinite().all()


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_dc5_halves_the_stride_and_keeps_the_parameters(name: str) -> None:
    plain, dilated = Backbone(name), Backbone(name, dilation=True)
    assert plain.state_dict().keys() == dilated.state_dict().keys()
    images = torch.randn(1, 3, 64, 96)
    assert plain(images).shape == (1, plain.num_channels, 2, 3)
    assert dilated(images).shape == (1, plain.num_channels, 4, 6)
    assert (plain.stride, dilated.stride) == (32, 16)


def test_dc5_equals_torchvisions_dilated_resnet() -> None:
    import torchvision

    ours = Backbone("resnet50", dilation=True)
    theirs = torchvision.models.resnet50(
        replace_stride_with_dilation=[False, False, True], norm_layer=torchvision.ops.FrozenBatchNorm2d
    )
    theirs.load_state_dict({key.removeprefix("body."): value for key, value in ours.state_dict().items()}, strict=False)
    features = nn.Sequential(*list(theirs.children())[:-2])
    images = torch.randn(1, 3, 64, 64)
    assert_close(ours(images), features(images), atol=1e-4, rtol=1e-4)  # another layout adds in another order


@pytest.mark.parametrize(("stage", "stride", "channels"), [(1, 4, 64), (2, 8, 128), (3, 16, 256), (4, 32, 512)])
def test_an_earlier_stage_gives_a_finer_map(stage: int, stride: int, channels: int) -> None:
    backbone = Backbone("resnet18", stage=stage)
    assert backbone(torch.randn(1, 3, 64, 64)).shape == (1, channels, 64 // stride, 64 // stride)
    assert (backbone.stride, backbone.num_channels) == (stride, channels)


def test_published_part_of_the_backbone_is_frozen() -> None:
    trained = {name.split(".")[1] for name, p in Backbone("resnet18").named_parameters() if p.requires_grad}
    assert trained == {"layer2", "layer3", "layer4"}
    assert not any(p.requires_grad for p in build_model("detr", **SMALL, lr_backbone=0.0).backbone.parameters())


def test_group_norm_is_exact_on_large_maps_once_it_detects() -> None:
    norm, reference = GroupNorm(32, 64).eval(), nn.GroupNorm(32, 64).double()
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    reference.load_state_dict(norm.state_dict())
    x = (torch.randn(2, 64, 250, 300) + 0.5).contiguous(memory_format=torch.channels_last)
    assert_close(norm(x).double(), reference(x.double()), atol=4e-6, rtol=0)  # torch's own is 30 times as far
    small = x[..., :7, :9]
    assert_close(norm(small), norm.train()(small), atol=1e-5, rtol=1e-5)
    half = norm.eval().bfloat16()(small.bfloat16())
    assert half.dtype == torch.bfloat16
    assert_close(half, norm.train()(small.bfloat16()))


def test_backbone_weights_come_from_a_file(tmp_path: Any) -> None:
    import torchvision

    file, source = tmp_path / "resnet18.pth", torchvision.models.resnet18()
    torch.save(source.state_dict(), file)  # ordinary batch norm and the classifier included, as torchvision saves it
    backbone = Backbone("resnet18", str(file))
    assert_close(backbone.body.layer4[1].conv2.weight, source.layer4[1].conv2.weight)
    with pytest.raises(InputError, match=r"resnet18\.pth does not hold weights of this ResNet"):
        Backbone("resnet34", str(file))
    with pytest.raises(InputError, match="no backbone weights at"):
        Backbone("resnet34", str(tmp_path / "nothing.pth"))


def test_a_learned_embedding_says_how_far_it_reaches() -> None:
    model = build_model("detr", **{**SMALL, "backbone_stage": 1}, position_embedding="learned")
    with pytest.raises(ValueError, match="50 cells a side"):
        model(*batch_of((64, 256)))


def test_initialisation_is_the_published_one() -> None:
    """Xavier over the packed matrix for dense and paper; over each projection, with drawn biases, for official."""
    for enact, bound, biased in ((None, 0.0766, False), ("paper", 0.0766, False), ("official", 0.1083, True)):
        layer = build_model("detr", enact, backbone_weights=None).encoder.layers[2]
        attention = layer.self_attn
        assert attention.in_proj_weight.abs().max().item() == pytest.approx(bound, abs=2e-4)
        assert attention.out_proj.weight.abs().max().item() == pytest.approx(0.1083, abs=2e-4)
        assert bool(attention.in_proj_bias.abs().max() > 0) is biased
        assert layer.linear1.weight.abs().max().item() == pytest.approx((6 / (256 + 2048)) ** 0.5, abs=2e-4)


def test_unknown_fields_of_the_config_are_refused() -> None:
    with pytest.raises(ValueError, match="num_querys"):
        build_model("detr", num_querys=3)


def test_an_unknown_model_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no model 'dert'.*anchor_detr"):
        build_model("dert")


def test_weights_that_do_not_fit_are_named_and_leave_the_model_alone() -> None:
    model = build_model("detr", **SMALL)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    wrong = {key: value + 1 for key, value in before.items()}
    wrong["extra.weight"] = torch.zeros(1)
    wrong["class_embed.bias"] = torch.zeros(3)
    del wrong["query_embed.weight"]
    named = r"query_embed.weight is missing.*extra.weight is unexpected.*class_embed.bias has shape"
    with pytest.raises(ValueError, match=named):
        load_weights(model, wrong)
    for key, value in model.state_dict().items():
        assert_close(value, before[key])


def test_our_own_layout_loads() -> None:
    source, model = build_model("detr", "paper", **SMALL), build_model("detr", "paper", **SMALL)
    load_weights(model, source.state_dict())
    assert_close(dict(model.state_dict()), dict(source.state_dict()))


def test_an_incomplete_published_attention_is_not_made_up() -> None:
    model = build_model("detr", "official", **SMALL)
    state = {f"transformer.{key}" if key.startswith("encoder") else key: value
             for key, value in model.state_dict().items()}  # fmt: skip
    attention = "transformer.encoder.layers.0.self_attn"
    for name, part in zip(("W_q", "W_k", "W_v"), state.pop(f"{attention}.in_proj_weight").chunk(3), strict=True):
        state[f"{attention}.{name}.weight"] = part
    load_weights(model, state)
    del state[f"{attention}.W_k.weight"]
    with pytest.raises(ValueError, match=r"encoder.layers.0.self_attn.in_proj_weight is missing"):
        load_weights(model, state)


@pytest.mark.parametrize("name", ["detr", "conditional_detr", "anchor_detr"])
def test_choices_within_enact_reach_every_layer(name: str) -> None:
    choices = {"regions": "uniform", "pooling": "mean", "cluster_bias": "size", "max_clusters": 9}
    model = build_model(name, "paper", **SMALL, **choices, token_order="hilbert", smoothing_sigma=2.0)
    layers = [module for module in model.modules() if isinstance(module, EnactAttention | EnactRowColumnAttention)]
    assert len(layers) == SMALL["enc_layers"]
    for layer in layers:
        assert layer.method == Method(**choices)  # type: ignore[arg-type]
        assert layer.information.smoothing_sigma == 2.0
    ordered = layers if name == "anchor_detr" else [model]
    assert all(module.token_order is hilbert for module in ordered)


@pytest.mark.parametrize("options", [{}, {"boundary": "hard"}])
def test_the_probability_layer_of_plus_learns_at_the_pace_of_its_neighbours(options: dict[str, Any]) -> None:
    """As published its gradient is hundreds of times smaller than that of the query projection beside it."""

    def ratios(variant: str, **options: Any) -> list[float]:
        model = build_model("detr", variant, **SMALL, backbone_stage=1, **options)  # 192 tokens
        outputs = model(*batch_of((48, 64), (64, 48)))
        criterion = build_criterion("detr", num_classes=5, dec_layers=2)
        targets = [{"labels": torch.tensor([1, 3]), "boxes": torch.full((2, 4), 0.4)}] * 2
        losses = criterion(outputs, targets)
        torch.stack([losses[key] * weight for key, weight in criterion.weight_dict.items()]).sum().backward()
        attentions = [layer.self_attn for layer in model.encoder.layers]
        pairs = [(a.in_proj_weight.grad.chunk(3)[0], a.information.probability.weight.grad) for a in attentions]
        return [float(query.norm() / probability.norm()) for query, probability in pairs]

    assert max(ratios("plus", **options)) < 20
    assert min(ratios("plus", **options)) > 1 / 20
    assert min(ratios("paper")) > 40
