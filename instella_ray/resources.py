"""Resource needs of jobs: totals, formatting, and comparison with a cluster's nodes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple


class Group(NamedTuple):
    """Concurrent processes with the same resources each."""

    processes: int
    cpus: float
    gpus: float


Needs = tuple[Group, ...]
"""Groups of processes that run concurrently."""


def totals(needs: Needs) -> dict[str, float]:
    """Sum the needs by Ray's resource names."""
    return {
        "GPU": sum(group.processes * group.gpus for group in needs),
        "CPU": sum(group.processes * group.cpus for group in needs),
    }


def lacking(needs: Needs, nodes: Sequence[Mapping[str, float]]) -> str | None:
    """Describe the resources that ``nodes`` lack for ``needs``; None if none.

    They are compared in total, for shares that do not fit on one GPU together, and for one process on one node.
    """
    wanted = totals(needs)
    have = {name: sum(node.get(name, 0.0) for node in nodes) for name in wanted}
    short = [name for name, amount in wanted.items() if amount > have[name]]
    if short:
        return f"needs {amounts(wanted, short)}, the cluster has {amounts(have, short)}"
    if (least := _least_gpus(needs)) > have["GPU"]:
        shares = ", ".join(f"{group.processes} x {group.gpus:g}" for group in needs if group.gpus)
        return (
            f"needs at least {amounts({'GPU': least}, ['GPU'])} for {shares}, the cluster has {amounts(have, ['GPU'])}"
        )
    for group in needs:
        claim = {"GPU": group.gpus, "CPU": group.cpus}
        if not any(all(node.get(name, 0.0) >= amount for name, amount in claim.items()) for node in nodes):
            names = [name for name, amount in claim.items() if amount]
            most = " or ".join(sorted({amounts(node, names) for node in nodes}))
            return f"needs {amounts(claim, names)} on one node, nodes of the cluster have {most}"
    return None


def _least_gpus(needs: Needs) -> int:
    """Return a lower bound of the GPUs for shares of them: at most n shares above 1 / (n + 1) fit on one."""
    shares = [group for group in needs if 0 < group.gpus <= 1]
    most = max((int(1 / group.gpus) for group in shares), default=0)
    above = (sum(group.processes for group in shares if group.gpus > 1 / (n + 1)) for n in range(1, most + 1))
    return max((math.ceil(count / n) for n, count in enumerate(above, 1)), default=0)


def amounts(resources: Mapping[str, float], names: Iterable[str]) -> str:
    """Format resources, such as ``16 GPUs and 128 CPUs``."""
    found = {name: resources.get(name, 0.0) for name in names}
    return " and ".join(f"{amount:g} {name}{'' if amount == 1 else 's'}" for name, amount in found.items())
