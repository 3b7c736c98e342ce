"""Stages of data jobs, and the two ways to run them: on Ray Data, or one after another in this process.

A source gives the tables of one shard, each of consecutive rows; every stage turns one table into one. A table stays what
it is from its source to its file, so both ways write the same files.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

import pyarrow as pa
from pydantic import Field

CpuPool = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9./_-]*=[A-Za-z0-9][A-Za-z0-9._-]*$")]
"""A label of nodes, KEY=VALUE."""
Source = Callable[[], Iterator[pa.Table]]
"""Tables of one shard, in order; each call begins anew."""
Work = Callable[[pa.Table], pa.Table]


@dataclass(frozen=True)
class Pool:
    """The actors that hold what a stage needs, a model mostly."""

    actors: int | None = None
    """None means one a GPU, or one for every two CPUs."""
    gpus_per_actor: float = 0.0
    cpus: float | None = None
    """Logical CPUs that each claims; None shares out what the cluster has."""
    calls_at_once: int = 1
    """Tables that each works on at the same time, in threads."""


@dataclass(frozen=True)
class Stage:
    """One step of a data job."""

    work: Callable[..., Any]
    """Turns a table of rows into one; with a ``pool`` makes such a function, once an actor."""
    pool: Pool | None = None
    """None: any process may do it."""

    @property
    def name(self) -> str:
        work = self.work.func if isinstance(self.work, partial) else self.work
        return str(getattr(work, "__name__", type(work).__name__))

    def open(self) -> Work:
        """The function that tables go through."""
        made: Work = self.work() if self.pool else self.work
        return made


def run_stages(
    sources: Sequence[Source],
    stages: Sequence[Stage],
    *,
    local: bool,
    cpu_pool: str | None = None,
    most_actors: int | None = None,
) -> Iterator[dict[str, Any]]:
    """Rows of the last stage's tables, for every table of ``sources``: on Ray in any order, ``local`` in theirs.

    What is lost with a process of Ray is done again. ``cpu_pool`` keeps work on CPUs to the nodes with that label, and no
    pool has more than ``most_actors``. UserError for more GPUs than the cluster has.
    """
    if local:
        return _run_here(sources, stages)
    from .ray_data import run_on_ray

    return run_on_ray(sources, stages, cpu_pool, most_actors)


def run_rows(
    rows: Sequence[Mapping[str, Any]], stage: Stage, *, local: bool, cpu_pool: str | None = None
) -> Iterator[dict[str, Any]]:
    """:func:`run_stages` of one stage that takes a table of one row at a time."""
    sources = [partial(row_table, row) for row in rows]
    return run_stages(sources, [stage], local=local, cpu_pool=cpu_pool, most_actors=len(rows))


def pool_size(pool: Pool, rows: int, *, local: bool) -> int:
    """How many actors :func:`run_rows` of so many rows has; 1 in this process."""
    if local:
        return 1
    from .ray_data import actor_pools, init_ray

    init_ray()
    (actors,) = actor_pools([pool], rows)
    return int(actors["compute"].max_size)


def row_table(row: Mapping[str, Any]) -> Iterator[pa.Table]:
    """A :data:`Source` of one row."""
    yield pa.Table.from_pylist([dict(row)])


def _run_here(sources: Sequence[Source], stages: Sequence[Stage]) -> Iterator[dict[str, Any]]:
    torch_was_there = "torch" in sys.modules
    with _one_thread():
        works = [stage.open() for stage in stages]
        # A stage that has only now loaded torch has asked for no number of threads of its own.
        with nullcontext() if torch_was_there else _one_thread():
            for source in sources:
                for table in source():
                    for work in works:
                        table = work(table)
                    yield from table.to_pylist()


@contextmanager
def _one_thread() -> Iterator[None]:
    """Let torch, where it is loaded, compute with one thread as in Ray's actors: with others it rounds differently."""
    torch = sys.modules.get("torch")
    if torch is None:
        yield
        return
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
