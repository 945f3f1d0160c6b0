"""The real tokens of a batch, one image behind the other, so that padding costs nothing in an encoder.

Shapes: B images, h x w cells of the feature map, N = h * w, S real tokens of all images, C channels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

# (height, width, device) -> (height * width,) int64, the place of each cell in the order in which tokens are to stand.
TokenOrder = Callable[[int, int, torch.device], Tensor]


class Packing:
    """Where the real cells of a batch are, and where they stand once they are packed.

    Args:
        pad_mask: (B, h, w) bool, True where padded, in host memory.
        device: of the tokens.
        token_order: in which the cells of an image stand; None: row by row.

    Attributes:
        lengths: real tokens of each image.
        cells: (S,) int64, the cell of each token among the B * N.
        slots: (S,) int64, the place of each token in the batch padded behind each image's last token to the longest.
    """

    def __init__(self, pad_mask: Tensor, device: torch.device, token_order: TokenOrder | None = None) -> None:
        batch, height, width = pad_mask.shape
        real = ~pad_mask.flatten(1)
        order = torch.arange(height * width)
        if token_order is not None:
            order = token_order(height, width, pad_mask.device).argsort()
        kept = [order[image[order]] for image in real]
        self.lengths = tuple(len(cells) for cells in kept)
        self.longest = max(self.lengths)
        first_cell, first_slot = (torch.arange(batch) * size for size in (height * width, self.longest))
        cells = torch.cat([cells + first for cells, first in zip(kept, first_cell, strict=True)])
        slots = torch.cat([torch.arange(n) + first for n, first in zip(self.lengths, first_slot, strict=True)])
        self._pad_mask = torch.arange(self.longest) >= torch.tensor(self.lengths).unsqueeze(1)
        self.cells, self.slots = (index.to(device, non_blocking=True) for index in (cells, slots))

    def pack(self, tokens: Tensor) -> Tensor:
        """(B, N, C) -> (S, C)."""
        return tokens.flatten(0, 1).index_select(0, self.cells)

    def unpack(self, tokens: Tensor) -> Tensor:
        """(S, C) -> (B, longest, C), zero where padded."""
        return self._spread(tokens, self.slots, self.longest)

    def to_map(self, tokens: Tensor, cells: int) -> Tensor:
        """(S, C) -> (B, N, C) with N = `cells`, zero where padded."""
        return self._spread(tokens, self.cells, cells)

    def pad_mask(self) -> Tensor:
        """(B, longest) bool, True where `unpack` pads, on the device of the tokens."""
        return self._pad_mask.to(self.slots.device, non_blocking=True)

    def _spread(self, tokens: Tensor, places: Tensor, size: int) -> Tensor:
        batch = len(self.lengths)
        padded = tokens.new_zeros(batch * size, tokens.shape[1]).index_copy(0, places, tokens)
        return padded.view(batch, size, -1)


# How a batch is padded: not at all; as a mask (B, N) says, bool, True where padded; or packed, so that it is not.
Padding = Tensor | Packing | None


def padding_of(
    pad_mask: Tensor, device: torch.device, token_order: TokenOrder | None = None, *, skip: bool = True
) -> Padding:
    """What an encoder is to do about padding.

    The result of a detector does not depend on it, its cost does: give the detector a mask in host memory. A mask on a
    GPU is not read, since that would wait for the GPU, and a graph that is compiled or exported is to serve any mask.

    Args:
        pad_mask: (B, h, w) bool, True where padded.
        device: of the tokens.
        token_order: as in `Packing`; the mask of a batch that is not packed stands row by row.
        skip: pack the real tokens of a batch that pads.
    """
    if pad_mask.device.type == "cpu" and not torch.compiler.is_compiling():
        if not pad_mask.any():
            return None
        if skip:
            return Packing(pad_mask, device, token_order)
    return pad_mask.flatten(1).to(device, non_blocking=True)


@torch.compiler.disable  # type: ignore[untyped-decorator]  # of images of other lengths it would be another graph
def attend_packed(
    attention: nn.Module, *tokens: Tensor, packing: Packing, position: Tensor | None = None
) -> Tensor:
    """Call a self-attention on packed tokens.

    Args:
        attention: with a method `attend_packed`, as those of `enact`; or else called as `nn.MultiheadAttention` is, on
            padded tokens.
        tokens: query, key, value, or what the attention takes in their place, each (S, C).
        position: (S, C), to be added to query and key; None: nothing.

    Returns:
        (S, C).
    """
    own: Any = getattr(attention, "attend_packed", None)
    if own is not None:
        added = {} if position is None else {"position": position}
        result: Tensor = own(*tokens, lengths=packing.lengths, slots=packing.slots, **added)
        return result
    query, key, value = (packing.unpack(x) for x in tokens)
    if position is not None:
        query, key = (x + packing.unpack(position) for x in (query, key))
    padded: Tensor = attention(query, key, value, key_padding_mask=packing.pad_mask(), need_weights=False)[0]
    return padded.flatten(0, 1).index_select(0, packing.slots)
