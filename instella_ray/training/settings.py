"""Configuration that every training run shares."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, model_validator

from ..accelerator import Precision
from ..config import Config
from .loggers import LoggerName


class OptimizerConfig(Config):
    """AdamW with warm-up; the defaults are the paper's."""

    name: Literal["adamw", "muon"] = "adamw"
    """``muon``: the blocks' matrices learn by Muon, which needs fewer steps, all else by AdamW. Not for sharded runs."""
    lr: float = Field(1e-4, gt=0)
    """Peak learning rate of AdamW."""
    matrix_lr: float = Field(0.02, gt=0)
    """Peak learning rate of Muon."""
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.0
    warmup_steps: int = Field(1000, ge=0)
    """Steps of linear warm-up."""
    decay_fraction: float = Field(0.0, ge=0, le=1)
    """Last share of the run over which the rate falls linearly to nearly zero; 0 keeps it constant."""
    clip: float = Field(1.0, gt=0)
    """Largest gradient norm."""


Sharding = Literal["ddp", "zero2", "fsdp2"]
"""Whole copies on every worker; gradients and optimizer shared out (DeepSpeed ZeRO-2); weights as well (FSDP2)."""


class WorkersConfig(Config):
    """How the run is spread."""

    count: int = Field(1, ge=0)
    """Training workers (ranks) on Ray Train; 0 trains in the calling process, without Ray, where debuggers stop.

    Losses, files and errors are those of one worker, to the last digit."""
    min_count: int | None = Field(None, ge=1)
    """Go on with so few where the cluster has no room for ``count``, and with more again once it has: with the largest
    number that the global batch is a multiple of, in whole micro-batches. None: always ``count``."""
    cpus: float = Field(1.0, ge=0)
    """Logical CPUs a worker reserves; the calling process (``count`` 0) reserves none."""
    threads: int = Field(1, ge=1)
    """Threads a worker computes with on the CPU."""
    gpu: bool = False
    """One GPU a worker; the calling process (``count`` 0) takes this machine's."""
    max_failures: int = Field(2, ge=0)
    """Restarts from the last checkpoint after a worker is lost; those after a node was preempted do not count. The calling
    process (``count`` 0) is never restarted."""

    @model_validator(mode="after")
    def _range_fits(self) -> WorkersConfig:
        if self.min_count is not None and self.count == 0:
            raise ValueError(f"min_count {self.min_count}: the calling process (count 0) is one, expected null")
        if self.min_count is not None and self.min_count > self.count:
            raise ValueError(f"min_count {self.min_count} is more than count {self.count}")
        return self

    @property
    def ranks(self) -> int:
        """Processes that share a batch, the calling one among them."""
        return max(1, self.count)

    @property
    def least(self) -> int:
        """The fewest ranks that the run goes on with."""
        return self.min_count or self.ranks


class BestConfig(Config):
    """How the best checkpoint is told."""

    metric: str
    """A figure of metrics.jsonl, as logged last before the checkpoint."""
    order: Literal["lower", "higher"]
    """Which of two figures is better."""


class TrainConfig(Config):
    """Steps, batches, intervals. A run directory belongs to one run; going on with it is asked for."""

    run_dir: str
    """Receives config.yaml, metrics.jsonl, checkpoints/ and previews/: a folder that all nodes share, or a URL (gs://..)."""
    resume: bool = False
    """Go on with an interrupted run in ``run_dir``, under the settings that it began with."""
    seed: int = 0
    steps: int = Field(1000, ge=1)
    """Optimizer steps of the whole run. A resumed run cannot change them: rates and temperatures depend on them."""
    global_batch: int = Field(64, ge=1)
    """Samples a step = micro-batch x accumulation x workers."""
    micro_batch_size: int | None = Field(None, ge=1)
    """Samples a forward pass on one worker; none means its whole share of the global batch."""
    optimizer: OptimizerConfig = OptimizerConfig()
    ema_decay: float = Field(0.999, ge=0, lt=1)
    """Decay of the weights' moving average, reached gradually."""
    precision: Precision = "auto"
    workers: WorkersConfig = WorkersConfig()
    sharding: Sharding = "ddp"
    """How weights, gradients and optimizer are spread over the workers: ddp, zero2 or fsdp2. Of generators only, with AdamW;
    a checkpoint of one can be resumed with another."""
    log_every: int = Field(20, ge=1)
    checkpoint_every: int = Field(500, ge=1)
    """Steps between two checkpoints: what a lost worker may cost. They are uploaded while training goes on."""
    keep_checkpoints: int = Field(2, ge=1)
    """So many of the last checkpoints are kept."""
    keep_best: BestConfig | None = None
    """Keep the best one as well."""
    preview_every: int = Field(500, ge=1)
    loggers: tuple[LoggerName, ...] | None = None
    """Where figures and previews go beside metrics.jsonl: tensorboard, wandb, mlflow, prometheus (gauges of
    Ray's endpoint); none means TensorBoard if installed."""

    @model_validator(mode="after")
    def _batch_fits(self) -> TrainConfig:
        for count in {self.workers.least, self.workers.ranks}:
            share, rest = divmod(self.global_batch, count)
            if rest:
                raise ValueError(f"global_batch {self.global_batch} is not a multiple of {count} workers")
            if self.micro_batch_size is not None and share % self.micro_batch_size:
                raise ValueError(
                    f"a worker's share of {share} is not a multiple of micro_batch_size {self.micro_batch_size}"
                )
        if self.sharding != "ddp" and self.optimizer.name != "adamw":
            raise ValueError(f"sharding {self.sharding}: {self.optimizer.name} needs whole matrices, expected adamw")
        if self.workers.count == 0 and "prometheus" in (self.loggers or ()):
            raise ValueError("loggers: prometheus needs Ray, which workers.count 0 does without")
        return self

    def worker_counts(self) -> list[int]:
        """The numbers of workers that the run may have, ascending: those that a global batch can be shared by."""
        workers, unit = self.workers, self.micro_batch_size or 1
        counts = range(workers.least, workers.ranks + 1)
        return [count for count in counts if self.global_batch % (count * unit) == 0]


class TrainingRun(Config):
    """All that a run is made of; each kind of run adds its own."""

    train: TrainConfig


MAY_CHANGE: dict[str, Any] = {
    "train": {
        *("run_dir", "resume", "micro_batch_size", "workers", "sharding"),
        *("log_every", "checkpoint_every", "keep_checkpoints", "keep_best", "preview_every", "loggers"),
    },
    "gradient_checkpointing": True,
    "preview": True,
    "validation": True,
    "collapse_limit": True,
}
"""What a resumed run may set anew: where and how fast it is computed, and what is kept and shown of it."""


def first_difference(old: TrainingRun, new: TrainingRun) -> tuple[str, Any, Any] | None:
    """Dotted key, old and new value of the first setting that differs and decides what is learned."""
    before, after = (_flat(run.model_dump(mode="json", exclude=MAY_CHANGE)) for run in (old, new))
    keys = dict.fromkeys([*before, *after])
    return next(((key, before.get(key), after.get(key)) for key in keys if before.get(key) != after.get(key)), None)


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat
