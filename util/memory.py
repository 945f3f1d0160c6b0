"""The memory of the machine, and the most that this process has held of it or of the GPU's."""

from __future__ import annotations

import os
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


def machine_bytes() -> int:
    """The machine's memory; where the system does not tell, 8 GiB."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 8 * 2**30
