"""How data jobs run on Ray Data: where Ray comes from, a progress bar, and one way to write the output."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import ray
from ray.data import ActorPoolStrategy, Dataset
from tqdm import tqdm

from ..errors import UserError
from .parts import PartWriter


def init_ray(*, log_to_driver: bool = True) -> None:
    """Connect to the cluster a job was submitted to, or start a local one on loopback.

    ``log_to_driver`` shows here what other processes print.
    """
    if ray.is_initialized():
        return
    if os.environ.get("RAY_ADDRESS"):
        ray.init(log_to_driver=log_to_driver)
    else:
        ray.init(include_dashboard=False, logging_level=logging.ERROR, log_to_driver=log_to_driver)


def actor_pool(actors: int | None, gpus_per_actor: float) -> dict[str, Any]:
    """Arguments of ``map_batches`` for so many actors; none means one a GPU, or one for every two CPUs.

    UserError for more GPUs than the cluster has.
    """
    resources = ray.cluster_resources()
    cpus, gpus = int(resources.get("CPU", 1)), int(resources.get("GPU", 0))
    if gpus_per_actor:
        actors = actors or max(1, int(gpus / gpus_per_actor))
        if actors * gpus_per_actor > gpus:
            raise UserError(f"actors {actors} x gpus_per_actor {gpus_per_actor:g}: the cluster has {gpus} GPUs")
        return {"compute": ActorPoolStrategy(size=actors), "num_gpus": gpus_per_actor, "num_cpus": 0}
    actors = actors or max(1, cpus // 2)
    # Actors must leave a CPU to the readers, or the job would wait for ever.
    return {"compute": ActorPoolStrategy(size=actors), "num_cpus": 1 if actors < cpus else 0}


def quiet(dataset: Dataset) -> Dataset:
    """``dataset`` without Ray Data's own bars, a line for every operator and second: a job shows one of its own."""
    dataset.context.enable_progress_bars = False
    dataset.context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)
    return dataset


def on_actors(
    work: type, arguments: tuple[Any, ...], rows: Sequence[Any], *, actors: int | None, gpus_per_actor: float
) -> Iterator[dict[str, Any]]:
    """Rows that actors made by ``work(*arguments)`` give for ``rows``, of which they take one after another, in any order.

    An actor that is lost is replaced, and its row done again.
    """
    given = ray.data.from_items(list(rows), override_num_blocks=len(rows))
    pool = actor_pool(actors and min(actors, len(rows)), gpus_per_actor)
    made = given.map_batches(work, fn_constructor_args=arguments, batch_format="pyarrow", batch_size=1, **pool)
    yield from quiet(made).iter_rows()


def write_parts(
    dataset: Dataset,
    folder: str,
    suffix: str,
    rows_per_file: int,
    write_file: Callable[[str, list[dict[str, Any]]], int],
    *,
    shards: Collection[str],
    done: Collection[str],
    title: str,
) -> None:
    """Run ``dataset`` to its end and write its rows with :class:`.parts.PartWriter`.

    A file holds up to ``rows_per_file`` consecutive rows of one shard.
    """
    writer = PartWriter(folder, suffix, rows_per_file, write_file)
    reports = quiet(dataset.map_batches(writer, batch_format="pyarrow", batch_size=None))
    rows, began = 0, time.perf_counter()
    with tqdm(total=len(shards), initial=len(done), desc=title, unit="shard") as bar:
        for report in reports.iter_rows():
            rows += report["rows"]
            bar.set_postfix_str(f"{rows} rows, {rows / (time.perf_counter() - began):.0f}/s", refresh=False)
            bar.update(int(report["last"]))
