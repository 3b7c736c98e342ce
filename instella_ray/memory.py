"""Memory allocation of processes that compute."""

from __future__ import annotations

import ctypes
import os

MMAP, TRIM = -3, -1
"""Parameters ``M_MMAP_THRESHOLD`` and ``M_TRIM_THRESHOLD`` of glibc's ``mallopt``."""
MMAP_BYTES = 32 << 20
"""Size from which an allocation has pages of its own, returned when it is freed: glibc's maximum."""
TRIM_BYTES = 512 << 20
"""Free memory at the end of the heap that is not returned."""
TUNABLES = "GLIBC_TUNABLES"


def keep_freed_memory() -> None:
    """Let this process reuse freed memory up to 32 MiB an allocation, rather than return it and have it zeroed again.

    By default glibc returns what was freed at the end of the heap, and the activations of each pass cause page faults.
    Settings of the environment (``MALLOC_MMAP_THRESHOLD_``, ``MALLOC_TRIM_THRESHOLD_``, ``GLIBC_TUNABLES``) are kept.
    Without glibc nothing happens.
    """
    libc = ctypes.CDLL(None) if os.name == "posix" else None
    if libc is None or not hasattr(libc, "gnu_get_libc_version"):
        return
    for name, parameter, value in (("mmap_threshold", MMAP, MMAP_BYTES), ("trim_threshold", TRIM, TRIM_BYTES)):
        given = f"MALLOC_{name.upper()}_" in os.environ or f"glibc.malloc.{name}=" in os.environ.get(TUNABLES, "")
        if not given:
            libc.mallopt(parameter, value)
