"""A training run as discrete events: batches made ahead, steps that wait for the slowest worker and for the network,
checkpoints and their uploads, nodes that fail."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass

import numpy as np
from pydantic import Field
from scipy.special import ndtri

from ...config import Config

COMPUTE, DATA, STRAGGLERS, NETWORK, CHECKPOINTS, FAILURES = (
    "computing",
    "waiting for data",
    "waiting for the slowest",
    "network",
    "checkpoints",
    "failures",
)
BACKWARD = 2 / 3
"""Of a training step's arithmetic."""


class ClusterConditions(Config):
    """What a run meets on its machines."""

    gpus_per_node: int = Field(8, ge=1)
    network_bytes_per_s: float = Field(50e9, gt=0)
    """A GPU sends, at best."""
    hop_s: float = Field(10e-6, ge=0)
    """From one GPU to the next in the ring."""
    straggling: float = Field(0.02, ge=0)
    """Standard deviation of the logarithm of a worker's step time."""
    storage_bytes_per_s: float = Field(gt=0)
    """All workers read at most."""
    disk_bytes_per_s: float = Field(gt=0)
    """A checkpoint is written with, while training waits."""
    upload_bytes_per_s: float = Field(gt=0)
    """A checkpoint is uploaded with, while training goes on."""
    node_mtbf_days: float = Field(gt=0)
    """Mean time until a node fails."""
    restart_s: float = Field(ge=0)
    """From a failure to the first step after it."""
    source: str
    """Where these numbers come from."""


@dataclass(frozen=True)
class Run:
    """What of a run's configuration decides its time; :func:`..plan.plan_run` knows these figures."""

    gpus: int
    steps: int
    step_s: float
    """Computing a step, when all GPUs are equally fast."""
    sends_after: float
    """Share of a step's backward passes behind which sending hides: the last micro-batch's of copies that are reduced once a
    step (DDP), all of a run whose gradients or weights are sharded."""
    sent_bytes: float
    """A GPU sends each step."""
    batch_bytes: float
    """All workers read each step."""
    batch_s: float
    """Making a worker's share of a batch, in its loader thread."""
    checkpoint_bytes: float
    checkpoint_every: int
    prefetch: int = 4
    """Batches made ahead (:class:`..data.loader.Prefetcher`)."""


@dataclass(frozen=True)
class TrainingOutcome:
    """Where a run's time goes."""

    seconds: float
    shares: dict[str, float]
    """Of the run's time; computing is what its GPUs are there for."""
    failures: int

    @property
    def busy(self) -> float:
        """Share of the GPUs' time in which they compute what counts."""
        return self.shares[COMPUTE]

    @property
    def bottleneck(self) -> str:
        """What takes most time beside computing, where that is more than a tenth of computing; else computing."""
        worst = max((name for name in self.shares if name != COMPUTE), key=lambda name: self.shares[name])
        return worst if self.shares[worst] > self.busy / 10 else COMPUTE


def simulate_training(run: Run, cluster: ClusterConditions, seed: int = 0) -> TrainingOutcome:
    """All of ``run``'s steps, those that failures cost once more."""
    rng = np.random.default_rng(seed)
    spent = dict.fromkeys((COMPUTE, DATA, STRAGGLERS, NETWORK, CHECKPOINTS, FAILURES), 0.0)
    load_s = max(run.batch_s, run.batch_bytes / cluster.storage_bytes_per_s)
    sending = run.sent_bytes / cluster.network_bytes_per_s + 2 * (run.gpus - 1) * cluster.hop_s
    uploading = run.checkpoint_bytes / cluster.upload_bytes_per_s
    writing = run.checkpoint_bytes / cluster.disk_bytes_per_s
    mtbf_s = cluster.node_mtbf_days * 86400 / math.ceil(run.gpus / cluster.gpus_per_node)
    now, step, safe, failures = 0.0, 0, 0, 0
    upload_end, uploaded = 0.0, 0
    next_failure = rng.exponential(mtbf_s)
    loader = _Loader(load_s, run.prefetch)
    since, pending = dict(spent), dict(spent)
    """Time since the last checkpoint, and before that since the last one that is uploaded: a failure makes it worthless."""
    while step < run.steps:
        for factor in _slowest(rng, run.gpus, cluster.straggling, min(4096, run.steps - step)):
            waited = loader.take(now)
            exposed = max(0.0, sending - run.step_s * factor * BACKWARD * run.sends_after)
            now += waited + run.step_s * factor + exposed
            step += 1
            since[COMPUTE] += run.step_s
            since[STRAGGLERS] += run.step_s * (factor - 1)
            since[DATA] += waited
            since[NETWORK] += exposed
            if step % run.checkpoint_every == 0:
                # One upload at a time: the next checkpoint waits for the one before.
                pause = max(writing, upload_end - now)
                now, since[CHECKPOINTS] = now + pause, since[CHECKPOINTS] + pause
                _move(pending, spent)
                _move(since, pending)
                safe, uploaded, upload_end = uploaded, step, now + uploading
            if uploaded > safe and upload_end <= now:
                _move(pending, spent)
                safe = uploaded
            if now >= next_failure:
                failures += 1
                spent[FAILURES] += sum(since.values()) + sum(pending.values()) + cluster.restart_s
                since, pending = dict.fromkeys(since, 0.0), dict.fromkeys(since, 0.0)
                now, step, uploaded = now + cluster.restart_s, safe, safe
                next_failure = now + rng.exponential(mtbf_s)
                loader = _Loader(load_s, run.prefetch, now)
                break
    _move(pending, spent)
    _move(since, spent)
    return TrainingOutcome(now, {name: value / now for name, value in spent.items()}, failures)


class _Loader:
    """The thread that makes batches, a few ahead."""

    def __init__(self, seconds: float, depth: int, now: float = 0.0) -> None:
        self.seconds = seconds
        self._ready: deque[float] = deque()
        for _ in range(depth):
            self._ready.append((self._ready[-1] if self._ready else now) + seconds)

    def take(self, now: float) -> float:
        """Seconds until the next batch is there; a place is free for another from then on."""
        waited = max(0.0, self._ready.popleft() - now)
        last = self._ready[-1] if self._ready else now + waited
        self._ready.append(max(last, now + waited) + self.seconds)
        return waited


def _slowest(rng: np.random.Generator, gpus: int, sigma: float, count: int) -> list[float]:
    """Factors by which the slowest of ``gpus`` lognormal step times (median 1) exceeds a typical one, ``count`` steps."""
    # The largest of N is the quantile u^(1/N): one draw a step, however many GPUs.
    factors: list[float] = np.exp(sigma * np.maximum(0.0, ndtri(rng.random(count) ** (1 / gpus)))).tolist()
    return factors


def _move(since: dict[str, float], spent: dict[str, float]) -> None:
    for name, value in since.items():
        spent[name] += value
        since[name] = 0.0
