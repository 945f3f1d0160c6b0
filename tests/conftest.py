"""What every test shares."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

# Tests run beside each other, a thread each: more would wait for one another.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

from datasets import prepare_shapes

TINY_COCO = Path(__file__).parents[2] / "shared" / "data" / "tiny_coco"


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _ctrl_c_is_heard() -> Iterator[None]:
    """As in a terminal; a shell's background job is started with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


@pytest.fixture(scope="session")
def tiny_coco() -> Path:
    """A hundred real photographs in COCO's layout, where the checkout has them beside it."""
    if not TINY_COCO.exists():
        pytest.skip(f"no real photographs at {TINY_COCO}")
    return TINY_COCO


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache folder with 16 drawn scenes to train on and 6 to evaluate on."""
    folder = tmp_path_factory.mktemp("cache")
    prepare_shapes(folder, num_train=16, num_val=6)
    return folder


@pytest.fixture
def empty_folder(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A new working folder, in which commands find the drawn scenes of `cache`."""
    monkeypatch.setenv("ENACT_CACHE", str(cache))
    monkeypatch.chdir(tmp_path)
