"""What every test shares."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

TINY_COCO = Path(__file__).parents[2] / "shared" / "data" / "tiny_coco"


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def _few_threads() -> None:
    torch.set_num_threads(2)


@pytest.fixture(scope="session")
def tiny_coco() -> Path:
    """A hundred real photographs in COCO's layout, where the checkout has them beside it."""
    if not TINY_COCO.exists():
        pytest.skip(f"no real photographs at {TINY_COCO}")
    return TINY_COCO
