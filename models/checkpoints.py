"""Published state-dict layouts <-> ours, and warm starts; Hugging Face's are in `models.huggingface`.

Ours is the modules' own. The six published layouts (spec 4) differ in names, in how ENACT's projections are stored,
and in that Anchor DETR's file holds the heads that its decoder layers share once for each layer.

The released ENACT also reads the same numbers in another way than its hosts and our `paper` variant do: DETR's logits
are not scaled and its result is divided by D (spec 2.6), and Anchor DETR's queries and keys trade places (spec 3.1,
item 8). `warm_start` carries weights over that border.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from models.huggingface import from_huggingface, is_huggingface

logger = logging.getLogger(__name__)

StateDict = Mapping[str, Tensor]

# Published name -> ours, one after the other.
RENAMES = tuple((re.compile(pattern), ours) for pattern, ours in (
    (r"^backbone\.0\.body\.", "backbone.body."),
    (r"^backbone\.1\.", "position_embedding."),
    (r"^transformer\.", ""),
    # ENACT in the encoder of DETR and Conditional DETR, and of Anchor DETR
    (r"\.W_o\.", ".out_proj."),
    (r"\.W_prob\.", ".information.probability."),
    (r"\.ENACT\.", ".self_attn."),
    # Anchor DETR
    (r"^(en|de)coder_layers\.", r"\1coder.layers."),
    (r"^input_proj\.0\.(\d+)\.", r"input_proj.\1."),
    (r"^(class|bbox)_embed\.\d+\.", r"\1_embed."),
))  # fmt: skip
# Our name -> the published one: of Anchor DETR, and of the other two. {} stands for each decoder layer.
ANCHOR_NAMES = tuple((re.compile(pattern), published) for pattern, published in (
    (r"^(en|de)coder\.layers\.", r"transformer.\1coder_layers."),
    (r"^(pattern|position|adapt_pos[12]d)\.", r"transformer.\1."),
    (r"^(class|bbox)_embed\.", r"transformer.\1_embed.{}."),
    (r"^input_proj\.", "input_proj.0."),
    (r"\.self_attn\.information\.probability\.", ".ENACT.W_prob."),
))  # fmt: skip
PUBLISHED_NAMES = tuple((re.compile(pattern), published) for pattern, published in (
    (r"^backbone\.", "backbone.0."),
    (r"^position_embedding\.", "backbone.1."),
    (r"^(en|de)coder\.", r"transformer.\1coder."),
    (r"\.information\.probability\.", ".W_prob."),
))  # fmt: skip
# ENACT's separate projections, in the order in which nn.MultiheadAttention packs them.
SEPARATE_PROJECTIONS = ("W_q", "W_k", "W_v")
# A checkpoint of a torchvision ResNet with ordinary batch norm has this counter; frozen batch norm does not.
IGNORED_SUFFIX = "num_batches_tracked"
RELEASED_ENACT = ".W_prob."
OUR_ENACT = ".information.probability."
CLASS_HEAD = "class_embed."
PACKED_PROJECTION = re.compile(r"^encoder\.layers\.\d+\.self_attn\.in_proj_(weight|bias)$")


def load_weights(model: nn.Module, state_dict: StateDict) -> None:
    """Load our layout or a published one, recognised by its keys.

    Args:
        model: from `build_model`.
        state_dict: its own `state_dict()`, the "model" entry of a published checkpoint of DETR, Conditional DETR
            or Anchor DETR, dense or with ENACT, or a state dict of Hugging Face's DETR or Conditional DETR.

    Raises:
        ValueError: names what is missing, unexpected, or of another shape. The model is unchanged then.
    """
    if encoder_variant(model) == "paper" and is_official(state_dict):
        logger.warning("weights of the released ENACT mean something else to the paper's variant; see warm_start")
    state = from_published(state_dict)
    own = model.state_dict()
    problems = [
        *(f"{key} is missing" for key in own if key not in state),
        *(f"{key} is unexpected" for key in state if key not in own),
        *(
            f"{key} has shape {tuple(state[key].shape)}, the model {tuple(own[key].shape)}"
            for key in own
            if key in state and state[key].shape != own[key].shape
        ),
    ]
    if problems:
        shown = "; ".join(problems[:5])
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ValueError(f"the weights do not fit the model: {shown}{more}")
    model.load_state_dict(state)


def warm_start(model: nn.Module, state_dict: StateDict, official: bool | None = None) -> list[str]:
    """Start from weights that were trained for other classes, or without ENACT, or with its other variant.

    Args:
        model: from `build_model`.
        state_dict: as in `load_weights`.
        official: whether these are weights of the "official" variant. None: as the keys say; those of a released
            ENACT checkpoint are, those of a dense model are not, and ENACT in our layout is taken to be the model's.

    Returns:
        A sentence for each thing that was not copied as it is: a class head for another number of classes and new
        ENACT layers stay as drawn; projections are rewritten for the variant.

    Raises:
        ValueError: as `load_weights`, for anything else that does not fit.
    """
    state, own, notes = from_published(state_dict), model.state_dict(), []
    dense = not any(OUR_ENACT in key for key in state)
    if official is None and (dense or is_official(state_dict)):
        official = not dense
    to_official = encoder_variant(model) == "official"
    if encoder_variant(model) and official is not None and official != to_official:
        notes.append(_cross_conventions(state, model, to_official))
    kept = {key for key in own if dense and OUR_ENACT in key}
    if kept:
        notes.append(f"{len(kept) // 2} layers of ENACT are new and stay as drawn")
    resized = {key for key in own if key.startswith(CLASS_HEAD) and _other_length(own[key], state.get(key))}
    if resized:
        rows = [len(tensors[min(resized)]) for tensors in (state, own)]
        notes.append(f"the class head has {rows[0]} rows in the weights, {rows[1]} in the model, and stays as drawn")
    load_weights(model, {**state, **{key: own[key] for key in kept | resized}})
    return notes


def from_published(state_dict: StateDict) -> dict[str, Tensor]:
    """Any known layout -> ours; a state dict in our layout comes back as it is.

    Raises:
        ValueError: copies of a head that Anchor DETR's decoder layers share differ.
    """
    state: dict[str, Tensor] = {}
    if is_huggingface(state_dict):
        state_dict = from_huggingface(state_dict)
    for key, value in state_dict.items():
        if key.endswith(IGNORED_SUFFIX):
            continue
        ours = _rename(key)
        if ours in state and not torch.equal(state[ours], value):
            raise ValueError(f"{key} is not equal to the other copies of {ours}, which the decoder layers share")
        state[ours] = value
    return _pack_projections(state)


def to_published(state_dict: StateDict) -> dict[str, Tensor]:
    """Our layout -> the published one of the same detector, recognised by its keys; the tensors are shared.

    Weights of the `paper` variant come out in the released ENACT's layout, and keep their own meaning (`warm_start`).
    """
    anchor, enact = "pattern.weight" in state_dict, any(OUR_ENACT in key for key in state_dict)
    state = dict(state_dict) if anchor or not enact else _unpack_projections(state_dict)
    layers = 1 + max(int(key.split(".")[2]) for key in state if key.startswith("decoder.layers."))
    published = {}
    for key, value in state.items():
        for pattern, name in ANCHOR_NAMES if anchor else PUBLISHED_NAMES:
            key = pattern.sub(name, key)
        for layer in range(layers if "{}" in key else 1):
            published[key.format(layer)] = value
    return published


def is_official(state_dict: StateDict) -> bool:
    """Whether these are weights of the released ENACT, in its layout."""
    return any(RELEASED_ENACT in key for key in state_dict)


def encoder_variant(model: nn.Module) -> str | None:
    """The variant of ENACT in a detector's encoder: "paper", "official", or None for a dense one."""
    for module in model.get_submodule("encoder").modules():
        variant: str | None = getattr(module, "variant", None)
        if variant is not None:
            return variant
    return None


def _rename(key: str) -> str:
    for pattern, ours in RENAMES:
        key = pattern.sub(ours, key)
    return key


def _pack_projections(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """W_q, W_k and W_v of each attention -> in_proj_weight and in_proj_bias; an incomplete three stays as it is."""
    packed = dict(state)
    marker = f".{SEPARATE_PROJECTIONS[0]}."
    for key in state:
        keys = [key.replace(marker, f".{name}.") for name in SEPARATE_PROJECTIONS]
        if marker in key and all(part in state for part in keys):
            attention, _, kind = key.partition(marker)
            packed[f"{attention}.in_proj_{kind}"] = torch.cat([packed.pop(part) for part in keys])
    return packed


def _unpack_projections(state: StateDict) -> dict[str, Tensor]:
    """The encoder's in_proj_weight and in_proj_bias -> W_q, W_k and W_v; its out_proj -> W_o."""
    unpacked = {}
    for key, value in state.items():
        found = PACKED_PROJECTION.match(key)
        if found:
            attention = key.removesuffix(f".in_proj_{found[1]}")
            parts = zip(SEPARATE_PROJECTIONS, value.chunk(3), strict=True)
            unpacked.update({f"{attention}.{name}.{found[1]}": part for name, part in parts})
        else:
            unpacked[re.sub(r"^(encoder\..*)\.out_proj\.", r"\1.W_o.", key)] = value
    return unpacked


def _other_length(own: Tensor, loaded: Tensor | None) -> bool:
    return loaded is not None and own.shape != loaded.shape and own.shape[1:] == loaded.shape[1:]


def _cross_conventions(state: dict[str, Tensor], model: nn.Module, to_official: bool) -> str:
    """Rewrite the encoder's packed projections in `state` for the other convention; say how."""
    own = model.state_dict()
    attention = model.get_submodule("encoder.layers.0.self_attn")
    head_dim: int = attention.head_dim  # type: ignore[assignment]
    row_column = not isinstance(attention, nn.MultiheadAttention)
    for key in state:
        if PACKED_PROJECTION.match(key) and key in own and state[key].shape == own[key].shape:
            state[key] = swap_slices(state[key]) if row_column else scale_slices(state[key], head_dim, to_official)
    if row_column:
        return "the query and key slices of the encoder's projections are exchanged"
    return "the query and value slices of the encoder's projections are scaled"


def swap_slices(packed: Tensor) -> Tensor:
    """Exchange the query and key slices of a row-column projection (5 C, ...), dense or paper <-> official."""
    q_row, q_col, k_row, k_col, v = packed.chunk(5)
    return torch.cat((k_row, k_col, q_row, q_col, v))


def scale_slices(packed: Tensor, head_dim: int, to_official: bool) -> Tensor:
    """Rewrite a projection (3 C, ...) so that the other convention's attention gives the same result (spec 2.6).

    Official attention neither scales the logits by D ** -0.5 nor leaves the result as it is, but divides it by D.
    """
    query, key, value = packed.chunk(3)
    scale = head_dim**-0.5 if to_official else head_dim**0.5
    return torch.cat((query * scale, key, value / scale**2))
