"""Stages of data jobs on Ray Data: where Ray comes from, the nodes and actors that do the work, and the datasets."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import pyarrow as pa
import ray
from ray.data import ActorPoolStrategy, DataContext, Dataset, read_datasource
from ray.data.block import BlockMetadata
from ray.data.datasource import Datasource, ReadTask

from .. import logs
from ..errors import UserError
from .stages import Pool, Source, Stage, Work

TABLE = "table"
"""Column whose rows are whole tables."""
logger = logging.getLogger(__name__)


def init_ray(*, cpu_pool: str | None = None, log_to_driver: bool = True) -> None:
    """Connect to the cluster a job was submitted to, or start a local one on loopback.

    Datasets made from now on keep their work on CPUs to the nodes with the label ``cpu_pool``. ``log_to_driver`` shows
    here what other processes print.
    """
    if not ray.is_initialized():
        _connect(log_to_driver)
    keep_to(cpu_pool)


def _connect(log_to_driver: bool) -> None:
    here: dict[str, Any] = {"log_to_driver": log_to_driver}
    if logs.for_machines():
        here["logging_config"] = WorkerLogging("JSON", fields=logs.context())
    if os.environ.get("RAY_ADDRESS"):
        ray.init(**here)
    else:
        ray.init(include_dashboard=False, logging_level=logging.ERROR, **here)


@dataclass
class WorkerLogging(ray.LoggingConfig):
    """Ray's setting of the logs of every process of a job, with this package's own records beside those of others."""

    fields: dict[str, Any] = field(default_factory=dict)
    """What each of the package's records carries, and where they go."""

    def _apply(self) -> None:
        super()._apply()
        logs.set_up(self.fields)
        # Ray has given a handler to the root of all loggers, which would write them once more.
        logging.getLogger(logs.PACKAGE).propagate = False


def keep_to(cpu_pool: str | None) -> None:
    """Keep work on CPUs of datasets that this process makes from now on to nodes with that label; None: to any.

    Actors with GPUs are on all others.
    """
    key, _, value = (cpu_pool or "").partition("=")
    selector = {key: value} if key else None
    DataContext.get_current().execution_options.label_selector = selector
    if selector and not any(node["Alive"] and _has(node, selector) for node in ray.nodes()):
        logger.warning("cpu_pool %s: no node has this label yet, the work waits for one", cpu_pool)


def _has(node: Mapping[str, Any], selector: Mapping[str, str]) -> bool:
    return all(node["Labels"].get(key) == value for key, value in selector.items())


def actor_pools(pools: Sequence[Pool], most_actors: int | None = None) -> list[dict[str, Any]]:
    """Arguments of ``map_batches`` for pools that one dataset runs at the same time, none with more actors than that.

    UserError for more GPUs than the cluster has.
    """
    selector = DataContext.get_current().execution_options.label_selector or {}
    nodes = [node for node in ray.nodes() if node["Alive"]]
    cpus = sum(node["Resources"].get("CPU", 0) for node in nodes if _has(node, selector))
    gpus = sum(node["Resources"].get("GPU", 0) for node in nodes)
    elsewhere = {"label_selector": {key: f"!{value}" for key, value in selector.items()}} if selector else {}
    shared = [(pool.actors, pool.gpus_per_actor) for pool in pools if pool.cpus is None]
    claims = iter(share(shared, int(cpus) or 1, int(gpus), most_actors))
    return [
        {"compute": _strategy(pool, claim.actors), "num_cpus": claim.cpus}
        | ({"num_gpus": claim.gpus, **elsewhere} if claim.gpus else {})
        for pool in pools
        for claim in [next(claims) if pool.cpus is None else Claim(pool.actors or 1, pool.cpus, pool.gpus_per_actor)]
    ]


def _strategy(pool: Pool, actors: int) -> ActorPoolStrategy:
    if pool.calls_at_once == 1:
        return ActorPoolStrategy(size=actors)
    return ActorPoolStrategy(
        size=actors, max_concurrent_calls_per_actor=pool.calls_at_once, enable_true_multi_threading=True
    )


class Claim(NamedTuple):
    """A pool's size, and what each of its actors claims of the cluster."""

    actors: int
    cpus: float
    gpus: float


def share(
    wanted: Sequence[tuple[int | None, float]], cpus: int, gpus: int, most_actors: int | None = None
) -> list[Claim]:
    """Claims of pools, each of (actors, GPUs an actor), that all run at the same time and leave a CPU to the readers.

    Ray starts no actor that its claim has no room for, and a pool without actors would make the job wait for ever. So
    pools that are given no number share the GPUs that are left; and where actors on CPUs are as many as the CPUs or
    more, they claim half of these together. They are no fewer for that: mostly one pool has nearly all the work, and
    the others' actors only wait. UserError for more GPUs than there are.
    """
    gpu_of = [gpu for _, gpu in wanted]
    most = math.inf if most_actors is None else most_actors
    sizes = [int(min(actors or (1 if gpu else max(1, cpus // 2)), most)) for actors, gpu in wanted]
    free = gpus - sum(size * gpu for size, gpu in zip(sizes, gpu_of, strict=True)) + 1e-9
    if free < 0:
        pools = [f"actors {size} x gpus_per_actor {gpu:g}" for size, gpu in zip(sizes, gpu_of, strict=True) if gpu]
        raise UserError(f"{' + '.join(pools)}: the cluster has {gpus} GPUs")
    unset = [index for index, (actors, gpu) in enumerate(wanted) if gpu and not actors]
    while room := [index for index in unset if gpu_of[index] <= free and sizes[index] < most]:
        least = min(room, key=lambda index: sizes[index] * gpu_of[index])
        sizes[least] += 1
        free -= gpu_of[least]
    on_cpu = sum(size for size, gpu in zip(sizes, gpu_of, strict=True) if not gpu)
    half = int(1e4 * cpus / 2 / on_cpu) / 1e4 if on_cpu and cpus > 1 else 0.0  # Ray counts in ten-thousandths
    claim = 1.0 if on_cpu < cpus else half
    return [Claim(size, 0.0 if gpu else claim, gpu) for size, gpu in zip(sizes, gpu_of, strict=True)]


def run_on_ray(
    sources: Sequence[Source], stages: Sequence[Stage], cpu_pool: str | None, most_actors: int | None
) -> Iterator[dict[str, Any]]:
    """:func:`.pipeline.run_stages` on the cluster that this process is connected to, or else begins."""
    init_ray(cpu_pool=cpu_pool)
    tables = tables_dataset(sources, stages, most_actors)
    for batch in tables.iter_batches(batch_format="pyarrow", batch_size=None):
        for table in unwrapped(batch):
            yield from table.to_pylist()


def tables_dataset(sources: Sequence[Source], stages: Sequence[Stage], most_actors: int | None = None) -> Dataset:
    """A dataset of the last stage's tables, each a row (:func:`wrapped`); UserError for more GPUs than there are.

    One read task a source: its tables come from one process.
    """
    dataset = read_datasource(TableSource(sources), override_num_blocks=len(sources))
    pools = iter(actor_pools([stage.pool for stage in stages if stage.pool], most_actors))
    for stage in stages:
        dataset = _mapped(dataset, stage, next(pools) if stage.pool else None)
    return _quiet(dataset)


def _mapped(dataset: Dataset, stage: Stage, actors: Mapping[str, Any] | None) -> Dataset:
    # Ray names tasks and actors, and shows people, what the function or class is called.
    if actors is None:

        def apply(batch: pa.Table) -> Iterator[pa.Table]:
            return _through(stage.work, batch)

        apply.__name__ = stage.name
        # Without a batch size, or a task would not work on what it has read.
        return dataset.map_batches(apply, batch_format="pyarrow", batch_size=None)
    actor = type(stage.name, (StageActor,), {})
    return dataset.map_batches(actor, fn_constructor_args=(stage,), batch_format="pyarrow", batch_size=1, **actors)


class StageActor:
    """An actor that has opened a stage."""

    def __init__(self, stage: Stage) -> None:
        self.work = stage.open()

    def __call__(self, batch: pa.Table) -> Iterator[pa.Table]:
        return _through(self.work, batch)


def _through(work: Work, batch: pa.Table) -> Iterator[pa.Table]:
    return (wrapped(work(table)) for table in unwrapped(batch))


def wrapped(table: pa.Table) -> pa.Table:
    """``table`` as one row, without a copy: Ray cuts and joins blocks by their bytes, but only between rows."""
    columns = [_one_chunk(column) for column in table.columns]
    rows = pa.StructArray.from_arrays(columns, fields=list(table.schema))
    return pa.table({TABLE: pa.LargeListArray.from_arrays(pa.array([0, len(rows)], pa.int64()), rows)})


def unwrapped(batch: pa.Table) -> Iterator[pa.Table]:
    """The tables that are the rows of ``batch``."""
    return (pa.Table.from_struct_array(row.values) for chunk in batch[TABLE].chunks for row in chunk)


def _one_chunk(column: pa.ChunkedArray) -> pa.Array:
    found = column.combine_chunks()
    return found if isinstance(found, pa.Array) else pa.concat_arrays(found.chunks)


class TableSource(Datasource):
    """Wrapped tables of sources. Nothing is listed or opened here: who knows the sources has done that."""

    def __init__(self, sources: Sequence[Source]) -> None:
        super().__init__()
        self.sources = tuple(sources)

    def get_name(self) -> str:
        return "Tables"

    def estimate_inmemory_data_size(self) -> int | None:
        return None

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: Any = None
    ) -> list[ReadTask]:
        """A task for each source, whatever ``parallelism`` is: its tables then come from one process, in order."""
        about = BlockMetadata(num_rows=None, size_bytes=None, exec_stats=None, input_files=None)
        return [
            ReadTask(partial(_read, source), about, per_task_row_limit=per_task_row_limit) for source in self.sources
        ]


def _read(source: Source) -> Iterator[pa.Table]:
    return map(wrapped, source())


def _quiet(dataset: Dataset) -> Dataset:
    """``dataset`` without Ray Data's own bars, a line for every operator and second: a job shows one of its own."""
    dataset.context.enable_progress_bars = False
    dataset.context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)
    return dataset
