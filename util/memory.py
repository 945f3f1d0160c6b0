"""The most memory that this process has held."""

from __future__ import annotations

import sys

import torch


def peak_gib(device: torch.device) -> float:
    """Peak of the tensors on a CUDA device; elsewhere of the whole process, or 0 on Windows, which does not tell."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    if sys.platform == "win32":
        return 0.0
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**30 if sys.platform == "darwin" else peak / 2**20  # bytes there, KiB elsewhere
