"""Building blocks of the simulations: random service times, processor sharing, and time averages."""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Callable

import numpy as np
import simpy

Compute = Callable[[float], simpy.Event]
"""Function from seconds of work to the event of its completion."""


class Variation:
    """Random service times: multiplies by gamma-distributed factors of mean 1 and coefficient of variation ``cv``.

    With ``cv`` 0 times are deterministic, with 1 exponentially distributed.
    """

    def __init__(self, cv: float, rng: np.random.Generator) -> None:
        self.shape, self.rng = 1 / cv**2 if cv else math.inf, rng

    def __call__(self, seconds: float) -> float:
        return seconds * self.rng.gamma(self.shape) / self.shape if math.isfinite(self.shape) else seconds


class Processors:
    """Cores with processor sharing: all jobs progress at the same rate, as with a time-slicing kernel.

    ``together`` is the speed of each core when all compute, relative to one that computes alone: below 1 if cores share
    memory bandwidth or are two threads of one physical core.
    """

    def __init__(self, env: simpy.Environment, cores: int, together: float = 1.0) -> None:
        self.env, self.cores, self.together = env, cores, together
        self._work, self._at = 0.0, 0.0
        """Seconds of work that a job present since the start would have received by time ``_at``."""
        self._ends: list[tuple[float, int, simpy.Event]] = []
        self._number, self._alarm = itertools.count(), 0

    def __call__(self, seconds: float) -> simpy.Event:
        """Return the completion event of ``seconds`` of work, measured on an exclusive core."""
        self._advance()
        done = self.env.event()
        heapq.heappush(self._ends, (self._work + seconds, next(self._number), done))
        self._set_alarm()
        return done

    def _speed(self) -> float:
        jobs = len(self._ends)
        busy = min(jobs, self.cores)
        slower = (1 - self.together) * (busy - 1) / max(1, self.cores - 1)
        return (1 - slower) * busy / jobs

    def _advance(self) -> None:
        if self._ends:
            self._work += (self.env.now - self._at) * self._speed()
        self._at = self.env.now

    def _set_alarm(self) -> None:
        self._alarm += 1
        if self._ends:
            left = max(0.0, self._ends[0][0] - self._work) / self._speed()
            alarm = self._alarm
            self.env.timeout(left).callbacks.append(lambda _: self._ring(alarm))

    def _ring(self, alarm: int) -> None:
        if alarm != self._alarm:
            return  # superseded: jobs have arrived or left since
        self._advance()
        first = self._ends[0][0]
        # Rounding may leave a remainder of almost 0; complete every job that was due at this alarm.
        while self._ends and self._ends[0][0] <= max(first, self._work):
            heapq.heappop(self._ends)[2].succeed()
        self._set_alarm()


class Level:
    """Piecewise constant counter and its time average since :meth:`restart`."""

    def __init__(self, env: simpy.Environment) -> None:
        self.env, self.value = env, 0
        self._area, self._since, self._began = 0.0, env.now, env.now

    def add(self, change: int) -> None:
        self._area, self._since = self._area + self.value * (self.env.now - self._since), self.env.now
        self.value += change

    def restart(self) -> None:
        self._area, self._since, self._began = 0.0, self.env.now, self.env.now

    @property
    def mean(self) -> float:
        """Time average; 0 if no time has passed."""
        passed = self.env.now - self._began
        return (self._area + self.value * (self.env.now - self._since)) / passed if passed else 0.0
