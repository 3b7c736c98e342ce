"""What all data jobs share: their output folder, what is done in it already, its parts, its account and its record."""

from __future__ import annotations

import json
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from pydantic import Field
from tqdm import tqdm

from .. import storage
from ..config import Config
from ..errors import UserError
from ..runs import Provenance, recorded
from .formats.names import part_entries, write_shard_list
from .formats.parts import LEDGER, Ledger, Mode, PartFolder, PartWriter
from .pipeline import run_stages
from .provenance import output_provenance
from .stages import CpuPool, Source, Stage


class AbortConfig(Config):
    """When a job stops because too much is wrong with its input; what it has done stays, and resume goes on from there."""

    quarantined: float = Field(0.2, ge=0, le=1)
    """Share of samples that are damaged. Above it the job stops."""
    failed_downloads: float = Field(0.9, ge=0, le=1)
    """Share of samples whose image could not be fetched. Above it the job stops: rather the network's fault."""
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


class DataJobConfig(Config):
    """Where a data job writes, and how it runs."""

    output: str
    """Folder for what the job makes, ``ledger.json`` and ``run.json``."""
    mode: Mode = "new"
    """When the output exists: new refuses, resume goes on with it, fresh starts over."""
    local: bool = False
    """Work in this process, one thing after another, without Ray; the files are the same."""
    cpu_pool: CpuPool | None = None
    """Label KEY=VALUE of the nodes that do the work on CPUs, where a cluster has such a pool; none means any node."""
    abort: AbortConfig = AbortConfig()


HOW = frozenset(DataJobConfig.model_fields)
"""Keys that decide nothing about what is in the files."""


class DataJob:
    """A job at work in its output folder."""

    def __init__(self, cfg: DataJobConfig, name: str, done: set[str]) -> None:
        self.cfg, self.name, self.done = cfg, name, done
        self.folder = PartFolder(cfg.output)
        self.ledger: Ledger | None = None
        """The account of all parts, once the job has been closed."""

    def write(
        self, sources: Mapping[str, Source], stages: Sequence[Stage], writer: PartWriter, *, title: str | None = None
    ) -> None:
        """Write the parts of those shards (label -> source) that are not done, through ``stages``, under a progress bar.

        UserError when more is wrong with the input than ``abort`` allows.
        """
        todo = {label: source for label, source in sources.items() if label not in self.done}
        if not todo:
            return
        cfg, ledger = self.cfg, Ledger.of(part.ledger for part in self.folder.parts())
        before, began = ledger.total, time.perf_counter()
        reports = run_stages(list(todo.values()), [*stages, Stage(writer)], local=cfg.local, cpu_pool=cfg.cpu_pool)
        with tqdm(total=len(sources), initial=len(sources) - len(todo), desc=title or self.name, unit="shard") as bar:
            for report in reports:
                ledger.add(json.loads(report["ledger"]))
                rows = ledger.total - before
                bar.set_postfix_str(f"{rows} rows, {rows / (time.perf_counter() - began):.0f}/s", refresh=False)
                bar.update(int(report["last"]))
                cfg.abort.check(ledger, cfg.output)
        cfg.abort.check(ledger, cfg.output, at_end=True)

    def close(self, shards: Collection[str], *, listed: bool = True) -> Ledger:
        """Check that every one of ``shards`` is accounted for, and write the ledger; ``listed``: the list of tars too."""
        self.ledger = self.folder.close(shards)
        if listed:
            write_shard_list(self.folder.url, part_entries(self.folder.url, self.folder.parts()))
        return self.ledger

    def require_kept(self, otherwise: str) -> None:
        """UserError that begins with ``otherwise`` when nothing was kept."""
        assert self.ledger is not None
        if not self.ledger.kept:
            where = storage.join(self.folder.url, LEDGER)
            raise UserError(f"{otherwise} ({self.ledger.summary()}); see {where}")


@contextmanager
def data_job(
    cfg: DataJobConfig, name: str, makes: str, settings: Mapping[str, Any], inputs: Sequence[Provenance]
) -> Iterator[DataJob]:
    """Get the output folder ready for a job of these ``settings``, and keep its record while the block works there.

    ``makes`` says what the output is, for lineage. UserError when the output exists unasked, or was made with others.
    """
    done = PartFolder(cfg.output).open(cfg.mode, settings)
    with recorded(cfg.output, name, cfg, inputs) as outputs:
        job = DataJob(cfg, name, done)
        yield job
        assert job.ledger is not None, f"{name} has not been closed"
        outputs.append(output_provenance(makes, cfg.output, job.ledger))
