"""Training metrics: metrics.jsonl, previews, throughput and MFU, forwarded to the configured loggers."""

from __future__ import annotations

import json
import logging
import resource
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import storage
from ..accelerator import Precision, compute_dtype
from ..errors import UserError
from ..flops import find_accelerator
from .distributed import ranks
from .loggers import PREVIEWS, open_loggers
from .means import StepMeans
from .previews import TrainingPreview, draw_grid, draw_strip, encode_preview, preview_file
from .report import RunReport
from .run_dir import METRICS, Attempt, read_metrics
from .settings import HELD_OUT, TrainConfig
from .trainer import Stepped

Summary = Callable[[int, dict[str, Tensor]], dict[str, Tensor]]
"""Scalars to log from the mean loss parts of a step, as :meth:`.trainer.TrainingTask.summary`."""


WRITE_EVERY = 15.0
"""Seconds between two uploads of metrics.jsonl to an object store, each of which rewrites the whole file."""
log = logging.getLogger(__name__)


class MetricsFile:
    """``metrics.jsonl`` of an attempt: appended to on a local disk, rewritten periodically on an object store."""

    def __init__(self, attempt: Attempt, start: int) -> None:
        """Drop rows after step ``start``: those steps are trained and logged again."""
        self.attempt, self.path = attempt, storage.join(attempt.run_dir, METRICS)
        self.local = storage.is_local(self.path)
        rows = read_metrics(attempt.run_dir)
        self.lines = [json.dumps(row) + "\n" for row in rows if row["step"] <= start]
        self.unsaved = len(rows) > len(self.lines)
        self.written = 0.0
        self.sync()
        if self.local:
            self.lines.clear()  # a local file is appended to: no copy in memory is needed

    def add(self, row: dict[str, Any]) -> None:
        """Log one step; UserError if a newer attempt has started."""
        line = json.dumps(row) + "\n"
        if self.local:
            self.attempt.check()
            with Path(storage.filesystem(self.path)[1]).open("a") as stream:
                stream.write(line)
            return
        self.lines.append(line)
        self.unsaved = True
        if time.monotonic() - self.written > WRITE_EVERY:
            self.sync()

    def sync(self) -> None:
        """Write unsaved rows. A failed upload is retried at the next call; a failed local write raises."""
        if not self.unsaved:
            return
        try:
            self.attempt.check()
            storage.retry(lambda: storage.write_text(self.path, "".join(self.lines)))
            self.unsaved = False
        except UserError:
            raise
        except Exception as error:
            if self.local:
                raise
            log.error("%s: could not be written (%s)", self.path, error)
        self.written = time.monotonic()


class MetricsLog:
    """Training log: rank 0 writes one JSON object per line of the log to ``metrics.jsonl``.

    Values are means over all steps since the last line and over ranks.
    """

    def __init__(
        self,
        cfg: TrainConfig,
        attempt: Attempt,
        rank: int,
        summary: Summary,
        start: int,
        device: torch.device,
        checkpoint: Path | None,
        report: RunReport,
    ) -> None:
        """Continue the log after step ``start``, whose ``checkpoint`` has the sums since the last line before it."""
        self.cfg, self.summary, self.device, self.report = cfg, summary, device, report
        self.file = MetricsFile(attempt, start) if rank == 0 else None
        self.last: dict[str, Any] = {}
        """Last logged row, with the last values of metrics that are logged less often."""
        if self.file is not None:
            rows = [row for row in read_metrics(attempt.run_dir) if row["step"] <= start]
            for row in rows:
                self._remember(row)
            report.begin(start, rows)
        self.means = StepMeans(checkpoint)
        self.seen = 0
        self.waited = 0.0
        self.work = 0.0
        self.peak = bf16_peak(device, cfg.precision)
        _, self.world = ranks()
        self.loggers = open_loggers(cfg.loggers, cfg.run_dir, start) if rank == 0 else []
        self.since = self.saved_at = time.perf_counter()

    def step(
        self,
        step: int,
        found: Stepped,
        data_wait: float,
        evaluate: Callable[[], Mapping[str, float]] | None = None,
    ) -> None:
        """Record a step, and log if it is due or to ``evaluate`` held-out metrics, so that every row has a loss.

        ``data_wait`` is the time spent waiting for the step's batch, in seconds; neither it nor the throughput counts the
        evaluation's time.
        """
        self.seen += self.cfg.global_batch
        self.waited += data_wait
        self.work += found.flops
        self.means.add(found.means, found.norm)
        if evaluate is None and (step + 1) % self.cfg.log_every and step + 1 != self.cfg.steps:
            return
        means, norms = self.means.means()
        self.means.clear()
        elapsed = time.perf_counter() - self.since
        held_out = evaluate() if evaluate is not None else {}
        facts = {name: round(float(value), 6) for name, value in (self.summary(step, means) if means else {}).items()}
        facts |= {"lr": found.rate, **{name: round(value, 5) for name, value in norms.items()}}
        speed = {"images_per_second": round(self.seen / elapsed, 1), "data_wait": round(self.waited / elapsed, 4)}
        speed |= throughput(self.work / elapsed, self.world, self.peak)
        speed["memory_gb"] = round(peak_memory(self.device) / 1e9, 3)
        skipped = {"skipped_batches": found.skipped} if found.skipped or self.cfg.on_nonfinite == "skip" else {}
        row = {"step": step + 1, **facts, **held_out, **skipped, **speed}
        self.seen, self.waited, self.work, self.since = 0, 0.0, 0.0, time.perf_counter()
        self._remember(row)
        if self.file is not None:
            self.file.add(row)
            self.report.add(row)
        figures = {name: value for name, value in row.items() if name != "step"}
        # Not in the file, whose rows are the same after a run was resumed.
        figures["checkpoint_age_seconds"] = round(time.perf_counter() - self.saved_at, 1)
        for logger in self.loggers:
            logger.scalars(step + 1, figures)

    def _remember(self, row: Mapping[str, Any]) -> None:
        kept = {name: value for name, value in self.last.items() if name.startswith(HELD_OUT)}
        self.last = {**kept, **row}

    def preview(self, step: int, preview: TrainingPreview | None) -> None:
        """Write and log the preview after ``step`` steps, and that of all steps so far."""
        if preview is None:
            return
        strip = draw_strip(preview)
        storage.write_bytes(preview_file(self.cfg.run_dir, step), encode_preview(preview, strip))
        self.report.add_preview(step, preview)
        grid = draw_grid(self.report.previews)
        for logger in self.loggers:
            logger.image(step, strip)
            logger.image(step, grid, PREVIEWS)

    def sync(self) -> None:
        """Write metrics.jsonl; called before each checkpoint, so that a resumed run has all rows up to it."""
        if self.file is not None:
            self.file.sync()

    def save(self, folder: Path) -> None:
        """Write the state of the log to a checkpoint's folder on rank 0; collective."""
        self.means.save(folder)

    def saved(self) -> None:
        """Note that a checkpoint has been saved."""
        self.saved_at = time.perf_counter()

    def close(self) -> None:
        self.sync()
        for logger in self.loggers:
            logger.close()


def bf16_peak(device: torch.device, precision: Precision) -> float | None:
    """Return the peak bf16 FLOP/s of ``device``; None for a CPU, an unknown GPU, or a run in another precision."""
    if device.type != "cuda" or compute_dtype(device, precision) != torch.bfloat16:
        return None
    found = find_accelerator(torch.cuda.get_device_name(device))
    return found.peak if found else None


def throughput(flops_per_second: float, workers: int, peak: float | None) -> dict[str, float]:
    """Return ``flops_per_second`` of all workers, and ``mfu`` if the peak is known, from one worker's FLOP/s.

    Workers have equal shares of a batch, so the total is the product.
    """
    total = float(f"{flops_per_second * workers:.5g}")
    return {"flops_per_second": total} | ({"mfu": round(flops_per_second / peak, 4)} if peak else {})


def peak_memory(device: torch.device) -> float:
    """Return the peak memory of this worker in bytes: GPU memory, or the process's resident memory on a CPU."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0
