"""Where work of a dataset is done: the pool of nodes for work on CPUs, and how many actors have room, with what claims."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, NamedTuple

import ray
from pydantic import Field
from ray.data import ActorPoolStrategy, DataContext

from ..errors import UserError

logger = logging.getLogger(__name__)

CpuPool = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9./_-]*=[A-Za-z0-9][A-Za-z0-9._-]*$")]
"""A label of nodes, KEY=VALUE."""


def keep_to(cpu_pool: str | None) -> None:
    """Keep work on CPUs of datasets that this process makes from now on to nodes with that label; None: to any.

    Actors with GPUs (:func:`actor_pools`) are on all others.
    """
    key, _, value = (cpu_pool or "").partition("=")
    selector = {key: value} if key else None
    DataContext.get_current().execution_options.label_selector = selector
    if selector and not any(node["Alive"] and _has(node, selector) for node in ray.nodes()):
        logger.warning("cpu_pool %s: no node has this label yet, the work waits for one", cpu_pool)


def _has(node: Mapping[str, Any], selector: Mapping[str, str]) -> bool:
    return all(node["Labels"].get(key) == value for key, value in selector.items())


def actor_pool(actors: int | None, gpus_per_actor: float) -> dict[str, Any]:
    """Arguments of ``map_batches`` for so many actors; none means one a GPU, or one for every two CPUs.

    UserError for more GPUs than the cluster has.
    """
    return actor_pools([(actors, gpus_per_actor)])[0]


def actor_pools(wanted: Sequence[tuple[int | None, float]]) -> list[dict[str, Any]]:
    """:func:`actor_pool` for each of several pools that one dataset runs at the same time."""
    selector = DataContext.get_current().execution_options.label_selector or {}
    nodes = [node for node in ray.nodes() if node["Alive"]]
    cpus = sum(node["Resources"].get("CPU", 0) for node in nodes if _has(node, selector))
    gpus = sum(node["Resources"].get("GPU", 0) for node in nodes)
    elsewhere = {"label_selector": {key: f"!{value}" for key, value in selector.items()}} if selector else {}
    return [
        {"compute": ActorPoolStrategy(size=claim.actors), "num_cpus": claim.cpus}
        | ({"num_gpus": claim.gpus, **elsewhere} if claim.gpus else {})
        for claim in share(wanted, int(cpus) or 1, int(gpus))
    ]


class Claim(NamedTuple):
    """A pool's size, and what each of its actors claims of the cluster."""

    actors: int
    cpus: float
    gpus: float


def share(wanted: Sequence[tuple[int | None, float]], cpus: int, gpus: int) -> list[Claim]:
    """Claims of pools, each of (actors, GPUs an actor), that all run at the same time and leave a CPU to the readers.

    Ray starts no actor that its claim has no room for, and a pool without actors would make the job wait for ever. So
    pools that are given no number share the GPUs that are left; and where actors on CPUs are as many as the CPUs or
    more, they claim half of these together. They are no fewer for that: mostly one pool has nearly all the work, and
    the others' actors only wait. UserError for more GPUs than there are.
    """
    gpu_of = [gpu for _, gpu in wanted]
    sizes = [actors or (1 if gpu else max(1, cpus // 2)) for actors, gpu in wanted]
    free = gpus - sum(size * gpu for size, gpu in zip(sizes, gpu_of, strict=True)) + 1e-9
    if free < 0:
        pools = [f"actors {size} x gpus_per_actor {gpu:g}" for size, gpu in zip(sizes, gpu_of, strict=True) if gpu]
        raise UserError(f"{' + '.join(pools)}: the cluster has {gpus} GPUs")
    unset = [index for index, (actors, gpu) in enumerate(wanted) if gpu and not actors]
    while room := [index for index in unset if gpu_of[index] <= free]:
        least = min(room, key=lambda index: sizes[index] * gpu_of[index])
        sizes[least] += 1
        free -= gpu_of[least]
    on_cpu = sum(size for size, gpu in zip(sizes, gpu_of, strict=True) if not gpu)
    half = int(1e4 * cpus / 2 / on_cpu) / 1e4 if on_cpu and cpus > 1 else 0.0  # Ray counts in ten-thousandths
    claim = 1.0 if on_cpu < cpus else half
    return [Claim(size, 0.0 if gpu else claim, gpu) for size, gpu in zip(sizes, gpu_of, strict=True)]
