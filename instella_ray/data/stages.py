"""What data jobs are made of: sources of tables, stages that each turn one table into one, pools of actors.

A source gives the tables of one shard, each of consecutive rows. A table stays what it is from its source to its file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
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


def row_table(row: Mapping[str, Any]) -> Iterator[pa.Table]:
    """A :data:`Source` of one row."""
    yield pa.Table.from_pylist([dict(row)])
