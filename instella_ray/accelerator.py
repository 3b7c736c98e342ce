"""Device and precision selection: CUDA, ROCm (also called cuda by PyTorch) or CPU."""

from __future__ import annotations

import os
import platform
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor

from .errors import UserError

Precision = Literal["auto", "fp32", "bf16"]

REDUCED_SUMS = ("allow_bf16_reduced_precision_reduction", "allow_fp16_reduced_precision_reduction")
"""PyTorch's settings of sums in the precision of the inputs, and of splitting them."""


def pick_device(name: str = "auto") -> torch.device:
    """Return the named device; ``auto`` is the GPU if available, else the CPU. UserError for an unavailable device."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise UserError(f"device '{name}': expected auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"device '{name}': PyTorch sees no GPU on this machine")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(
            f"device '{name}': PyTorch sees {torch.cuda.device_count()} GPU(s) on this machine, numbered from 0"
        )
    return device


def device_label(device: torch.device) -> str:
    """Return the name of the GPU or CPU for reports."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)} ({'ROCm' if torch.version.hip else 'CUDA'})"
    return _processor()


def compute_dtype(device: torch.device, precision: Precision = "auto") -> torch.dtype:
    """Return the compute dtype: ``auto`` is bfloat16 on GPUs and CPUs that multiply it fast, else float32.

    UserError for an unknown precision.
    """
    if precision == "auto":
        precision = "bf16" if device.type == "cuda" or fast_bf16(_cpu_flags(), _cpu_info("vendor_id")) else "fp32"
    try:
        return {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    except KeyError:
        raise UserError(f"precision '{precision}': expected auto, fp32 or bf16") from None


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """Return ``tensor`` on ``device``; from a CPU it is copied without waiting for the device's work."""
    if tensor.device.type == device.type:
        return tensor
    # From memory that the device can read by itself: a copy from pageable memory may wait for the work queued before it.
    return tensor.pin_memory().to(device, non_blocking=True)


@contextmanager
def sampling_on(device: torch.device) -> Iterator[None]:
    """Make a GPU the current device, and let PyTorch choose its kernels by the number of rows as little as it can.

    A row's bits then depend less on the size of its batch: matrix products without sums in bfloat16 or half precision and
    without splits of the summed dimension, and the memory-efficient attention, the only fused one that takes a mask on both
    CUDA and ROCm. Settings of the process, so they are restored for what else computes in it. Nothing on CPUs.
    """
    if device.type != "cuda" or not torch.cuda.is_initialized():
        yield
        return
    cuda = torch.backends.cuda
    attention = {
        cuda.enable_flash_sdp: cuda.flash_sdp_enabled(),
        cuda.enable_cudnn_sdp: cuda.cudnn_sdp_enabled(),
    }
    sums = {name: getattr(cuda.matmul, name) for name in REDUCED_SUMS}
    library = cuda.preferred_blas_library()
    try:
        for enable in attention:
            enable(False)
        if torch.version.hip is None:
            cuda.preferred_blas_library("cublaslt")  # the only one that can be kept from splitting
            for name in REDUCED_SUMS:
                setattr(cuda.matmul, name, (False, False))
        with torch.cuda.device(device):
            yield
    finally:
        for enable, before in attention.items():
            enable(before)
        if torch.version.hip is None:
            cuda.preferred_blas_library(library)
            for name, allowed in sums.items():
                setattr(cuda.matmul, name, allowed)


def precision_of_actors(precision: Precision, gpus_per_actor: float) -> Precision:
    """Return the ``precision`` of a job's actors, with ``auto`` resolved by the driver so that it can be recorded."""
    return precision if precision != "auto" else "bf16" if gpus_per_actor else "fp32"


def fast_bf16(flags: Collection[str], vendor: str) -> bool:
    """Return whether a CPU with these /proc/cpuinfo flags multiplies bfloat16 matrices faster than float32 ones.

    AMX does. AVX512-BF16 does on AMD's CPUs (Zen 4: twice as fast), but on Intel's without AMX it is slower than float32.
    """
    return "amx_bf16" in flags or ("avx512_bf16" in flags and vendor == "AuthenticAMD")


def hardware_summary() -> dict[str, Any]:
    """Return CPU, cores, memory (GiB), GPUs and versions for reports."""
    pages = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(pages / 2**30, 1),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _cpu_info(key: str) -> str:
    try:
        with open("/proc/cpuinfo") as stream:
            return next((line.partition(":")[2].strip() for line in stream if line.startswith(key)), "")
    except OSError:
        return ""


def _cpu_flags() -> list[str]:
    return _cpu_info("flags").split()


def _processor() -> str:
    return _cpu_info("model name") or platform.processor() or platform.machine()
