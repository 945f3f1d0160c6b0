"""ENACT in models that are not ours: `apply` turns their encoders' self-attention into clustered attention in place.

An attention keeps its identity: the module object, its parameters, hooks and device stay, only its class changes, and
`information.probability` is added. What `apply` changes is written down beside it, so that `remove` can undo it
without knowing what was done.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from enact.attention import EnactAttention, Heads, split_heads
from enact.kernels import DenseAttention
from enact.method import Variant

logger = logging.getLogger(__name__)

# Attention classes of the `transformers` package, which is not imported: those of its releases 5 and, last, 4.
HUGGING_FACE = {
    "DetrSelfAttention", "ConditionalDetrSelfAttention", "RTDetrSelfAttention", "DetrAttention",
    "RTDetrMultiheadAttention",
}  # fmt: skip
SUPPORTED = (
    "nn.TransformerEncoder, nn.TransformerEncoderLayer, nn.Transformer, any module whose class is named "
    "...EncoderLayer and whose self_attn is an nn.MultiheadAttention; and DETR, Conditional DETR and RT-DETR of "
    "Hugging Face's transformers"
)


def apply(model: nn.Module, *, smoothing_sigma: float = 3.0, variant: Variant = "paper", **options: Any) -> list[str]:
    """Put ENACT into the encoder self-attention of a model, in place; decoders stay as they are.

    Weights are kept: the same parameters under the same names, so that an optimizer that holds them goes on, and a
    dense state dict lacks nothing but `information.probability`. Those new parameters must be given to the optimizer;
    so call this before making one, and before wrapping the model for distributed training.

    Supported are `nn.TransformerEncoder`, `nn.TransformerEncoderLayer`, `nn.Transformer`, any module whose class is
    named `...EncoderLayer` and whose `self_attn` is an `nn.MultiheadAttention`; and DETR, Conditional DETR and RT-DETR
    of Hugging Face's transformers, with or without their heads.

    Args:
        model: changed in place, alone or as a part of something larger.
        smoothing_sigma: standard deviation, in tokens, of the Gaussian that smooths the information.
        variant, options: as in `EnactAttention`.

    Returns:
        The dotted names of the attentions that now cluster.

    Raises:
        ValueError: there is nothing to replace, ENACT is there already, or an attention cannot be replaced. The model
            is then unchanged.
    """
    attentions = _replaceable(model)
    options |= {"smoothing_sigma": smoothing_sigma, "variant": variant}
    plans = [_plan(name, attention, options) for name, attention in attentions.items()]
    for attention, plan in zip(attentions.values(), plans, strict=True):
        _become(attention, plan.target, plan.attributes)
        attention.information = plan.information
    for encoder in _torch_encoders(model):
        _become(encoder, type(encoder), {"use_nested_tensor": False})
    logger.info("ENACT (%s) in %d attentions: %s", variant, len(attentions), ", ".join(attentions))
    return list(attentions)


def remove(model: nn.Module) -> list[str]:
    """Undo `apply`: the attentions are what they were, with the weights that they have now.

    Args:
        model: what was given to `apply`, or a copy of it.

    Returns:
        The dotted names of the attentions that no longer cluster.

    Raises:
        ValueError: `apply` has put ENACT nowhere in this model.
    """
    changed = {name: module for name, module in model.named_modules() if "_before_enact" in vars(module)}
    attentions = [name for name, module in changed.items() if isinstance(module, EnactAttention)]
    if not attentions:
        raise ValueError(f"enact.apply has put ENACT nowhere in this {type(model).__name__}")
    for name in attentions:
        del changed[name].information
    for module in changed.values():
        _become_again(module)
    logger.info("ENACT removed from %d attentions: %s", len(attentions), ", ".join(attentions))
    return attentions


class EnactProjectedAttention(EnactAttention):
    """The clustered form of an attention with separate projections, called as those of Hugging Face's DETRs are.

    It is never built: `_projected` makes a subclass of it and of the original class, which an existing attention
    becomes. The projections are called as modules, so that hooks and adapters on them keep working.
    """

    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module
    _before_enact: _Before

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_embeddings: Tensor | None = None,
        object_queries: Tensor | None = None,
        output_attentions: bool = False,
        **_: object,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend to the clusters of the tokens themselves.

        Args:
            hidden_states: (B, N, C).
            attention_mask: which keys take part, in any form that `padding_of` reads.
            position_embeddings, object_queries: (B, N, C) or (1, N, C), the position to add to queries and keys under
                its newer and its older name.
            output_attentions: also return the map of attention to tokens, which is then stored.

        Returns:
            The result (B, N, C), and the map (B, H, N, N) or None.
        """
        position = object_queries if position_embeddings is None else position_embeddings
        located = hidden_states if position is None else hidden_states + position
        mask = padding_of(attention_mask)
        return super().forward(located, located, hidden_states, mask, output_attentions, average_attn_weights=False)

    def reset_parameters(self) -> None:
        """Draw new parameters for what is ours; the projections are modules that draw their own."""
        self.information.reset_parameters(self.method.initial_gain)

    @property
    def out_proj(self) -> nn.Module:  # type: ignore[override]
        """The output projection under its newer or its older name."""
        projection = self._modules.get("out_proj", self._modules.get("o_proj"))
        assert projection is not None
        return projection

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> Heads:
        projected = (self.q_proj(query), self.k_proj(key), self.v_proj(value))
        return Heads(*(split_heads(tokens, self.num_heads) for tokens in projected))

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled by the original class, since this object's own was made at run time."""
        return _blank, (self._before_enact.original,), vars(self)


def padding_of(attention_mask: Tensor | None) -> Tensor | None:
    """Which keys a mask of Hugging Face's transformers shuts out for every query.

    Args:
        attention_mask: bool (B, 1, L, N), True where a query may attend; float (B, 1, L, N), hugely negative where it
            may not; or (B, N), 0 where padded. The queries of an encoder share one row, and the first is read.

    Returns:
        (B, N) bool, True where padded, or None.
    """
    if attention_mask is None:
        return None
    if not isinstance(attention_mask, Tensor) or attention_mask.dim() not in (2, 4):
        kind = type(attention_mask).__name__
        raise ValueError(f"ENACT cannot read an attention mask of type {kind}; use attn_implementation='sdpa'")
    row = attention_mask if attention_mask.dim() == 2 else attention_mask[:, 0, 0]
    if attention_mask.dim() == 4 and row.is_floating_point():
        return row <= torch.finfo(row.dtype).min / 2
    return row == 0


class _Before(NamedTuple):
    """What a module was: its class, the attributes that it did not have, and the values of those that it had."""

    original: type[nn.Module]
    added: tuple[str, ...]
    changed: dict[str, Any]


class _Plan(NamedTuple):
    """What an attention will be."""

    target: type[nn.Module]
    attributes: dict[str, Any]
    information: nn.Module


def _encoder_attentions(model: nn.Module) -> dict[str, nn.Module]:
    """The self-attention of each encoder layer, once each, by its dotted name."""
    names: dict[nn.Module, str] = {}
    for name, layer in model.named_modules():
        attention = getattr(layer, "self_attn", None)
        is_encoder_layer = any(cls.__name__.endswith("EncoderLayer") for cls in type(layer).__mro__)
        if is_encoder_layer and isinstance(attention, nn.Module):
            names.setdefault(attention, f"{name}.self_attn".lstrip("."))
    return {name: attention for attention, name in names.items()}


def _replaceable(model: nn.Module) -> dict[str, nn.Module]:
    """The encoder attentions that ENACT can stand in for, by name; ValueError where there is none, or ENACT already."""
    found = _encoder_attentions(model)
    present = [name for name, attention in found.items() if isinstance(attention, EnactAttention)]
    if present:
        raise ValueError(f"ENACT is in this model already: {', '.join(present)}")
    replaceable = {
        name: attention
        for name, attention in found.items()
        if isinstance(attention, nn.MultiheadAttention) or _is_hugging_face(attention)
    }
    if not replaceable:
        kinds = ", ".join(sorted({type(attention).__name__ for attention in found.values()})) or "no self_attn"
        holder = f"{type(model).__name__}, whose encoder layers hold {kinds}"
        raise ValueError(f"nothing for ENACT to replace in this {holder}; supported: {SUPPORTED}")
    return replaceable


def _torch_encoders(model: nn.Module) -> Iterator[nn.TransformerEncoder]:
    """Encoders that would hand nested tensors to their layers, which only torch's own fused layer can take."""
    for module in model.modules():
        if not isinstance(module, nn.TransformerEncoder) or "_before_enact" in vars(module):
            continue
        if any(isinstance(attention, EnactAttention) for attention in _encoder_attentions(module).values()):
            yield module


def _is_hugging_face(attention: nn.Module) -> bool:
    return any(
        cls.__name__ in HUGGING_FACE and cls.__module__.startswith("transformers.") for cls in type(attention).__mro__
    )


def _plan(name: str, attention: nn.Module, options: dict[str, Any]) -> _Plan:
    """What `attention` becomes, found by building an `EnactAttention` of its shape; ValueError where none can be."""
    if "forward" in vars(attention):
        raise ValueError(f"{name} has a forward of its own, set on the object, which would hide that of ENACT")
    if not isinstance(attention, nn.MultiheadAttention):
        target, shape = _projected(type(attention)), _projected_shape(attention)
    elif type(attention) in (nn.MultiheadAttention, DenseAttention):
        target, shape = EnactAttention, _packed_shape(attention)
    else:
        kind = type(attention).__name__
        raise ValueError(f"{name} is a {kind}, a subclass whose own behaviour ENACT would replace unseen")
    like = next((p for p in attention.parameters() if p.is_floating_point()), torch.empty(0))
    pattern = EnactAttention(**shape, **options, device=like.device, dtype=like.dtype).train(attention.training)
    has, bookkeeping = vars(attention), vars(nn.Module())
    attributes = {
        key: value
        for key, value in vars(pattern).items()
        if key not in bookkeeping and (key not in has or has[key] != value)
    }
    return _Plan(target, attributes, pattern.information)


def _packed_shape(attention: nn.MultiheadAttention) -> dict[str, Any]:
    """The arguments that `attention` was built with."""
    names = ("embed_dim", "num_heads", "dropout", "add_zero_attn", "kdim", "vdim", "batch_first")
    shape = {name: getattr(attention, name) for name in names}
    return shape | {"bias": attention.in_proj_bias is not None, "add_bias_kv": attention.bias_k is not None}


def _projected_shape(attention: nn.Module) -> dict[str, Any]:
    """The arguments of the `EnactAttention` that has the shape of an attention with separate projections."""
    query: Any = attention.q_proj
    head_dim: Any = attention.head_dim
    dropout = getattr(attention, "attention_dropout", getattr(attention, "dropout", 0.0))
    heads = query.out_features // head_dim
    return {"embed_dim": query.out_features, "num_heads": heads, "dropout": dropout, "batch_first": True}


_PROJECTED: dict[type[nn.Module], type[nn.Module]] = {}


def _projected(original: type[nn.Module]) -> type[nn.Module]:
    """The clustered subclass of an attention class with separate projections, the same one each time."""
    if original not in _PROJECTED:
        name = f"Enact{original.__name__}"
        _PROJECTED[original] = type(name, (EnactProjectedAttention, original), {"__module__": __name__})
    return _PROJECTED[original]


def _blank(original: type[nn.Module]) -> nn.Module:
    """An object of the clustered class, for unpickling to fill."""
    return object.__new__(_projected(original))


def _become(module: nn.Module, target: type[nn.Module], attributes: dict[str, Any]) -> None:
    """Give a module another class and other attributes, and note in it what it was."""
    own = vars(module)
    added = tuple(name for name in attributes if name not in own)
    changed = {name: own[name] for name in attributes if name in own}
    own.update(attributes, _before_enact=_Before(type(module), added, changed))
    module.__class__ = target


def _become_again(module: nn.Module) -> None:
    """Undo `_become`."""
    own = vars(module)
    before: _Before = own.pop("_before_enact")
    for name in before.added:
        del own[name]
    own.update(before.changed)
    module.__class__ = before.original
