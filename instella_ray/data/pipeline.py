"""Execution of the stages of a data job: on Ray Data, or sequentially in this process.

Tables are never split or merged between source and output file, so both write the same files.
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
    """Run every table of ``sources`` through ``stages``, and yield the rows of the resulting tables.

    Rows come in the order of ``sources`` if ``local``, else in any order. Work lost with a Ray process is redone.
    ``cpu_pool`` restricts CPU work to the nodes with that label; ``most_actors`` limits the size of each actor pool.
    Raises UserError if the stages need more GPUs than the cluster has.
    """
    if local:
        return _run_locally(sources, stages)
    from .ray_data import run_on_ray

    return run_on_ray(sources, stages, cpu_pool, most_actors)


def run_rows(
    rows: Sequence[Mapping[str, Any]], stage: Stage, *, local: bool, cpu_pool: str | None = None
) -> Iterator[dict[str, Any]]:
    """Run one stage over ``rows``, each as a table of one row; see :func:`run_stages`."""
    sources = [partial(row_table, row) for row in rows]
    return run_stages(sources, [stage], local=local, cpu_pool=cpu_pool, most_actors=len(rows))


def pool_size(pool: Pool, rows: int, *, local: bool) -> int:
    """Return the number of actors that :func:`run_rows` uses for ``rows`` rows; 1 if ``local``."""
    if local:
        return 1
    from .ray_data import actor_pools, init_ray

    init_ray()
    (actors,) = actor_pools([pool], rows)
    return int(actors["compute"].max_size)


def _run_locally(sources: Sequence[Source], stages: Sequence[Stage]) -> Iterator[dict[str, Any]]:
    torch_was_loaded = "torch" in sys.modules
    with _one_thread():
        works = [stage.open() for stage in stages]
        # If opening a stage was what loaded torch, the outer block had nothing to limit.
        with nullcontext() if torch_was_loaded else _one_thread():
            for source in sources:
                for table in source():
                    for work in works:
                        table = work(table)
                    yield from table.to_pylist()


@contextmanager
def _one_thread() -> Iterator[None]:
    """Limit torch, if loaded, to one thread as in Ray actors: another number of threads rounds differently."""
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
