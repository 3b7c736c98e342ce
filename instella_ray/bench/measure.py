"""Timing with interleaved contestants, so that other load on the machine affects all equally."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of measurements."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: list[float]) -> Spread:
        """Compute median and quartiles of at least one value."""
        low, median, high = np.percentile(values, (25, 50, 75))
        return cls(float(median), float(low), float(high))

    def text(self, scale: float = 1.0, digits: int = 2) -> str:
        """Format as ``median (low..high)``, each times ``scale``."""
        return f"{self.median * scale:.{digits}f} ({self.low * scale:.{digits}f}..{self.high * scale:.{digits}f})"


@dataclass(frozen=True)
class Timing:
    """Times of one contestant's rounds."""

    wall: list[float]
    """Wall-clock seconds."""
    cpu: list[float]
    """CPU seconds of all threads of this process; unlike wall time not affected by other processes."""


def race(contestants: Mapping[str, Callable[[], object]], *, repeats: int, warmup: int = 1) -> dict[str, Timing]:
    """Time every contestant once per round for ``repeats`` rounds, after ``warmup`` rounds that are not counted."""
    timings = {name: Timing([], []) for name in contestants}
    for turn in range(-warmup, repeats):
        for name, run in contestants.items():
            wall, cpu = time.perf_counter(), time.process_time()
            run()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if turn >= 0:
                timings[name].wall.append(time.perf_counter() - wall)
                timings[name].cpu.append(time.process_time() - cpu)
    return timings


def ratio(baseline: list[float], other: list[float]) -> Spread:
    """Compute the speedup of ``other`` over ``baseline`` by round; above 1, ``other`` is faster."""
    return Spread.of([b / o for b, o in zip(baseline, other, strict=True)])
