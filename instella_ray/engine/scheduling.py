"""Scheduling policies: which requests take part in an engine's next step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

Scheduling = Literal["fifo", "deadline"]

ALLOWANCE = 3.0
"""Soft deadline of a request after its arrival, in multiples of the time that it takes alone."""
OVERDUE = 2.0
"""Multiple of the allowance after which a request takes precedence over all others, so that none waits forever."""
THROUGHPUT = 3.0
"""Weight of a bucket's relative throughput against the share of the requests that are in time at it."""
SMOOTHING = 0.1
"""Weight of the latest measurement in the running mean of a step's time."""

Seconds = Mapping[int, float]
"""Seconds of a step by bucket (number of slots that it advances), above 0."""


@dataclass(eq=False)
class Schedulable:
    """What a policy knows of a request."""

    steps: int
    """Total number of steps."""
    arrival: float = 0.0
    """Time of submission (s)."""
    alone: float = 0.0
    """Seconds that the request takes alone, expected at its submission; 0 if unknown."""
    deadline: float = float("inf")
    """Time after which the request expires (s)."""
    left: int = field(init=False)
    """Remaining steps."""
    in_slot: bool = False

    def __post_init__(self) -> None:
        self.left = self.steps

    @property
    def due(self) -> float:
        """The earlier one of the deadline and the soft deadline."""
        return min(self.deadline, self.arrival + ALLOWANCE * self.alone)


Policy = Callable[[Sequence[Schedulable], float, Seconds, int], list[Schedulable]]
"""Returns the requests to advance, given all requests (those in slots first, then by arrival), the time, and the slots.

At most as many requests as the largest bucket are returned, at most as many outside of slots as slots are free, and at least
one if there is one. If fewer requests are returned than the bucket has rows, every request in a slot is among them.
"""


def fifo(requests: Sequence[Schedulable], now: float, seconds: Seconds, slots: int) -> list[Schedulable]:
    """Advance all requests in slots; free slots are assigned in order of arrival."""
    return list(requests[:slots])


def by_deadline(requests: Sequence[Schedulable], now: float, seconds: Seconds, slots: int) -> list[Schedulable]:
    """Advance the requests that can be in time, earliest deadline first, at the bucket that leaves most of them in time.

    A larger bucket has a higher throughput but slower steps. The bucket maximizes the share of requests that would be in
    time if they took part in every step from now on, plus :data:`THROUGHPUT` times its throughput relative to the best
    one. Its rows go to overdue requests by arrival, up to half of them, to requests that can be in time by deadline, and
    to late ones by remaining steps. Every request ends: the oldest overdue one that has a slot or gets one is always chosen.
    """
    if not requests:
        return []
    rows = _bucket(requests, now, seconds)
    step, free = seconds[rows], slots - sum(request.in_slot for request in requests)
    on_time = [request for request in requests if request.left * step <= request.due - now]
    late = [request for request in requests if request.left * step > request.due - now]
    overdue = [request for request in late if now - request.arrival > OVERDUE * ALLOWANCE * request.alone]
    chosen: list[Schedulable] = []

    def take(candidates: Sequence[Schedulable], most: int) -> None:
        nonlocal free
        for request in candidates:
            if len(chosen) == most:
                return
            if request in chosen or not (request.in_slot or free):
                continue
            free -= not request.in_slot
            chosen.append(request)

    take(sorted(overdue, key=lambda request: request.arrival), max(1, rows // 2))
    take(sorted(on_time, key=lambda request: request.due), rows)
    take(sorted(late, key=lambda request: request.left), rows)
    return chosen


POLICIES: dict[Scheduling, Policy] = {"fifo": fifo, "deadline": by_deadline}


def _bucket(requests: Sequence[Schedulable], now: float, seconds: Seconds) -> int:
    covering = min((rows for rows in seconds if rows >= len(requests)), default=max(seconds))
    best = max(rows / step for rows, step in seconds.items())

    def value(rows: int) -> float:
        step = seconds[rows]
        on_time = sum(request.left * step <= request.due - now for request in requests)
        return on_time / len(requests) + THROUGHPUT * min(rows, len(requests)) / step / best

    return max(sorted((rows for rows in seconds if rows <= covering), reverse=True), key=value)


class StepTimes:
    """Running mean of the seconds of a step, by branches and bucket."""

    def __init__(self) -> None:
        self.seconds: dict[int, dict[int, float]] = {1: {}, 2: {}}

    def observe(self, branches: int, rows: int, seconds: float) -> None:
        """Add a measurement; the first one of a bucket is its mean."""
        means = self.seconds[branches]
        # A clock may not have advanced during a step.
        mean = means.get(rows, seconds)
        means[rows] = max(mean + SMOOTHING * (seconds - mean), 1e-9)

    def alone(self, guided: bool) -> float:
        """Return the seconds of a step of one request, with guidance or without; 0 if nothing was measured."""
        for branches in (1, 2):
            means = self.seconds[branches]
            if means and (branches == 2 or not guided):
                return means[min(means)]
        return 0.0
