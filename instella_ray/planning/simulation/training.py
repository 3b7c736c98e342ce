"""Discrete-event simulation of a training run: prefetched batches, stragglers, network, checkpoints and node failures."""

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
"""Share of the backward pass in a training step's FLOP."""


class ClusterConditions(Config):
    """Network, storage, straggling and failure rates of a cluster."""

    gpus_per_node: int = Field(8, ge=1)
    network_bytes_per_s: float = Field(50e9, gt=0)
    """Peak send bandwidth of a GPU."""
    hop_s: float = Field(10e-6, ge=0)
    """Latency from one GPU to the next in the ring."""
    straggling: float = Field(0.02, ge=0)
    """Standard deviation of the logarithm of a worker's step time."""
    storage_bytes_per_s: float = Field(gt=0)
    """Total read bandwidth of all workers."""
    disk_bytes_per_s: float = Field(gt=0)
    """Bandwidth of writing a checkpoint, which blocks training."""
    upload_bytes_per_s: float = Field(gt=0)
    """Bandwidth of uploading a checkpoint, concurrent with training."""
    node_mtbf_days: float = Field(gt=0)
    """Mean time between failures of a node."""
    restart_s: float = Field(ge=0)
    """Seconds from a failure to the first step after it."""
    source: str
    """Source of these figures."""


@dataclass(frozen=True)
class Run:
    """Figures of a run that determine its duration; :func:`..plan.plan_run` provides them."""

    gpus: int
    steps: int
    step_s: float
    """Seconds of computing a step, without stragglers."""
    sends_after: float
    """Share of a step's backward passes that communication overlaps with: that of the last micro-batch if gradients are
    reduced once per step (DDP), 1 if gradients or weights are sharded."""
    sent_bytes: float
    """Bytes that a GPU sends per step."""
    batch_bytes: float
    """Bytes that all workers read per step."""
    batch_s: float
    """Seconds to load a worker's share of a batch, in its loader thread."""
    checkpoint_bytes: float
    checkpoint_every: int
    """Steps between checkpoints."""
    prefetch: int = 4
    """Number of prefetched batches (:class:`...data.loading.loader.Prefetcher`)."""


@dataclass(frozen=True)
class TrainingOutcome:
    """Simulated duration of a run and its breakdown."""

    seconds: float
    shares: dict[str, float]
    """Share of the run's time by activity."""
    failures: int
    """Number of node failures."""

    @property
    def busy(self) -> float:
        """Share of time spent on computing that was not lost to failures."""
        return self.shares[COMPUTE]

    @property
    def bottleneck(self) -> str:
        """Largest activity other than computing if it exceeds a tenth of computing, else computing."""
        worst = max((name for name in self.shares if name != COMPUTE), key=lambda name: self.shares[name])
        return worst if self.shares[worst] > self.busy / 10 else COMPUTE


def simulate_training(run: Run, cluster: ClusterConditions, seed: int = 0) -> TrainingOutcome:
    """Simulate all steps of ``run``, including those repeated after failures."""
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
    """Time since the last checkpoint, and between the last uploaded checkpoint and that one: a failure loses both."""
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
                # One upload at a time: a checkpoint waits for the previous upload.
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
    """Loader thread with prefetching."""

    def __init__(self, seconds: float, depth: int, now: float = 0.0) -> None:
        self.seconds = seconds
        self._ready: deque[float] = deque()
        for _ in range(depth):
            self._ready.append((self._ready[-1] if self._ready else now) + seconds)

    def take(self, now: float) -> float:
        """Take the next batch and return the seconds waited for it; its slot is then free for prefetching."""
        waited = max(0.0, self._ready.popleft() - now)
        last = self._ready[-1] if self._ready else now + waited
        self._ready.append(max(last, now + waited) + self.seconds)
        return waited


def _slowest(rng: np.random.Generator, gpus: int, sigma: float, count: int) -> list[float]:
    """Draw for ``count`` steps the maximum of ``gpus`` lognormal step times (median 1), at least 1."""
    # The maximum of N draws is the quantile at u^(1/N): one draw per step for any number of GPUs.
    factors: list[float] = np.exp(sigma * np.maximum(0.0, ndtri(rng.random(count) ** (1 / gpus)))).tolist()
    return factors


def _move(since: dict[str, float], spent: dict[str, float]) -> None:
    for name, value in since.items():
        spent[name] += value
        since[name] = 0.0
