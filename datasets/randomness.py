"""Random numbers that depend on named numbers only, never on who draws them or when."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator

import torch


def mixed_seed(*parts: int | str) -> int:
    """A 64-bit seed from `parts`; the same everywhere, and unrelated for neighbouring parts."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


@contextlib.contextmanager
def cpu_seed(seed: int) -> Iterator[None]:
    """Seed torch's default CPU generator inside the block and restore its state afterwards.

    Generators of other devices are left alone, which `torch.manual_seed` would not do.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield
