"""Stages of data jobs on Ray Data: Ray initialization, node labels, sizes of actor pools, and datasets of tables."""

from __future__ import annotations

import logging
import math
import os
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, NamedTuple

import pyarrow as pa
import ray
from ray.data import ActorPoolStrategy, DataContext, Dataset, read_datasource
from ray.data._internal.execution import operators
from ray.data._internal.execution.operators.actor_pool_map_operator import ActorPoolMapOperator
from ray.data.block import BlockMetadata
from ray.data.datasource import Datasource, ReadTask
from ray.exceptions import RayError

from .. import logs
from ..errors import UserError, task_error
from ..memory import keep_freed_memory
from .stages import Pool, Source, Stage, Work

TABLE = "table"
"""Column in which each row holds a whole table."""
INLINE_BYTES = 100 << 10
"""Ray passes larger arguments through the object store (its ``max_direct_call_object_size``)."""
logger = logging.getLogger(__name__)


def init_ray(*, cpu_pool: str | None = None, log_to_driver: bool = True) -> None:
    """Connect to the cluster that a job was submitted to, or start a local one on loopback.

    ``cpu_pool`` restricts the CPU work of datasets created afterwards to the nodes with that label. ``log_to_driver``
    prints the output of worker processes in this process.
    """
    if not ray.is_initialized():
        _connect(log_to_driver)
    keep_to(cpu_pool)


def _connect(log_to_driver: bool) -> None:
    options: dict[str, Any] = {"log_to_driver": log_to_driver}
    if logs.for_machines():
        options["logging_config"] = WorkerLogging("JSON", fields=logs.context())
    if os.environ.get("RAY_ADDRESS"):
        _init(**options)
    else:
        start_local_ray(**options)


def start_local_ray(**options: Any) -> None:
    """Start a Ray on this machine that ends with this process; ``options`` are those of ``ray.init``."""
    # Its only node is never preempted, and Ray logs an error about the actor that would watch for that.
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    _init(include_dashboard=False, logging_level=logging.ERROR, **options)


def _init(**options: Any) -> None:
    if not sys.stderr.isatty():
        os.environ.setdefault("RAY_COLOR_PREFIX", "0")  # no escape codes in files
    ray.init(**options)


@dataclass
class WorkerLogging(ray.LoggingConfig):
    """Ray's logging configuration of all processes of a job, extended by this package's log records."""

    fields: dict[str, Any] = field(default_factory=dict)
    """Fields of every record of this package, and where the records are written."""

    def _apply(self) -> None:
        super()._apply()
        logs.set_up_worker(self.fields)


def keep_to(cpu_pool: str | None) -> None:
    """Restrict the CPU work of datasets created afterwards to the nodes with the label ``cpu_pool``; None: any node.

    Actors with GPUs run on the other nodes.
    """
    key, _, value = (cpu_pool or "").partition("=")
    selector = {key: value} if key else None
    DataContext.get_current().execution_options.label_selector = selector
    if selector and not any(node["Alive"] and _has(node, selector) for node in ray.nodes()):
        logger.warning("cpu_pool %s: no node has this label; waiting for one", cpu_pool)


def _has(node: Mapping[str, Any], selector: Mapping[str, str]) -> bool:
    return all(node["Labels"].get(key) == value for key, value in selector.items())


def actor_pools(pools: Sequence[Pool], most_actors: int | None = None) -> list[dict[str, Any]]:
    """Return ``map_batches`` arguments for pools that run concurrently in one dataset, each with at most ``most_actors``.

    Raises UserError if the pools need more GPUs than the cluster has.
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
    """Number of actors in a pool, and the CPUs and GPUs that each of them reserves."""

    actors: int
    cpus: float
    gpus: float


def share(
    wanted: Sequence[tuple[int | None, float]], cpus: int, gpus: int, most_actors: int | None = None
) -> list[Claim]:
    """Divide CPUs and GPUs among concurrent pools, given as (actors or None, GPUs per actor), leaving a CPU for reading.

    Ray does not start an actor whose resources are not free, and a pool without actors would block the job forever. So
    GPU pools without a number of actors share the remaining GPUs; and if the CPU actors are at least as many as the
    CPUs, together they reserve half of the CPUs. Their number is not reduced: usually one pool has nearly all the work,
    and the actors of the others idle. Raises UserError if the pools need more than ``gpus`` GPUs.
    """
    gpu_of = [gpu for _, gpu in wanted]
    most = math.inf if most_actors is None else most_actors
    sizes = [int(min(actors or (1 if gpu else max(1, cpus // 2)), most)) for actors, gpu in wanted]
    free = gpus - sum(size * gpu for size, gpu in zip(sizes, gpu_of, strict=True)) + 1e-9
    if free < 0:
        pools = [f"actors {size} x gpus_per_actor {gpu:g}" for size, gpu in zip(sizes, gpu_of, strict=True) if gpu]
        raise UserError(f"{' + '.join(pools)}: the cluster has {gpus} GPUs")
    unset = [index for index, (actors, gpu) in enumerate(wanted) if gpu and not actors]
    while growable := [index for index in unset if gpu_of[index] <= free and sizes[index] < most]:
        least = min(growable, key=lambda index: sizes[index] * gpu_of[index])
        sizes[least] += 1
        free -= gpu_of[least]
    on_cpu = sum(size for size, gpu in zip(sizes, gpu_of, strict=True) if not gpu)
    half = int(1e4 * cpus / 2 / on_cpu) / 1e4 if on_cpu and cpus > 1 else 0.0  # Ray's resolution is 1e-4
    claim = 1.0 if on_cpu < cpus else half
    return [Claim(size, 0.0 if gpu else claim, gpu) for size, gpu in zip(sizes, gpu_of, strict=True)]


def run_on_ray(
    sources: Sequence[Source], stages: Sequence[Stage], cpu_pool: str | None, most_actors: int | None
) -> Iterator[dict[str, Any]]:
    """Run :func:`.pipeline.run_stages` on the connected cluster, or on a local one started for it."""
    init_ray(cpu_pool=cpu_pool)
    tables = tables_dataset(sources, stages, most_actors)
    try:
        for batch in tables.iter_batches(batch_format="pyarrow", batch_size=None):
            for table in unwrapped(batch):
                yield from table.to_pylist()
    except RayError as error:
        if (found := task_error(error)) is error:
            raise
        raise found from error


def tables_dataset(sources: Sequence[Source], stages: Sequence[Stage], most_actors: int | None = None) -> Dataset:
    """Build a dataset of the last stage's tables, one table per row (:func:`wrapped`).

    Each source has one read task. Raises UserError if the stages need more GPUs than the cluster has.
    """
    dataset = read_datasource(TableSource(sources), override_num_blocks=len(sources))
    pools = iter(actor_pools([stage.pool for stage in stages if stage.pool], most_actors))
    for stage in stages:
        dataset = _mapped(dataset, stage, next(pools) if stage.pool else None)
    return _quiet(dataset)


def _mapped(dataset: Dataset, stage: Stage, actors: Mapping[str, Any] | None) -> Dataset:
    # Ray names tasks and actors after the function or class.
    if actors is None:

        def apply(batch: pa.Table) -> Iterator[pa.Table]:
            return _through(stage.work, batch)

        apply.__name__ = stage.name
        # With a batch size, the task that has read a block would not be the one that processes it.
        return dataset.map_batches(apply, batch_format="pyarrow", batch_size=None)
    actor = type(stage.name, (StageActor,), {})
    return dataset.map_batches(actor, fn_constructor_args=(stage,), batch_format="pyarrow", batch_size=1, **actors)


class StageActor:
    """Actor that runs an opened stage."""

    def __init__(self, stage: Stage) -> None:
        keep_freed_memory()
        try:
            self.work = stage.open()
        except (UserError, OSError) as error:
            # Of an error in a constructor Ray keeps the text alone, so the first table raises it.
            self.work = partial(_refuse, error)

    def __call__(self, batch: pa.Table) -> Iterator[pa.Table]:
        return _through(self.work, batch)


def _refuse(error: Exception, table: pa.Table) -> pa.Table:
    raise error


def _through(work: Work, batch: pa.Table) -> Iterator[pa.Table]:
    return _guarded(wrapped(work(table)) for table in unwrapped(batch))


def wrapped(table: pa.Table) -> pa.Table:
    """Wrap ``table`` into a single row, without a copy: Ray splits and merges blocks by size, but only between rows."""
    columns = [_one_chunk(column) for column in table.columns]
    rows = pa.StructArray.from_arrays(columns, fields=list(table.schema))
    return pa.table({TABLE: pa.LargeListArray.from_arrays(pa.array([0, len(rows)], pa.int64()), rows)})


def unwrapped(batch: pa.Table) -> Iterator[pa.Table]:
    """Yield the tables wrapped in the rows of ``batch``."""
    return (pa.Table.from_struct_array(row.values) for chunk in batch[TABLE].chunks for row in chunk)


def _one_chunk(column: pa.ChunkedArray) -> pa.Array:
    found = column.combine_chunks()
    return found if isinstance(found, pa.Array) else pa.concat_arrays(found.chunks)


class InlineActorPool(ActorPoolMapOperator):
    """Ray Data's actor pool, whose actors hold their settings and, if it is small, their stage by value.

    Ray Data passes references into the object store, on which Ray logs an error: an actor is not restarted if these
    objects are lost (https://github.com/ray-project/ray/issues/53727). What is too large to be passed by value stays a
    reference that the operator holds.
    """

    @cached_property
    def _map_transformer_ref(self) -> Any:
        small = len(ray.cloudpickle.dumps(self._map_transformer)) < INLINE_BYTES
        return self._map_transformer if small else super()._map_transformer_ref

    @property
    def _data_context_ref(self) -> Any:
        return self.data_context


# Ray Data asks this function for the class of every pool of actors.
operators.get_actor_pool_map_operator_cls = lambda: InlineActorPool


class TableSource(Datasource):
    """Ray datasource of the wrapped tables of ``sources``; nothing is listed or opened before its tasks run."""

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
        """Return one task per source, regardless of ``parallelism``, so that its tables come in order from one process."""
        about = BlockMetadata(num_rows=None, size_bytes=None, exec_stats=None, input_files=None)
        return [
            ReadTask(partial(_read, source), about, per_task_row_limit=per_task_row_limit) for source in self.sources
        ]


def _read(source: Source) -> Iterator[pa.Table]:
    return _guarded(map(wrapped, source()))


class StageError(Exception):
    """Error of the user or the system in a task: Ray adds text to the arguments of others, such as the path of OSError."""

    def __init__(self, cause: object) -> None:
        super().__init__()
        self.cause = cause

    def __str__(self) -> str:
        return str(self.cause)


def _guarded(tables: Iterator[pa.Table]) -> Iterator[pa.Table]:
    try:
        yield from tables
    except (UserError, OSError) as error:
        raise StageError(error) from error


def _quiet(dataset: Dataset) -> Dataset:
    """Disable Ray Data's progress bars and logs, one line per operator and second: a job shows its own progress bar.

    So is its advice about inputs smaller than an actor pool: it names an option that no job has.
    """
    dataset.context.enable_progress_bars = False
    dataset.context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)
    # They print the error of a task in 40 lines, which is raised here anyway.
    for name in ("ray.data.exceptions", "ray.data._internal.execution.streaming_executor_state"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", "The minimum number of concurrent actors")
    return dataset
