"""What tests that kill things share: a condition awaited, and the processes below this one."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path


def wait_until(condition: Callable[[], bool], seconds: float) -> bool:
    """Whether ``condition`` came true in time."""
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.002)
    return condition()


def descendants(title: bytes, root: int | None = None) -> list[int]:
    """Processes below ``root`` (this one) with ``title`` in their command line: Ray names workers by what they run."""
    parents, found, root = {}, [], root or os.getpid()
    for entry in Path("/proc").iterdir():
        try:
            parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            if title in (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
        except (OSError, ValueError):
            continue

    def below(pid: int) -> bool:
        return pid in parents and (parents[pid] == root or below(parents[pid]))

    return [pid for pid in found if below(pid)]
