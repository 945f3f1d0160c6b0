"""Published state-dict layouts <-> ours.

Ours is the modules' own. The published layouts (spec 4) differ in prefixes and, with ENACT, in how the encoder's
attention is stored.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn

StateDict = Mapping[str, Tensor]

# How a published key starts -> how ours does. The first that matches counts.
PUBLISHED_PREFIXES = (
    (re.compile(r"^backbone\.0\.body\."), "backbone.body."),
    (re.compile(r"^backbone\.1\."), "position_embedding."),
    (re.compile(r"^transformer\."), ""),
)
# ENACT's separate projections, in the order in which nn.MultiheadAttention packs them.
SEPARATE_PROJECTIONS = ("W_q", "W_k", "W_v")
RENAMED_IN_ATTENTION = {"W_o": "out_proj", "W_prob": "information.probability"}
# A checkpoint of a torchvision ResNet with ordinary batch norm has this counter; frozen batch norm does not.
IGNORED_SUFFIX = "num_batches_tracked"


def load_weights(model: nn.Module, state_dict: StateDict) -> None:
    """Load our layout or a published one, recognised by its keys.

    Args:
        model: from `build_model`.
        state_dict: its own `state_dict()`, or the "model" entry of a published checkpoint of DETR or DETR + ENACT.

    Raises:
        ValueError: names what is missing, unexpected, or of another shape. The model is unchanged then.
    """
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


def from_published(state_dict: StateDict) -> dict[str, Tensor]:
    """Any known layout -> ours; a state dict in our layout comes back as it is."""
    state = {_rename(key): value for key, value in state_dict.items() if not key.endswith(IGNORED_SUFFIX)}
    return _pack_projections(state)


def _rename(key: str) -> str:
    for prefix, ours in PUBLISHED_PREFIXES:
        if prefix.match(key):
            key = prefix.sub(ours, key)
            break
    return ".".join(RENAMED_IN_ATTENTION.get(part, part) for part in key.split("."))


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
