"""Timing: contestants take turns, so that whatever else the machine does meets all of them alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True)
class Spread:
    """The middle of some measurements, and the quartiles around it."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: list[float]) -> Spread:
        """Median and quartiles of at least one value."""
        low, median, high = np.percentile(values, (25, 50, 75))
        return cls(float(median), float(low), float(high))

    def text(self, scale: float = 1.0, digits: int = 2) -> str:
        """``median (low..high)``, each times ``scale``."""
        return f"{self.median * scale:.{digits}f} ({self.low * scale:.{digits}f}..{self.high * scale:.{digits}f})"


@dataclass(frozen=True)
class Timing:
    """One contestant's rounds."""

    wall: list[float]
    """Seconds."""
    cpu: list[float]
    """Seconds of processor time over all threads of this process: unlike wall time, free of what others run."""


def race(contestants: Mapping[str, Callable[[], object]], *, repeats: int, warmup: int = 1) -> dict[str, Timing]:
    """Time every contestant once a round, ``repeats`` rounds, after ``warmup`` rounds that do not count."""
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
    """How many times ``other`` goes into ``baseline``, round by round: above 1, ``other`` is the faster one."""
    return Spread.of([b / o for b, o in zip(baseline, other, strict=True)])
