"""What a run logs while it trains: metrics.jsonl, previews, the device's throughput, and the same for other loggers."""

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
"""Single numbers of a step's means, as :meth:`.task.Task.summary`."""


WRITE_EVERY = 15.0
"""Seconds between two writes of metrics.jsonl where it has to be written anew each time."""
log = logging.getLogger(__name__)


class MetricsFile:
    """``metrics.jsonl`` of an attempt: appended to on a disk, written anew now and then elsewhere, as objects have no end
    to append to.
    """

    def __init__(self, attempt: Attempt, start: int) -> None:
        """Drops what was logged after step ``start``, which is trained, and logged, anew."""
        self.attempt, self.path = attempt, storage.join(attempt.run_dir, METRICS)
        self.local = storage.is_local(self.path)
        rows = read_metrics(attempt.run_dir)
        self.lines = [json.dumps(row) + "\n" for row in rows if row["step"] <= start]
        self.unsaved = len(rows) > len(self.lines)
        self.written = 0.0
        self.sync()
        if self.local:
            self.lines.clear()  # what is appended to needs no copy

    def add(self, row: dict[str, Any]) -> None:
        """Log one step; UserError when a newer attempt writes there."""
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
        """Write what is not yet there. A store that fails is tried again the next time, a disk is not."""
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
    """Rank 0 logs one JSON object a logged step to ``metrics.jsonl``; values are means over ranks."""

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
        self.since = time.perf_counter()

    def step(self, step: int, found: Stepped, data_wait: float) -> None:
        """Note what a step was like; ``data_wait`` seconds were spent waiting for its batch."""
        self.seen += self.cfg.global_batch
        self.waited += data_wait
        self.work += found.flops
        if (step + 1) % self.cfg.log_every and step + 1 != self.cfg.steps:
            return
        values = torch.cat([value.flatten() for value in found.means.values()])
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(values)
            values /= self.world
        parts = values.split([value.numel() for value in found.means.values()])
        means = {name: part.view_as(value) for (name, value), part in zip(found.means.items(), parts, strict=True)}
        elapsed = time.perf_counter() - self.since
        facts = {name: round(float(value), 6) for name, value in self.summary(step, means).items()}
        speed = {"images_per_second": round(self.seen / elapsed, 1), "data_wait": round(self.waited / elapsed, 4)}
        speed |= throughput(self.work / elapsed, self.world, self.peak)
        speed["memory_gb"] = round(peak_memory(self.device) / 1e9, 3)
        self.last = {"step": step + 1, **facts, "lr": found.rate, "gradient_norm": round(float(found.norm), 5), **speed}
        self.seen, self.waited, self.work, self.since = 0, 0.0, 0.0, time.perf_counter()
        if self.file is not None:
            self.file.add(self.last)
        figures = {name: value for name, value in self.last.items() if name != "step"}
        for logger in self.loggers:
            logger.scalars(step + 1, figures)

    def preview(self, step: int, image: Any) -> None:
        if image is not None:
            storage.write_bytes(storage.join(self.cfg.run_dir, "previews", f"step-{step:07d}.png"), encode_png(image))
            for logger in self.loggers:
                logger.image(step, image)

    def sync(self) -> None:
        """Write metrics.jsonl as far as it goes; before each checkpoint, so that a run that goes on has it up to there."""
        if self.file is not None:
            self.file.sync()

    def close(self) -> None:
        self.sync()
        for logger in self.loggers:
            logger.close()


def bf16_peak(device: torch.device, precision: Precision) -> float | None:
    """FLOP/s that ``device`` could do at most; None for a processor, an unknown GPU, and a run in another precision."""
    if device.type != "cuda" or compute_dtype(device, precision) != torch.bfloat16:
        return None
    found = find_accelerator(torch.cuda.get_device_name(device))
    return found.peak if found else None


def throughput(flops_per_second: float, workers: int, peak: float | None) -> dict[str, float]:
    """Figures to log of one worker's ``flops_per_second``: that of all, and the share of the peak where it is known.

    Workers have equal shares of a batch, so one speaks for all.
    """
    total = float(f"{flops_per_second * workers:.5g}")
    return {"flops_per_second": total} | ({"mfu": round(flops_per_second / peak, 4)} if peak else {})


def peak_memory(device: torch.device) -> float:
    """Bytes that this worker held at most so far: of the GPU's memory, or the process's on a processor."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0
