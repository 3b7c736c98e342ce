"""A run's figures as gauges of Ray's Prometheus endpoint, for alerts and dashboards of a whole cluster.

Ray prefixes each name with ``ray_`` and adds tags of the process: a restarted worker is a series of its own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from ray.util.metrics import Gauge

FIGURES = {
    "loss": "Mean over the ranks.",
    "gradient_norm": "Before clipping.",
    "images_per_second": "Of all workers.",
    "data_wait": "Share of the time that the first worker waited for data.",
    "flops_per_second": "Of all workers, as the networks need it.",
    "mfu": "Share of the peak that is.",
    "memory_gb": "What the first worker held at most.",
}


class PrometheusLogger:
    """Gauges ``instella_training_FIGURE`` by the tag ``run``, beside ``_step``, ``_finite`` and ``_running`` (1 or 0)."""

    def __init__(self, run_dir: Path | str, start: int) -> None:
        self.tags = {"run": str(run_dir)}
        self._step = self._gauge("step", "Optimizer steps behind the run.")
        self._finite = self._gauge("finite", "1 while every figure is a finite number.")
        self._running = self._gauge("running", "1 until the run ends well.")
        self._figures = {name: self._gauge(name, about) for name, about in FIGURES.items()}
        self._step.set(start, tags=self.tags)
        self._running.set(1, tags=self.tags)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._step.set(step, tags=self.tags)
        self._finite.set(float(all(map(math.isfinite, values.values()))), tags=self.tags)
        for name, gauge in self._figures.items():
            if math.isfinite(value := values.get(name, math.nan)):
                gauge.set(value, tags=self.tags)

    def picture(self, step: int, pixels: np.ndarray) -> None:
        """Prometheus takes numbers alone: pictures are in the run directory."""

    def close(self) -> None:
        self._running.set(0, tags=self.tags)

    def _gauge(self, name: str, about: str) -> Gauge:
        return Gauge(f"instella_training_{name}", description=about, tag_keys=("run",))
