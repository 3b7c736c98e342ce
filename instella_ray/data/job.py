"""Common code of all data jobs: configuration, abort limits, output folder, resuming, ledger and run record."""

from __future__ import annotations

import json
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from pydantic import Field

from .. import logs, storage
from ..config import Config, OutputPath
from ..errors import UserError
from ..runs import Provenance, recorded
from .formats.names import part_entries, write_shard_list
from .formats.parts import LEDGER, Ledger, Mode, PartFolder, PartWriter, ledger_of
from .pipeline import run_stages
from .provenance import output_provenance
from .stages import CpuPool, Source, Stage


class AbortConfig(Config):
    """Shares of failed samples above which a job stops. Finished parts are kept, and ``mode=resume`` continues from them."""

    quarantined: float = Field(0.2, ge=0, le=1)
    """Share of quarantined (damaged) samples above which the job stops."""
    failed_downloads: float = Field(0.9, ge=0, le=1)
    """Share of samples with failed downloads above which the job stops, because the network is probably at fault."""
    after_rows: int = Field(1000, ge=1)
    """Minimum number of samples before the shares are checked; at the end of the job they are always checked."""

    def check(self, ledger: Ledger, folder: str, *, at_end: bool = False) -> None:
        """Raise UserError if ``ledger`` exceeds a limit."""
        if not ledger.total or (ledger.total < self.after_rows and not at_end):
            return
        found = {"quarantined": ledger.quarantined.total(), "failed_downloads": ledger.failed_downloads}
        for name, number in found.items():
            if number > getattr(self, name) * ledger.total:
                share = f"{number} of {ledger.total} samples"
                hint = (
                    f"the limit is abort.{name}={getattr(self, name):g}; fix the input, or raise it and set mode=resume"
                )
                raise UserError(f"{folder}: stopped, {share} {name.replace('_', ' ')} ({ledger.summary()}); {hint}")


class DataJobConfig(Config):
    """Configuration common to all data jobs: output folder and execution."""

    output: OutputPath
    """Output folder of the data files, ``ledger.json`` and ``run.json``."""
    mode: Mode = "new"
    """If the output exists: ``new`` fails, ``resume`` continues it, ``fresh`` deletes it and starts over."""
    local: bool = False
    """Run sequentially in this process, without Ray; the output files are the same."""
    shard_time_limit_s: float = Field(3600, gt=0)
    """Time of reading one shard after which the rest of it is given up, quarantined as ``time_limit`` (s)."""
    cpu_pool: CpuPool | None = None
    """Label KEY=VALUE of the nodes that run CPU work, for clusters with a pool of CPU nodes; null: any node."""
    abort: AbortConfig = AbortConfig()


EXECUTION_KEYS = frozenset(DataJobConfig.model_fields)
"""Keys that do not affect the content of the output files."""
INPUT_KEYS = EXECUTION_KEYS | {"input"}
"""Those and the input, whose shards are recorded one by one: a resumed job may have more of them."""


class DataJob:
    """Running data job: writes parts into its output folder, and closes it with a ledger."""

    def __init__(self, cfg: DataJobConfig, name: str, done: set[str]) -> None:
        self.cfg, self.name, self.done = cfg, name, done
        self.folder = PartFolder(cfg.output)
        self.ledger: Ledger | None = None
        """Ledger of all parts; None until the job is closed."""

    def write(
        self, sources: Mapping[str, Source], stages: Sequence[Stage], writer: PartWriter, *, title: str | None = None
    ) -> None:
        """Process the unfinished shards of ``sources`` (label -> source) through ``stages``, and write their parts.

        Shows a progress bar. Raises UserError if the samples that failed exceed the limits of ``abort``.
        """
        todo = {label: source for label, source in sources.items() if label not in self.done}
        if not todo:
            return
        cfg, ledger = self.cfg, ledger_of(self.folder.parts(), todo)
        before, began = ledger.total, time.perf_counter()
        reports = run_stages(list(todo.values()), [*stages, Stage(writer)], local=cfg.local, cpu_pool=cfg.cpu_pool)
        with logs.progress_bar(
            total=len(sources), initial=len(sources) - len(todo), desc=title or self.name, unit="shard"
        ) as bar:
            for report in reports:
                ledger.add(json.loads(report["ledger"]))
                rows = ledger.total - before
                bar.set_postfix_str(f"{rows} rows, {rows / (time.perf_counter() - began):.0f}/s", refresh=False)
                bar.update(int(report["last"]))
                cfg.abort.check(ledger, cfg.output)
        cfg.abort.check(ledger, cfg.output, at_end=True)

    def close(self, shards: Collection[str], *, listed: bool = True) -> Ledger:
        """Check that all ``shards`` are finished, and write the ledger and, if ``listed``, the list of the output shards."""
        self.ledger = self.folder.close(shards)
        if listed:
            write_shard_list(self.folder.url, part_entries(self.folder.url, self.folder.parts()))
        return self.ledger

    def require_kept(self, otherwise: str) -> None:
        """Raise a UserError that starts with ``otherwise`` if no sample was kept."""
        assert self.ledger is not None
        if not self.ledger.kept:
            where = storage.join(self.folder.url, LEDGER)
            raise UserError(f"{otherwise} ({self.ledger.summary()}); see {where}")


@contextmanager
def data_job(
    cfg: DataJobConfig,
    name: str,
    makes: str,
    settings: Mapping[str, Any],
    inputs: Sequence[Provenance],
    shards: Mapping[str, str] | None = None,
) -> Iterator[DataJob]:
    """Open the output folder for a job with ``settings``, and keep its run record while the block runs.

    ``makes`` is the role of the output in lineage; ``shards`` are the input shards, URL -> label, if there are some.
    Raises UserError if the output exists and ``cfg.mode`` does not allow it, or was made with other settings or from
    shards that are missing now.
    """
    done = PartFolder(cfg.output).open(cfg.mode, settings, shards)
    with recorded(cfg.output, name, cfg, inputs) as outputs:
        job = DataJob(cfg, name, done)
        yield job
        assert job.ledger is not None, f"{name} has not been closed"
        outputs.append(output_provenance(makes, cfg.output, job.ledger))
