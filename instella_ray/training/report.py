"""``report.html`` of a run, written during training; the last one stays when the run is killed."""

from __future__ import annotations

import logging
import os
import platform
import time
from array import array
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import UTC, datetime
from types import TracebackType
from typing import Any

import torch
import yaml

from .. import storage
from ..errors import UserError
from .distributed import ranks
from .previews import SHOWN_STEPS, TrainingPreview, decode_preview, preview_file, read_previews, spread
from .report_page import REPORT, Curve, RunState, render_run
from .run_dir import CONFIG, Attempt
from .settings import TrainConfig

STARTS = "starts.json"
"""File of a run directory with every start of its workers: step, attempt, time, host and number of workers."""
EVERY, EVERY_REMOTE = 10.0, 60.0
"""Seconds between two writings to a local disk, and to an object store."""
SHARE = 0.002
"""Largest share of the time that writing may take: a page that takes longer is written less often."""
log = logging.getLogger(__name__)


class RunReport:
    """Report of a run, written by rank 0 in a thread; other ranks write nothing.

    A context manager around the training, whose end it records.
    """

    def __init__(self, cfg: TrainConfig, attempt: Attempt, device: torch.device) -> None:
        rank, world = ranks()
        self.cfg, self.attempt, self.enabled = cfg, attempt, rank == 0
        self.path = storage.join(attempt.run_dir, REPORT)
        self.about = {"workers": world, "device": _device_name(device)}
        self.starts: list[dict[str, Any]] = []
        self.history: dict[str, Curve] = {}
        """Logged values by metric."""
        self.previews: dict[int, TrainingPreview] = {}
        """Previews by step, reduced; of many, an even selection."""
        self.latest: TrainingPreview | None = None
        self.step = 0
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="report")
        self.pending: Future[None] | None = None
        self.next = 0.0

    def begin(self, start: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Continue after step ``start`` with the rows that are logged already, and record the start."""
        file = storage.join(self.attempt.run_dir, STARTS)
        self.starts = storage.retry(lambda: storage.read_json(file)) if storage.exists(file) else []
        now = {"step": start, "attempt": self.attempt.number, "time": _now()}
        self.starts.append({**now, "host": platform.node(), "process": os.getpid(), **self.about})
        storage.write_json(file, self.starts)
        self.step = start
        for row in rows:
            self._note(row)
        self.previews = read_previews(self.attempt.run_dir, start)
        if self.previews:
            newest = preview_file(self.attempt.run_dir, max(self.previews))
            self.latest = decode_preview(storage.read_bytes(newest))

    def add(self, row: Mapping[str, Any]) -> None:
        """Add a logged row, and write the report if it is due."""
        self._note(row)
        self.step = row["step"]
        if time.monotonic() >= self.next and (self.pending is None or self.pending.done()):
            self.pending = self.thread.submit(self._write, self._state("running"))

    def add_preview(self, step: int, preview: TrainingPreview) -> None:
        """Add the preview after ``step`` steps."""
        self.latest = preview
        self.previews[step] = preview.reduced()
        if len(self.previews) > 2 * SHOWN_STEPS:
            self.previews = {step: self.previews[step] for step in spread(sorted(self.previews))}

    def __enter__(self) -> RunReport:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.thread.shutdown()
        if not self.enabled or not self.starts:
            return
        if kind is None and self.step >= self.cfg.steps:
            state = self._state("finished")
        else:
            reason = f"{kind.__name__}: {error}" if kind else "to go on from the last checkpoint"
            state = self._state("stopped", reason)
        self._write(state)

    def _note(self, row: Mapping[str, Any]) -> None:
        for name, value in row.items():
            if name != "step" and isinstance(value, int | float):
                steps, values = self.history.setdefault(name, Curve(array("d"), array("d")))
                steps.append(row["step"])
                values.append(value)

    def _state(self, status: str, reason: str = "") -> RunState:
        """Copy what the thread needs, as the training goes on."""
        curves = {name: Curve(steps[:], values[:]) for name, (steps, values) in self.history.items()}
        return RunState(
            run_dir=self.attempt.run_dir,
            cfg=self.cfg,
            status=status,
            reason=reason,
            step=self.step,
            written=_now(),
            curves=curves,
            starts=list(self.starts),
            previews=dict(self.previews),
            latest=self.latest,
        )

    def _write(self, state: RunState) -> None:
        """Write the page unless a newer attempt has taken over; a failed writing must not fail the run."""
        began = time.thread_time()
        try:
            self.attempt.check()
            config = yaml.safe_load(storage.read_text(storage.join(state.run_dir, CONFIG)))
            storage.write_text(self.path, render_run(state, config))
        except UserError as error:
            log.debug("%s", error)
        except Exception as error:  # stores raise unrelated error types
            log.error("%s: could not be written (%s)", self.path, error)
        every = EVERY if storage.is_local(self.path) else EVERY_REMOTE
        self.next = time.monotonic() + max(every, (time.thread_time() - began) / SHARE)


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
