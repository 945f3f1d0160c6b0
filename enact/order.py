"""Orders in which the cells of a map become a sequence that ENACT cuts into clusters.

An order gives each cell (y, x) of an H x W map its place: (height, width, device) -> (H * W,) int64, row by row. Places
may have gaps. Of two cells the same one comes first in every map that holds both, so that padding changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor

TokenOrder = Callable[[int, int, torch.device], Tensor]
OrderName = Literal["raster", "serpentine", "windows", "hilbert"]

_SIDE_BITS = 10  # maps of up to 1024 cells a side
_WINDOW_BITS = 2  # windows of 4 x 4 cells


def token_order(name: OrderName) -> TokenOrder | None:
    """The order of a name; None for "raster", the order in which cells stand anyway.

    "raster": row by row, each from the left, as in the released code; a cluster may hold the end of one row and the
        start of the next.
    "serpentine": row by row, from the left and from the right in turn, so that consecutive cells are neighbours.
    "windows": windows of 4 x 4 cells, each a serpentine, so that a cluster is about as high as wide.
    "hilbert": along a Hilbert curve: consecutive cells are neighbours, and stretches of any length are compact.

    Raises:
        ValueError: there is no such order.
    """
    if name not in get_args(OrderName):
        raise ValueError(f"token_order must be one of {', '.join(get_args(OrderName))}, got {name!r}")
    return {"raster": None, "serpentine": serpentine, "windows": windows, "hilbert": hilbert}[name]


def serpentine(height: int, width: int, device: torch.device) -> Tensor:
    """Every second row from the right; see `token_order`."""
    y, x = _cells(height, width, device)
    return _boustrophedon(y, x, _SIDE_BITS).flatten()


def windows(height: int, width: int, device: torch.device) -> Tensor:
    """4 x 4 windows in a serpentine of serpentines; see `token_order`."""
    y, x = _cells(height, width, device)
    side = 1 << _WINDOW_BITS
    window = _boustrophedon(y // side, x // side, _SIDE_BITS - _WINDOW_BITS)
    return (window * side * side + _boustrophedon(y % side, x % side, _WINDOW_BITS)).flatten()


def hilbert(height: int, width: int, device: torch.device) -> Tensor:
    """Along the Hilbert curve of a square of 1024 cells a side; see `token_order`."""
    y, x = _cells(height, width, device)
    place = torch.zeros_like(y + x)
    for bit in reversed(range(_SIDE_BITS)):
        right, low = x >> bit & 1, y >> bit & 1
        place = place * 4 + (3 * right ^ low)
        # Enter the quadrant: the two upper ones are mirrored in a diagonal, as the curve runs through them.
        mirror = (low == 0) & (right == 1)
        x, y = torch.where(mirror, ~x, x), torch.where(mirror, ~y, y)
        x, y = torch.where(low == 0, y, x), torch.where(low == 0, x, y)
    return place.flatten()


def _cells(height: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Coordinates (H, 1) and (1, W), which broadcast to the map."""
    return torch.arange(height, device=device)[:, None], torch.arange(width, device=device)[None]


def _boustrophedon(y: Tensor, x: Tensor, bits: int) -> Tensor:
    """Row by row in rows of 2 ** bits cells, every second one from the right."""
    return (y << bits) + torch.where(y % 2 == 1, (1 << bits) - 1 - x, x)
