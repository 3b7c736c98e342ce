"""How hard a worker's device works: arithmetic done against its peak, and the memory that it took."""

from __future__ import annotations

import resource

import torch

from ..accelerator import Precision, compute_dtype
from ..flops import find_accelerator


def bf16_peak(device: torch.device, precision: Precision) -> float | None:
    """FLOP/s that ``device`` could do at most; None for a processor, an unknown GPU, and a run in another precision."""
    if device.type != "cuda" or compute_dtype(device, precision) != torch.bfloat16:
        return None
    found = find_accelerator(torch.cuda.get_device_name(device))
    return found.peak if found else None


def effort(flops_per_second: float, workers: int, peak: float | None) -> dict[str, float]:
    """Figures to log of one worker's ``flops_per_second``: that of all, and the share of the peak where it is known.

    Workers have equal shares of a batch, so one speaks for all.
    """
    total = float(f"{flops_per_second * workers:.5g}")
    return {"flops_per_second": total} | ({"mfu": round(flops_per_second / peak, 4)} if peak else {})


def peak_memory(device: torch.device) -> float:
    """Bytes that this worker held at most so far: of the GPU's memory, or the process's on a processor."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0
