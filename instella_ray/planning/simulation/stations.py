"""The serving graph's deployments as simulated processes: replicas behind a handle, batches, the step engine.

They do what :mod:`...serving.batching`, :mod:`...serving.deployments`, :mod:`...engine.engine` and Serve's router do, in
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
"""Of one call for so many items of one key."""


@dataclass(eq=False)
class Call:
    """An image at a deployment."""

    done: simpy.Event
    key: Hashable = None
    """Only calls of one key share a batch."""
    steps: int = 0
    """Of the engine."""


class Replica(Protocol):
    """What a deployment has one or more of."""

    def take(self, call: Call) -> None:
        """Begin with a call; its ``done`` tells the end."""


@dataclass
class Meters:
    """A deployment's averages over time."""

    busy: Level
    """Replicas at work."""
    present: Level
    """Calls that came and have not been answered."""
    served: Level
    """Those of them that are being computed."""

    @classmethod
    def of(cls, env: simpy.Environment) -> Meters:
        return cls(Level(env), Level(env), Level(env))

    @property
    def waiting(self) -> float:
        """Mean number of calls that wait."""
        return self.present.mean - self.served.mean

    def restart(self) -> None:
        for level in (self.busy, self.present, self.served):
            level.restart()


class Deployment:
    """Replicas behind a handle: of two picked at random the one with fewer calls; a queue when all are full."""

    def __init__(
        self,
        env: simpy.Environment,
        replicas: Sequence[Replica],
        ongoing: int,
        meters: Meters,
        rng: np.random.Generator,
    ) -> None:
        """``ongoing``: calls that a replica holds at once."""
        self.env, self.replicas, self.ongoing, self.meters, self.rng = env, replicas, ongoing, meters, rng
        self.calls = [0] * len(replicas)
        self._queue: deque[simpy.Event] = deque()

    def call(self, key: Hashable = None, steps: int = 0) -> Process:
        """A call's way from the handle to its answer."""
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
    """A replica with a micro-batcher for each key; batches of all keys are computed one at a time."""

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
        """``after(key, 1)``: seconds that each call then takes in one of ``threads``, while the next batch is computed."""
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


class Steps:
    """A generator's replica: a table of slots, and passes over the smallest bucket that holds those that are taken."""

    def __init__(
        self,
        env: simpy.Environment,
        compute: Compute,
        seconds: Callable[[int, int], float],
        meters: Meters,
        buckets: Sequence[int],
    ) -> None:
        """``seconds(rows, admitted)`` of a step over so many slots, before which so many images were let in."""
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
