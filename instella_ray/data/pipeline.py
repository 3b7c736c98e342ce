"""How data jobs run on Ray Data: where Ray comes from, a progress bar, and one way to write the output."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
from pydantic import Field
from ray.data import Dataset
from tqdm import tqdm

from .. import logs
from ..config import Config
from ..errors import UserError
from .ledger import Ledger
from .parts import PartFolder, PartWriter
from .pools import actor_pool, keep_to


class AbortConfig(Config):
    """When a job stops because too much is wrong with its input; what it has done stays, and resume goes on from there."""

    quarantined: float = Field(0.2, ge=0, le=1)
    """Share of samples that are damaged. Above it the job stops."""
    failed_downloads: float = Field(0.9, ge=0, le=1)
    """Share of samples whose picture could not be fetched. Above it the job stops: rather the network's fault."""
    after_rows: int = Field(1000, ge=1)
    """Shares of fewer samples say nothing yet. At the job's end they are looked at in any case."""

    def check(self, ledger: Ledger, folder: str, *, at_end: bool = False) -> None:
        """UserError when ``ledger`` is past a limit."""
        if not ledger.total or (ledger.total < self.after_rows and not at_end):
            return
        found = {"quarantined": ledger.quarantined.total(), "failed_downloads": ledger.failed_downloads}
        for name, number in found.items():
            if number > getattr(self, name) * ledger.total:
                share = f"{number} of {ledger.total} samples"
                hint = f"the limit is abort.{name}={getattr(self, name):g}; mend the input, or raise it and set mode=resume"
                raise UserError(f"{folder}: stopped, {share} {name.replace('_', ' ')} ({ledger.summary()}); {hint}")


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
    writer: PartWriter,
    *,
    shards: Collection[str],
    done: Collection[str],
    title: str,
    abort: AbortConfig,
) -> None:
    """Run ``dataset`` to its end and let ``writer`` write its rows, under a progress bar.

    ``done`` are those of ``shards`` that an earlier run has finished. UserError when more is wrong with the input than
    ``abort`` allows.
    """
    reports = quiet(dataset.map_batches(writer, batch_format="pyarrow", batch_size=None))
    ledger = Ledger.of(part.ledger for part in PartFolder(writer.folder).parts())
    before, began = ledger.total, time.perf_counter()
    with tqdm(total=len(shards), initial=len(done), desc=title, unit="shard") as bar:
        for report in reports.iter_rows():
            ledger.add(json.loads(report["ledger"]))
            rows = ledger.total - before
            bar.set_postfix_str(f"{rows} rows, {rows / (time.perf_counter() - began):.0f}/s", refresh=False)
            bar.update(int(report["last"]))
            abort.check(ledger, writer.folder)
    abort.check(ledger, writer.folder, at_end=True)
