"""The two ways to run the stages of a data job: on Ray Data, or one after another in this process.

A table stays what it is from its source to its file, so both ways write the same files.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

from .stages import Pool, Source, Stage, row_table


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
