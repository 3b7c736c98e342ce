"""Simulated deployments of the serving graph: replicas behind a handle, batching, and the step engine.

They reproduce :mod:`...serving.batching`, :mod:`...serving.deployments`, :mod:`...engine.engine` and Serve's router in
simulated time.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import simpy

from .clock import Compute, Level

Process = Generator[simpy.Event, Any, Any]
Seconds = Callable[[Hashable, int], float]
"""Function from key and number of items to the seconds of one call."""


@dataclass(eq=False)
class Call:
    """Call of a deployment for one image."""

    done: simpy.Event
    """Completion event."""
    key: Hashable = None
    """Batching key: only calls with the same key share a batch."""
    steps: int = 0
    """Number of engine steps."""


class Replica(Protocol):
    """Replica of a deployment."""

    def take(self, call: Call) -> None:
        """Accept a call, and trigger its ``done`` when it is completed."""


@dataclass
class Meters:
    """Time averages of a deployment."""

    busy: Level
    """Number of busy replicas."""
    present: Level
    """Number of calls in the deployment, waiting or computed."""
    served: Level
    """Number of calls being computed."""

    @classmethod
    def of(cls, env: simpy.Environment) -> Meters:
        return cls(Level(env), Level(env), Level(env))

    @property
    def waiting(self) -> float:
        """Mean number of waiting calls."""
        return self.present.mean - self.served.mean

    def restart(self) -> None:
        for level in (self.busy, self.present, self.served):
            level.restart()


class Deployment:
    """Replicas behind a handle that routes to the less loaded of two random ones, and queues when all are full."""

    def __init__(
        self,
        env: simpy.Environment,
        replicas: Sequence[Replica],
        ongoing: int,
        meters: Meters,
        rng: np.random.Generator,
    ) -> None:
        """``ongoing``: largest number of concurrent calls per replica."""
        self.env, self.replicas, self.ongoing, self.meters, self.rng = env, replicas, ongoing, meters, rng
        self.calls = [0] * len(replicas)
        self._queue: deque[simpy.Event] = deque()

    def call(self, key: Hashable = None, steps: int = 0) -> Process:
        """Simulate a call from the handle to its response."""
        self.meters.present.add(1)
        number = yield from self._place()
        call = Call(self.env.event(), key, steps)
        self.replicas[number].take(call)
        yield call.done
        self.meters.present.add(-1)
        if self._queue:
            self._queue.popleft().succeed(number)
        else:
            self.calls[number] -= 1

    def _place(self) -> Process:
        free = [number for number, calls in enumerate(self.calls) if calls < self.ongoing]
        if not free:
            turn = self.env.event()
            self._queue.append(turn)
            return (yield turn)
        picked = [free[int(self.rng.integers(len(free)))] for _ in range(2)] if len(free) > 1 else free
        number = min(picked, key=self.calls.__getitem__)
        self.calls[number] += 1
        return number


class BatchingReplica:
    """Replica with a micro-batcher per key; batches of all keys are computed sequentially."""

    def __init__(
        self,
        env: simpy.Environment,
        compute: Compute,
        seconds: Seconds,
        meters: Meters,
        size: int = 1,
        wait_s: float = 0.0,
        *,
        after: Seconds | None = None,
        threads: int = 1,
    ) -> None:
        """``size``, ``wait_s``: largest batch, and seconds to collect one.

        ``after(key, 1)``: seconds of each call's post-processing in one of ``threads`` threads, concurrent with the next
        batch.
        """
        self.env, self.compute, self.seconds, self.meters = env, compute, seconds, meters
        self.size, self.wait_s, self.after = size, wait_s, after
        self._threads = simpy.Resource(env, threads)
        self._turn = simpy.Resource(env)
        self._queues: dict[Hashable, simpy.Store] = {}

    def take(self, call: Call) -> None:
        if call.key not in self._queues:
            self._queues[call.key] = simpy.Store(self.env)
            self.env.process(self._run(call.key))
        self._queues[call.key].put(call)

    def _run(self, key: Hashable) -> Process:
        queue = self._queues[key]
        while True:
            batch = [(yield queue.get())]
            deadline = self.env.timeout(self.wait_s if self.size > 1 else 0.0)
            while len(batch) < self.size:
                following = queue.get()
                yield following | deadline
                if not following.triggered:
                    following.cancel()
                    break
                batch.append(following.value)
            with self._turn.request() as turn:
                yield turn
                self.meters.busy.add(1)
                self.meters.served.add(len(batch))
                yield self.compute(self.seconds(key, len(batch)))
                self.meters.busy.add(-1)
                self.meters.served.add(-len(batch))
            for call in batch:
                if self.after is None:
                    call.done.succeed()
                else:
                    self.env.process(self._finish(call, self.after(key, 1)))

    def _finish(self, call: Call, seconds: float) -> Process:
        with self._threads.request() as thread:
            yield thread
            self.meters.served.add(1)
            yield self.compute(seconds)
            self.meters.served.add(-1)
        call.done.succeed()


class EngineReplica:
    """Generator replica: a table of slots, with steps over the smallest bucket that holds all occupied slots."""

    def __init__(
        self,
        env: simpy.Environment,
        compute: Compute,
        seconds: Callable[[int, int], float],
        meters: Meters,
        buckets: Sequence[int],
    ) -> None:
        """``seconds(rows, admitted)``: seconds of a step over ``rows`` slots, after admitting ``admitted`` images."""
        self.env, self.compute, self.seconds, self.meters = env, compute, seconds, meters
        self.buckets = sorted(buckets)
        self._waiting: deque[Call] = deque()
        self._wake: simpy.Event | None = None
        env.process(self._run())

    def take(self, call: Call) -> None:
        self._waiting.append(call)
        if self._wake is not None:
            self._wake.succeed()
            self._wake = None

    def _run(self) -> Process:
        left: dict[Call, int] = {}
        while True:
            if not left and not self._waiting:
                self._wake = self.env.event()
                yield self._wake
            admitted = 0
            while self._waiting and len(left) < self.buckets[-1]:
                call = self._waiting.popleft()
                left[call] = call.steps
                admitted += 1
            self.meters.served.add(admitted)
            rows = next(bucket for bucket in self.buckets if bucket >= len(left))
            self.meters.busy.add(1)
            yield self.compute(self.seconds(rows, admitted))
            self.meters.busy.add(-1)
            left = {call: steps - 1 for call, steps in left.items()}
            for call in [call for call, steps in left.items() if steps <= 0]:
                del left[call]
                self.meters.served.add(-1)
                call.done.succeed()
