"""Training metrics: metrics.jsonl, previews, throughput and MFU, forwarded to the configured loggers."""

from __future__ import annotations

import json
import logging
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import storage
from ..accelerator import Precision, compute_dtype
from ..errors import UserError
from ..flops import find_accelerator
from ..rendering import encode_png
from .distributed import ranks
from .loggers import open_loggers
from .run_dir import METRICS, Attempt, read_metrics
from .settings import TrainConfig
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
    """Training log: rank 0 writes one JSON object per logged step to ``metrics.jsonl``, with means over ranks."""

    def __init__(
        self, cfg: TrainConfig, attempt: Attempt, rank: int, summary: Summary, start: int, device: torch.device
    ) -> None:
        self.cfg, self.summary, self.device = cfg, summary, device
        self.file = MetricsFile(attempt, start) if rank == 0 else None
        self.last: dict[str, Any] = {}
        self.seen = 0
        self.waited = 0.0
        self.work = 0.0
        self.peak = bf16_peak(device, cfg.precision)
        _, self.world = ranks()
        self.loggers = open_loggers(cfg.loggers, cfg.run_dir, start) if rank == 0 else []
        self.since = self.saved_at = time.perf_counter()

    def step(self, step: int, found: Stepped, data_wait: float) -> None:
        """Record a step, and log if it is due; ``data_wait`` is the time spent waiting for its batch, in seconds."""
        self.seen += self.cfg.global_batch
        self.waited += data_wait
        self.work += found.flops
        if (step + 1) % self.cfg.log_every and step + 1 != self.cfg.steps:
            return
        facts = self._facts(step, found) if found.means else {}  # a skipped batch has none
        elapsed = time.perf_counter() - self.since
        speed = {"images_per_second": round(self.seen / elapsed, 1), "data_wait": round(self.waited / elapsed, 4)}
        speed |= throughput(self.work / elapsed, self.world, self.peak)
        speed["memory_gb"] = round(peak_memory(self.device) / 1e9, 3)
        norm = {"gradient_norm": round(float(found.norm), 5)} if found.means else {}
        skipped = {"skipped_batches": found.skipped} if found.skipped or self.cfg.on_nonfinite == "skip" else {}
        self.last = {"step": step + 1, **facts, "lr": found.rate, **norm, **skipped, **speed}
        self.seen, self.waited, self.work, self.since = 0, 0.0, 0.0, time.perf_counter()
        if self.file is not None:
            self.file.add(self.last)
        figures = {name: value for name, value in self.last.items() if name != "step"}
        # Not in the file, whose rows are the same after a run was resumed.
        figures["checkpoint_age_seconds"] = round(time.perf_counter() - self.saved_at, 1)
        for logger in self.loggers:
            logger.scalars(step + 1, figures)

    def _facts(self, step: int, found: Stepped) -> dict[str, float]:
        """Return the step's means over all ranks, rounded. Collective."""
        values = torch.cat([value.flatten() for value in found.means.values()])
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(values)
            values /= self.world
        parts = values.split([value.numel() for value in found.means.values()])
        means = {name: part.view_as(value) for (name, value), part in zip(found.means.items(), parts, strict=True)}
        return {name: round(float(value), 6) for name, value in self.summary(step, means).items()}

    def preview(self, step: int, image: Any) -> None:
        if image is not None:
            storage.write_bytes(storage.join(self.cfg.run_dir, "previews", f"step-{step:07d}.png"), encode_png(image))
            for logger in self.loggers:
                logger.image(step, image)

    def sync(self) -> None:
        """Write metrics.jsonl; called before each checkpoint, so that a resumed run has all rows up to it."""
        if self.file is not None:
            self.file.sync()

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
