"""enact.apply and enact.remove: torch's transformers, encoders in DETR's form, and those of Hugging Face."""

from __future__ import annotations

import copy
import io
import logging
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hosts import CHANNELS, HUGGING_FACE, KINDS, MASKED, TOKENS, TORCH, make_host, position, torch_layer
from torch import Tensor, nn
from torch.testing import assert_close

import enact
from enact.plugin import padding_of
from models.encoder import Encoder


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Tensors are so small here that threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def draw_tokens(padded: int = 0) -> tuple[Tensor, Tensor | None]:
    """Tokens (2, N, C), and a mask of the last `padded` tokens of the second image."""
    mask = torch.arange(TOKENS) >= torch.tensor([[TOKENS], [TOKENS - padded]])
    return torch.randn(2, TOKENS, CHANNELS), mask if padded else None


def module_state(model: nn.Module) -> dict[str, tuple[Any, ...]]:
    """Every module's identity, class and plain attributes; hooks and children apart."""
    return {
        name: (id(module), type(module), {k: v for k, v in vars(module).items() if not k.startswith("_modules")})
        for name, module in model.named_modules()
    }


@pytest.mark.parametrize("kind", KINDS)
def test_apply_changes_the_encoder_attentions_and_nothing_else(kind: str) -> None:
    host = make_host(kind)
    types = {name: type(module) for name, module in host.model.named_modules()}
    parameters = dict(host.model.named_parameters())
    assert enact.apply(host.model, smoothing_sigma=2.0) == host.names
    modules = dict(host.model.named_modules())
    assert [name for name, kind in types.items() if type(modules[name]) is not kind] == host.names
    after = dict(host.model.named_parameters())
    assert all(after[name] is parameter for name, parameter in parameters.items())
    new = {f"{name}.information.probability.{part}" for name in host.names for part in ("weight", "bias")}
    assert after.keys() - parameters.keys() == new
    assert all(modules[name].information.smoothing_sigma == 2.0 for name in host.names)


@pytest.mark.parametrize("kind", KINDS)
def test_the_result_is_not_the_dense_one_and_the_probability_learns(kind: str) -> None:
    host, (tokens, _) = make_host(kind), draw_tokens()
    dense = host(tokens)
    names = enact.apply(host.model)
    found = host(tokens)
    assert found.isfinite().all()
    assert (found - dense).abs().max() > 1e-2
    found.square().mul(torch.rand_like(found)).sum().backward()
    for name in names:
        gradient = host.model.get_parameter(f"{name}.information.probability.weight").grad
        assert gradient is not None
        assert gradient.abs().max() > 0


@pytest.mark.parametrize("padded", [0, 11])
@pytest.mark.parametrize("kind", KINDS)
def test_one_cluster_per_token_is_the_dense_model(kind: str, padded: int) -> None:
    host, (tokens, mask) = make_host(kind), draw_tokens(padded)
    dense = host(tokens, mask)
    enact.apply(host.model, regions="tokens")
    real = slice(None) if mask is None or kind not in MASKED else ~mask
    assert_close(host(tokens, mask)[real], dense[real], atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", MASKED)
@pytest.mark.parametrize("training", [False, True])
def test_padding_never_changes_a_real_token(kind: str, training: bool) -> None:
    host, (tokens, mask) = make_host(kind), draw_tokens(11)
    enact.apply(host.model.train(training))
    with torch.set_grad_enabled(training):
        padded = host(tokens, mask)
        alone = host(tokens[1:, :-11])
    assert_close(padded[1:, :-11], alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", HUGGING_FACE[:2])
def test_padding_is_read_from_the_masks_of_eager_attention_too(kind: str) -> None:
    host, (tokens, mask) = make_host(kind), draw_tokens(11)
    enact.apply(host.model)
    assert mask is not None
    found = {}
    for implementation in ("sdpa", "eager"):
        host.model.config._attn_implementation = implementation
        found[implementation] = host(tokens, mask)
    assert_close(found["eager"], found["sdpa"], atol=0, rtol=0)
    assert (found["eager"] - host(tokens)).abs().max() > 1e-2


@pytest.mark.parametrize("padded", [0, 11])
@pytest.mark.parametrize("kind", TORCH)
def test_torch_runs_no_fused_kernel_in_place_of_enact(kind: str, padded: int) -> None:
    host, (tokens, mask) = make_host(kind), draw_tokens(padded)
    real = slice(None) if mask is None else ~mask
    with torch.no_grad():
        dense = host(tokens, mask)[real]
        enact.apply(host.model)
        training, evaluating = host(tokens, mask)[real], host.encode(host.model.eval(), tokens, mask)[real]
    assert_close(evaluating, training, atol=1e-6, rtol=0)
    assert (evaluating - dense).abs().max() > 1e-2


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_remove_puts_everything_back(kind: str) -> None:
    host, (tokens, mask) = make_host(kind), draw_tokens(11)
    host.model.eval()
    dense, state, keys = host(tokens, mask), module_state(host.model), list(host.model.state_dict())
    for _ in range(2):
        enact.apply(host.model)
        assert not torch.equal(host(tokens, mask), dense)
        assert enact.remove(host.model) == host.names
        assert module_state(host.model) == state
        assert list(host.model.state_dict()) == keys
        assert_close(host(tokens, mask), dense, atol=0, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_copies_can_be_used_and_restored(kind: str) -> None:
    host, (tokens, mask) = make_host(kind), draw_tokens(11)
    host.model.eval()
    dense = host(tokens, mask)
    enact.apply(host.model)
    expected = host(tokens, mask)
    for twin in (copy.deepcopy(host.model), pickle.loads(pickle.dumps(host.model))):
        assert_close(host.encode(twin, tokens, mask), expected, atol=0, rtol=0)
        enact.remove(twin)
        assert_close(host.encode(twin, tokens, mask), dense, atol=0, rtol=0)
    assert_close(host(tokens, mask), expected, atol=0, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_change_of_dtype_is_kept_after_remove(kind: str) -> None:
    host, (tokens, mask) = make_host(kind), draw_tokens(11)
    double = host.encode(copy.deepcopy(host.model).double(), tokens.double(), mask)
    enact.apply(host.model)
    host.model.double()
    assert host(tokens.double(), mask).dtype == torch.float64
    enact.remove(host.model)
    assert_close(host(tokens.double(), mask), double)


@pytest.mark.parametrize("kind", ["encoder", "hf_detr"])
def test_dtype_and_mode_are_those_of_the_host(kind: str) -> None:
    host, (tokens, _) = make_host(kind), draw_tokens()
    host.model.to(torch.bfloat16).eval()
    for name in enact.apply(host.model):
        attention = host.model.get_submodule(name)
        assert {parameter.dtype for parameter in attention.parameters()} == {torch.bfloat16}
        assert not any(module.training for module in attention.modules())
    assert host(tokens.bfloat16()).isfinite().all()


@pytest.mark.parametrize("kind", ["encoder", *HUGGING_FACE])
def test_attention_dropout_of_the_host_is_kept(kind: str) -> None:
    host, (tokens, _) = make_host(kind), draw_tokens()
    for name in host.names:
        attention = host.model.get_submodule(name)
        setattr(attention, "attention_dropout" if hasattr(attention, "attention_dropout") else "dropout", 0.5)
    enact.apply(host.model.train())
    assert (host(tokens) - host(tokens)).abs().max() > 1e-3
    host.model.eval()
    assert_close(host(tokens), host(tokens), atol=0, rtol=0)


@pytest.mark.parametrize("kind", ["encoder", "hf_detr"])
def test_an_optimizer_from_before_goes_on_and_remove_keeps_what_was_learned(kind: str) -> None:
    host, (tokens, _) = make_host(kind), draw_tokens()
    optimizer = torch.optim.SGD(host.model.parameters(), lr=0.1)
    old = set(host.model.parameters())
    enact.apply(host.model)
    optimizer.add_param_group({"params": [p for p in host.model.parameters() if p not in old]})
    before = copy.deepcopy(host.model.state_dict())
    host(tokens).square().mul(torch.rand_like(tokens)).sum().backward()
    optimizer.step()
    learned = copy.deepcopy(host.model.state_dict())
    of_attention = [name for name in before if name.startswith(host.names[0]) and "weight" in name]
    assert all(not torch.equal(before[name], learned[name]) for name in of_attention)
    enact.remove(host.model)
    for name, tensor in host.model.state_dict().items():
        assert_close(tensor, learned[name], atol=0, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_checkpoints_go_either_way(kind: str) -> None:
    host = make_host(kind)
    dense = copy.deepcopy(host.model.state_dict())
    names = enact.apply(host.model)
    missing, unexpected = host.model.load_state_dict(dense, strict=False)
    assert set(missing) == {f"{name}.information.probability.{part}" for name in names for part in ("weight", "bias")}
    assert unexpected == []
    file = io.BytesIO()
    torch.save(host.model.state_dict(), file)
    file.seek(0)
    other = make_host(kind)
    enact.apply(other.model)
    other.model.load_state_dict(torch.load(file, weights_only=True))
    tokens, mask = draw_tokens(11)
    assert_close(other(tokens, mask), host(tokens, mask), atol=0, rtol=0)


@pytest.mark.parametrize("variant", ["paper", "official"])
def test_separate_projections_do_what_stacked_ones_do(variant: Any) -> None:
    host, (tokens, mask) = make_host("hf_detr"), draw_tokens(11)
    name = enact.apply(host.model, variant=variant, max_clusters=7)[0]
    projected = host.model.get_submodule(name)
    stacked = enact.EnactAttention(CHANNELS, 4, batch_first=True, variant=variant, max_clusters=7)
    state = {f"out_proj.{part}": getattr(projected.out_proj, part) for part in ("weight", "bias")}
    for part in ("weight", "bias"):
        projections = (projected.q_proj, projected.k_proj, projected.v_proj)
        state[f"in_proj_{part}"] = torch.cat([getattr(projection, part) for projection in projections])
        state[f"information.probability.{part}"] = getattr(projected.information.probability, part)
    stacked.load_state_dict(state)
    located = tokens + position(tokens)
    expected = stacked(located, located, tokens, key_padding_mask=mask, average_attn_weights=False)
    real = None if mask is None else ~mask
    found = projected(tokens, real, position_embeddings=position(tokens), output_attentions=True)
    assert_close(found, expected)


@pytest.mark.parametrize("kind", HUGGING_FACE)
def test_whole_detectors_train_and_detect(kind: str) -> None:
    model: Any = make_host(kind).model
    images, pixel_mask = torch.randn(2, 3, 96, 160), torch.ones(2, 96, 160, dtype=torch.long)
    pixel_mask[1, :, 100:] = 0
    labels = [{"class_labels": torch.tensor([1]), "boxes": torch.tensor([[0.5, 0.5, 0.2, 0.3]])}] * 2
    inputs = {"pixel_values": images, "pixel_mask": pixel_mask}
    with torch.no_grad():
        dense = model.eval()(**inputs)
        names = enact.apply(model)
        clustered = model(**inputs)
    assert clustered.pred_boxes.isfinite().all()
    assert not torch.equal(clustered.logits, dense.logits)
    model.train()(**inputs, labels=labels).loss.backward()
    assert model.get_parameter(f"{names[0]}.information.probability.weight").grad.abs().max() > 0
    assert enact.remove(model.model) == [name.removeprefix("model.") for name in names]
    assert not any(isinstance(module, enact.EnactAttention) for module in model.modules())


def test_attention_maps_are_given_to_those_who_ask() -> None:
    model: Any = make_host("hf_detr").model
    names = enact.apply(model)
    maps = model(torch.randn(1, 3, 96, 160), output_attentions=True).encoder_attentions
    assert [tuple(weights.shape) for weights in maps] == [(1, 4, 15, 15)] * len(names)
    assert_close(maps[0].sum(-1), torch.ones(1, 4, 15))


def test_extra_keys_of_the_host_are_kept() -> None:
    def attention() -> nn.Module:
        return nn.MultiheadAttention(CHANNELS, 4, batch_first=True, bias=False, add_bias_kv=True, add_zero_attn=True)

    encoder, (tokens, mask) = Encoder(attention, 2, CHANNELS, 64, 0.0), draw_tokens(11)
    dense = encoder(tokens, position(tokens), mask)
    enact.apply(encoder, regions="tokens")
    assert_close(encoder(tokens, position(tokens), mask), dense)


def test_a_layer_used_twice_is_replaced_once() -> None:
    layer = torch_layer()
    model = nn.Sequential(layer, layer)
    assert enact.apply(model) == ["0.self_attn"]
    assert enact.remove(model) == ["0.self_attn"]


def test_parts_can_be_removed_one_by_one() -> None:
    encoder = nn.TransformerEncoder(torch_layer(), 2)
    enact.apply(encoder)
    assert [enact.remove(layer) for layer in encoder.layers] == [["self_attn"], ["self_attn"]]
    enact.apply(encoder)
    enact.remove(encoder)
    assert encoder.use_nested_tensor


def test_names_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="enact"):
        enact.apply(make_host("encoder").model)
    assert "layers.0.self_attn, layers.1.self_attn" in caplog.text


def test_applying_twice_is_refused() -> None:
    model = make_host("encoder").model
    enact.apply(model)
    with pytest.raises(ValueError, match=r"already: layers\.0\.self_attn, layers\.1\.self_attn"):
        enact.apply(model)


def test_a_model_without_encoder_attention_is_refused() -> None:
    decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(CHANNELS, 4, 64), 1)
    with pytest.raises(ValueError, match=r"TransformerDecoder, whose encoder layers hold no self_attn; supported: nn"):
        enact.apply(decoder)
    with pytest.raises(ValueError, match=r"encoder layers hold Identity; supported"):
        enact.apply(Encoder(nn.Identity, 1, CHANNELS, 64, 0.0))


def test_remove_without_apply_is_refused() -> None:
    model = nn.Sequential(torch_layer())
    with pytest.raises(ValueError, match="nowhere in this Sequential"):
        enact.remove(model)
    model[0].self_attn = enact.EnactAttention(CHANNELS, 4, batch_first=True)
    with pytest.raises(ValueError, match="nowhere in this Sequential"):
        enact.remove(model)


class OtherAttention(nn.MultiheadAttention):
    """A subclass that may do anything."""


def with_a_subclass(model: nn.Sequential) -> None:
    model[1].self_attn = OtherAttention(CHANNELS, 4, batch_first=True)


def with_a_patched_forward(model: nn.Sequential) -> None:
    model[1].self_attn.forward = model[1].self_attn.forward


@pytest.mark.parametrize(
    ("prepare", "options", "message"),
    [
        (None, {"variant": "best"}, "variant must be"),
        (None, {"max_clusters": 0}, "max_clusters"),
        (with_a_subclass, {}, r"1\.self_attn is a OtherAttention"),
        (with_a_patched_forward, {}, r"1\.self_attn has a forward of its own"),
    ],
)
def test_a_refusal_leaves_the_model_as_it_was(prepare: Any, options: Any, message: str) -> None:
    model = nn.Sequential(torch_layer(), torch_layer())
    if prepare is not None:
        prepare(model)
    state = module_state(model)
    with pytest.raises(ValueError, match=message):
        enact.apply(model, **options)
    assert module_state(model) == state


def test_masks_are_read_in_every_form() -> None:
    pad_mask = torch.tensor([[False, False, True], [False, True, True]])
    attends = (~pad_mask)[:, None, None].expand(-1, 1, 3, -1)
    additive = torch.zeros(2, 1, 3, 3).masked_fill(~attends, torch.finfo(torch.float32).min)
    for mask in (attends, additive, additive * 2, additive.half(), ~pad_mask, (~pad_mask).long(), (~pad_mask).float()):
        assert_close(padding_of(mask), pad_mask)
    assert padding_of(None) is None
    with pytest.raises(ValueError, match="mask of type BlockMask"):
        padding_of(type("BlockMask", (), {})())


def test_the_example_in_the_readme_runs_as_it_stands(capsys: pytest.CaptureFixture[str]) -> None:
    section = (Path(__file__).parents[1] / "README.md").read_text().partition("## Use ENACT in your own model")[2]
    exec(section.partition("```python\n")[2].partition("```")[0], {})
    said = capsys.readouterr().out
    assert said.count("self_attn") == 6
    assert "torch.Size([2, 850, 256])" in said
