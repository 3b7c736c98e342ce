"""Prometheus metrics of requests, stages and their engines, in addition to Serve's own.

Metrics are exported only within a Serve replica; elsewhere they have no reader, and Ray need not be imported. Ray adds
the prefix ``ray_``, the suffix ``_total`` of counters, and the tags deployment, replica and application.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from .keys import NO_KEY

if TYPE_CHECKING:
    from ray.serve.metrics import Counter, Histogram

    from .runner import EngineStats

BOUNDARIES = [0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60]
"""Upper bounds of the histogram's bins, in seconds."""


def in_replica() -> bool:
    """Return whether this process is a Serve replica."""
    serve = sys.modules.get("ray.serve")
    if serve is None:
        return False
    try:
        serve.get_replica_context()
    except serve.exceptions.RayServeException:
        return False
    return True


class StageTimes:
    """Histogram ``instella_stage_seconds`` by the tag ``stage``: text, generate, decode, encode_file."""

    def __init__(self) -> None:
        self._seconds = _stage_seconds() if in_replica() else None

    @contextmanager
    def measure(self, stage: str) -> Iterator[None]:
        """Record the duration of the block, unless it raises."""
        began = time.perf_counter()
        yield
        if self._seconds is not None:
            self._seconds.observe(time.perf_counter() - began, tags={"stage": stage})


def _stage_seconds() -> Histogram:
    from ray.serve.metrics import Histogram

    return Histogram(
        "instella_stage_seconds",
        description="Duration of one call or batch of a stage, including queueing within the stage.",
        boundaries=BOUNDARIES,
        tag_keys=("stage",),
    )


class UsageMetrics:
    """Counters of requests, images and steps by API key, and a histogram of the seconds of answered requests for images.

    Images and steps are those of complete responses. The tag ``key`` is the name of an API key, never the key.
    """

    def __init__(self) -> None:
        self._in_replica = in_replica()
        if not self._in_replica:
            return
        from ray.serve.metrics import Counter, Histogram

        by_outcome: Any = ("key", "status", "code")  # Ray annotates tuples of one tag only
        by_model: Any = ("key", "model")
        self._requests = Counter("instella_requests", description="Requests by key and outcome.", tag_keys=by_outcome)
        self._images = Counter("instella_key_images", description="Images by key and model.", tag_keys=by_model)
        self._steps = Counter("instella_key_steps", description="Steps of images by key and model.", tag_keys=by_model)
        self._seconds = Histogram(
            "instella_request_seconds",
            description="Duration of answered requests for images, of streams to their end.",
            boundaries=BOUNDARIES,
        )

    def count(
        self,
        key: str | None,
        model: str | None,
        outcome: tuple[int, str | None],
        images: int,
        steps: int,
        seconds: float,
    ) -> None:
        """Count a request of ``images`` images of ``steps`` steps each, which ended with a status and an error's code.

        ``key`` is None for a request without a valid key.
        """
        if not self._in_replica:
            return
        status, code = outcome
        self._requests.inc(tags={"key": key or NO_KEY, "status": str(status), "code": code or ""})
        if status != 200 or model is None:
            return
        tags = {"key": key or NO_KEY, "model": model}
        self._images.inc(images, tags=tags)
        if steps:  # Ray raises for 0, which decoding takes
            self._steps.inc(images * steps, tags=tags)
        self._seconds.observe(seconds)


class EngineMetrics:
    """Gauges of rows and slots; counters of steps, images and busy seconds, whose rates give steps/s and load."""

    def __init__(self) -> None:
        from ray.serve.metrics import Counter, Gauge

        self._waiting = Gauge("instella_waiting_rows", description="Images waiting for a slot.")
        self._active = Gauge("instella_active_rows", description="Images that occupy a slot.")
        self._slots = Gauge("instella_slots", description="Maximum number of images processed at once.")
        self._steps = Counter("instella_steps", description="Forward passes of the step engine.")
        self._images = Counter("instella_images", description="Completed images.")
        self._busy = Counter("instella_busy_seconds", description="Seconds spent in steps of the step engine.")
        self._last: dict[int, EngineStats] = {}

    def report(self, engines: dict[int, EngineStats]) -> None:
        """Export the state of a replica's engines, by number; the last one receives new requests.

        There are several only while weights are being swapped.
        """
        stats = list(engines.values())
        self._waiting.set(sum(s.waiting for s in stats))
        self._active.set(sum(s.active for s in stats))
        self._slots.set(stats[-1].slots)
        for number, now in engines.items():
            before = self._last.get(number)
            self._increase(self._steps, now.steps - (before.steps if before else 0))
            self._increase(self._images, now.images - (before.images if before else 0))
            self._increase(self._busy, now.busy_s - (before.busy_s if before else 0))
        self._last = engines

    @staticmethod
    def _increase(counter: Counter, by: float) -> None:
        if by > 0:  # Ray raises for 0
            counter.inc(by)
