"""How much memory a job takes, over all processes that it has."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def peak_memory(*, with_ray: bool = True) -> Iterator[list[float]]:
    """Private MB of this process and all below it; the largest sum is the list's only entry.

    ``with_ray=False`` leaves out Ray's own processes and workers, for those who do not use them. Pages that processes
    share, libraries and the object store, do not count.
    """
    peak, over = [0.0], threading.Event()

    def watch() -> None:
        ended = False
        while not ended:  # a last look at the end: a short job would be over before the first one
            ended = over.wait(0.2)
            peak[0] = max(peak[0], sum(map(_private_mb, processes(with_ray))))

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        over.set()
        thread.join()


def processes(with_ray: bool) -> list[int]:
    """This process and all below it, those of Ray among them or not."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            name, _, rest = entry.read_text().rpartition(")")
            if with_ray or not name.endswith(("(raylet", "(gcs_server")):
                parents[int(entry.parent.name)] = int(rest.split()[1])
        except (OSError, IndexError):
            continue  # it ended while we looked
    found = [os.getpid()]
    for pid in found:  # grows while it is walked
        found += [child for child, parent in parents.items() if parent == pid]
    return found


def _private_mb(pid: int) -> float:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0.0
    # Pages that a fork has not changed count once, in parts.
    return sum(int(line.split()[1]) for line in lines if line.startswith("Pss_Anon:")) / 1e3
