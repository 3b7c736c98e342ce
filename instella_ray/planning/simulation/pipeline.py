"""Discrete-event simulation of the data jobs: storage, CPU workers and GPU encoders in a pipeline with bounded buffers."""

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
"""Blocks per worker of the largest stage in a simulated window."""


@dataclass(frozen=True)
class LineStage:
    """Pipeline stage of identical workers."""

    name: str
    workers: int
    block_s: float
    """Seconds per block and worker."""

    @property
    def capacity(self) -> float:
        """Blocks per second if never blocked or starved."""
        return self.workers / self.block_s if self.block_s else float("inf")


@dataclass(frozen=True)
class LineOutcome:
    """Steady-state throughput and utilisation of a pipeline."""

    blocks_per_s: float
    utilisation: dict[str, float]
    """Mean share of busy workers by stage."""

    @property
    def bottleneck(self) -> str:
        """Stage with the highest utilisation."""
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
    """Simulate ``blocks`` passing through ``stages``; the first and last quarter (fill and drain) are not counted.

    ``buffer``: capacity of the queue between two stages, in blocks per worker of the next stage. ``machine``: cores that
    all workers share; None gives each worker its own core.
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
    """Storage from which images are read."""

    bytes_per_s: float = Field(gt=0)
    """Total throughput of all readers."""
    stream_bytes_per_s: float = Field(gt=0)
    """Throughput of one reader, which occupies its CPU while it reads."""
    source: str
    """Source of these figures."""


class DataJobs(Config):
    """Curation on CPUs, and encoding with decoding on CPUs and the tokenizer on GPUs."""

    images: int = Field(600_000_000, ge=1)
    image_bytes: int = Field(150_000, ge=1)
    block: int = Field(256, ge=1)
    """Images per block, the unit passed between stages."""
    storage: StorageConfig
    curate: StageTime
    """Time to read, filter and write an image on one CPU."""
    curate_cpus: int = Field(256, ge=1)
    """CPUs of the pool that runs curation."""
    decode: StageTime
    """Time to decode an image on one CPU to the tokenizer's input size."""
    cpus_per_gpu: float = Field(11.0, gt=0)
    """CPUs per GPU on GPU nodes, for decoding."""
    encode: StageTime
    """Time to encode a batch of images on one GPU."""
    encode_batch: int = Field(64, ge=1)
    variation: float = Field(0.2, ge=0)
    """Coefficient of variation of a block's time."""

    def curation(self) -> list[LineStage]:
        """Return the stages of curation."""
        return [self._reading(), self._cpus(self.curate_cpus, self.curate)]

    def encoding(self, gpus: int, cpus: int | None = None) -> list[LineStage]:
        """Return the stages of encoding on ``gpus`` GPUs with ``cpus`` CPU workers (None: ``cpus_per_gpu`` per GPU)."""
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
