"""CPU time and memory of jobs over all their processes."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def peak_memory(*, with_ray: bool = True) -> Iterator[list[float]]:
    """Measure the peak private memory (MB) of this process and its descendants, the only entry of the yielded list.

    ``with_ray=False`` excludes Ray's processes and workers, for contestants that do not use them. Shared pages
    (libraries, object store) are not counted.
    """
    peak, over = [0.0], threading.Event()

    def watch() -> None:
        ended = False
        while not ended:  # also measure at the end: a short job could finish before the first sample
            ended = over.wait(0.2)
            peak[0] = max(peak[0], sum(map(private_mb, processes(with_ray))))

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        over.set()
        thread.join()


def processes(with_ray: bool) -> list[int]:
    """Return the pids of this process and its descendants, this one first, with or without those of Ray."""
    return with_descendants(os.getpid(), with_ray=with_ray)


def with_descendants(pid: int, *, with_ray: bool = True) -> list[int]:
    """Return ``pid`` and the pids of its descendants, with or without those of Ray."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            name, _, rest = entry.read_text().rpartition(")")
            if with_ray or not name.endswith(("(raylet", "(gcs_server")):
                parents[int(entry.parent.name)] = int(rest.split()[1])
        except (OSError, IndexError):
            continue  # the process has exited
    found = [pid]
    for each in found:  # the list grows during iteration
        found += [child for child, parent in parents.items() if parent == each]
    return found


def cpu_seconds(pids: Iterable[int]) -> dict[int, float]:
    """Return the CPU seconds that each of the processes has used; those that have ended are left out."""
    tick, used = os.sysconf("SC_CLK_TCK"), {}
    for pid in pids:
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        used[pid] = (int(fields[11]) + int(fields[12])) / tick
    return used


def command_of(pid: int) -> str:
    """Return the command line of a process, or its title if it has set one; empty if it has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
    except OSError:
        return ""


def private_mb(pid: int) -> float:
    """Return the private memory (MB) of a process, 0 if it has ended."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0.0
    # Proportional sizes: pages shared between forks count once in total.
    return sum(int(line.split()[1]) for line in lines if line.startswith("Pss_Anon:")) / 1e3
