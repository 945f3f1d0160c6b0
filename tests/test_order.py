"""Token orders, by the properties that their names promise."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from enact.order import token_order

CPU = torch.device("cpu")
NAMES = ("serpentine", "windows", "hilbert")


def path(name: str, height: int, width: int) -> list[tuple[int, int]]:
    """The cells (y, x) in their order."""
    order = token_order(name)  # type: ignore[arg-type]
    assert order is not None
    return [divmod(cell, width) for cell in order(height, width, CPU).argsort().tolist()]


def test_raster_is_no_order_at_all() -> None:
    assert token_order("raster") is None


@pytest.mark.parametrize("name", NAMES)
def test_every_cell_has_a_place_of_its_own(name: str) -> None:
    assert sorted(path(name, 13, 21)) == [(y, x) for y in range(13) for x in range(21)]


@pytest.mark.parametrize(("name", "height", "width"), [("serpentine", 7, 12), ("hilbert", 16, 16), ("windows", 4, 4)])
def test_consecutive_cells_are_neighbours(name: str, height: int, width: int) -> None:
    cells = torch.tensor(path(name, height, width))
    assert_close(cells.diff(dim=0).abs().sum(1), torch.ones(len(cells) - 1, dtype=torch.long))


def test_a_window_is_finished_before_the_next_begins() -> None:
    cells = torch.tensor(path("windows", 12, 20)) // 4
    assert (cells.diff(dim=0) != 0).any(1).sum() == 3 * 5 - 1


@pytest.mark.parametrize("name", NAMES)
def test_padding_does_not_change_the_order_of_real_cells(name: str) -> None:
    alone = path(name, 9, 14)
    assert [cell for cell in path(name, 30, 17) if cell[0] < 9 and cell[1] < 14] == alone


def test_an_unknown_order_is_named() -> None:
    with pytest.raises(ValueError, match=r"token_order must be one of raster, .*, got 'spiral'"):
        token_order("spiral")  # type: ignore[arg-type]
