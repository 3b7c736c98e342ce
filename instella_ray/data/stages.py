"""Building blocks of data jobs: sources of tables, stages that map a table to a table, and pools of actors.

A source yields the tables of one shard, each of consecutive rows. Tables are never split or merged between source and
output file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

import pyarrow as pa
from pydantic import Field

CpuPool = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9./_-]*=[A-Za-z0-9][A-Za-z0-9._-]*$")]
"""Node label, KEY=VALUE."""
Source = Callable[[], Iterator[pa.Table]]
"""Yields the tables of one shard, in order; each call starts from the beginning."""
Work = Callable[[pa.Table], pa.Table]


@dataclass(frozen=True)
class Pool:
    """Pool of actors for a stage with state, usually a model."""

    actors: int | None = None
    """Number of actors; None: one per GPU, or one per two CPUs."""
    gpus_per_actor: float = 0.0
    cpus: float | None = None
    """Logical CPUs that each actor reserves; None: a share of the CPUs of the cluster."""
    calls_at_once: int = 1
    """Tables that each actor processes concurrently, in threads."""


@dataclass(frozen=True)
class Stage:
    """One step of a data job."""

    work: Callable[..., Any]
    """Function from table to table; with a ``pool``, a factory of such a function, called once per actor."""
    pool: Pool | None = None
    """Actors that run the stage; None: stateless tasks."""

    @property
    def name(self) -> str:
        work = self.work.func if isinstance(self.work, partial) else self.work
        return str(getattr(work, "__name__", type(work).__name__))

    def open(self) -> Work:
        """Return the function from table to table."""
        made: Work = self.work() if self.pool else self.work
        return made


def row_table(row: Mapping[str, Any]) -> Iterator[pa.Table]:
    """Yield one table of one row, as a :data:`Source`."""
    yield pa.Table.from_pylist([dict(row)])
