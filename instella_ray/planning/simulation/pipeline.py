"""The data jobs as discrete events: storage, CPU workers, GPU encoders in a line, with bounded buffers between them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import simpy
from pydantic import Field

from ...config import Config
from .clock import Compute, Level, Processors, Variation
from .serving import Machine
from .stage_time import StageTime
from .stations import Process

STORAGE, CPUS, ENCODERS = "storage", "CPU workers", "encoders"
ROUNDS = 8
"""Blocks that the largest stage's workers see each, in a simulated window."""


@dataclass(frozen=True)
class LineStage:
    """Workers that do the same with every block."""

    name: str
    workers: int
    block_s: float
    """Seconds that a worker takes for a block."""

    @property
    def capacity(self) -> float:
        """Blocks a second when nothing is in the way."""
        return self.workers / self.block_s if self.block_s else float("inf")


@dataclass(frozen=True)
class LineOutcome:
    """What comes out of a line in its steady state."""

    blocks_per_s: float
    utilisation: dict[str, float]
    """By stage: mean share of its workers at work."""

    @property
    def bottleneck(self) -> str:
        """The busiest stage: it is what all others wait for."""
        return max(self.utilisation, key=lambda name: self.utilisation[name])


def simulate_line(
    stages: Sequence[LineStage],
    *,
    blocks: int | None = None,
    buffer: int = 2,
    variation: float = 0.0,
    machine: Machine | None = None,
    seed: int = 0,
) -> LineOutcome:
    """Send ``blocks`` through ``stages``; the first and the last quarter of them, fill and drain, do not count.

    ``buffer``: blocks a worker of the next stage that may wait between two. ``machine``: cores that all workers share.
    """
    env = simpy.Environment()
    blocks = blocks or ROUNDS * max(stage.workers for stage in stages) + 200
    vary = Variation(variation, np.random.default_rng(seed))
    compute: Compute = Processors(env, machine.cores, machine.together) if machine else env.timeout
    source = simpy.Store(env)
    source.items.extend(range(blocks))
    queues = [source, *(simpy.Store(env, max(1, buffer * stage.workers)) for stage in stages[1:]), simpy.Store(env)]
    levels = {stage.name: Level(env) for stage in stages}

    def worker(stage: LineStage, taken: simpy.Store, given: simpy.Store) -> Process:
        while True:
            block = yield taken.get()
            levels[stage.name].add(1)
            yield compute(vary(stage.block_s))
            levels[stage.name].add(-1)
            yield given.put(block)

    for stage, taken, given in zip(stages, queues, queues[1:], strict=False):
        for _ in range(stage.workers):
            env.process(worker(stage, taken, given))

    def count(until: int) -> None:
        while len(queues[-1].items) < until:
            env.step()

    count(blocks // 4)
    for level in levels.values():
        level.restart()
    first, began = len(queues[-1].items), env.now
    count(blocks - blocks // 4)
    passed = env.now - began
    shares = {stage.name: levels[stage.name].mean / stage.workers for stage in stages}
    return LineOutcome((len(queues[-1].items) - first) / passed, shares)


class StorageConfig(Config):
    """Where images are read from."""

    bytes_per_s: float = Field(gt=0)
    """All readers together."""
    stream_bytes_per_s: float = Field(gt=0)
    """One reader; it holds its CPU while it reads."""
    source: str


class DataJobs(Config):
    """Curation on CPUs, then encoding: decoding on CPUs, the tokenizer on GPUs."""

    images: int = Field(600_000_000, ge=1)
    image_bytes: int = Field(150_000, ge=1)
    block: int = Field(256, ge=1)
    """Images that are handed on together."""
    storage: StorageConfig
    curate: StageTime
    """An image on one CPU: read, judged, written."""
    curate_cpus: int = Field(256, ge=1)
    """Of the CPU pool, where curation runs."""
    decode: StageTime
    """An image on one CPU, down to the square that the tokenizer reads."""
    cpus_per_gpu: float = Field(11.0, gt=0)
    """On GPU nodes, for decoding."""
    encode: StageTime
    """Images of a batch on one GPU."""
    encode_batch: int = Field(64, ge=1)
    variation: float = Field(0.2, ge=0)
    """Coefficient of variation of a block's time."""

    def curation(self) -> list[LineStage]:
        """What curation is a line of."""
        return [self._reading(), self._cpus(self.curate_cpus, self.curate)]

    def encoding(self, gpus: int, cpus: int | None = None) -> list[LineStage]:
        """What encoding is a line of, on ``gpus`` with so many CPU workers."""
        each = self.encode.of(self.encode_batch) / self.encode_batch
        workers = cpus or max(1, round(gpus * self.cpus_per_gpu))
        return [self._reading(), self._cpus(workers, self.decode), LineStage(ENCODERS, gpus, self.block * each)]

    def images_per_s(self, outcome: LineOutcome) -> float:
        return outcome.blocks_per_s * self.block

    def _reading(self) -> LineStage:
        return LineStage(STORAGE, 1, self.block * self.image_bytes / self.storage.bytes_per_s)

    def _cpus(self, workers: int, time: StageTime) -> LineStage:
        reading = self.image_bytes / self.storage.stream_bytes_per_s
        return LineStage(CPUS, workers, self.block * (time.of(1) + reading))
