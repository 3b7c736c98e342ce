"""Configuration shared by all training runs: optimizer, workers, steps, batches and intervals."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, model_validator

from ..accelerator import Precision
from ..config import Config, OutputPath
from ..data.formats.patterns import Pattern
from .loggers import LoggerName


class OptimizerConfig(Config):
    """Optimizer and learning-rate schedule; the defaults are the paper's."""

    name: Literal["adamw", "muon"] = "adamw"
    """``muon``: Muon for the blocks' matrices, which needs fewer steps, and AdamW for the rest; not for sharded runs."""
    lr: float = Field(1e-4, gt=0)
    """Peak learning rate of AdamW."""
    matrix_lr: float = Field(0.02, gt=0)
    """Peak learning rate of Muon."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of the means of gradients and of their squares (AdamW). The paper and the release name none: PyTorch's are 0.9
    and 0.999."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled weight decay of AdamW and Muon, on weights of linear and convolutional layers alone."""
    warmup_steps: int = Field(1000, ge=0)
    """Steps of linear warm-up."""
    decay_fraction: float = Field(0.0, ge=0, le=1)
    """Final fraction of the run over which the learning rate decays linearly to nearly zero; 0 keeps it constant."""
    clip: float = Field(1.0, gt=0)
    """Maximum gradient norm."""


Sharding = Literal["ddp", "zero2", "fsdp2"]
"""Replicated (DDP); gradients and optimizer state sharded (DeepSpeed ZeRO-2); weights sharded as well (FSDP2)."""


class WorkersConfig(Config):
    """Number and resources of the training workers."""

    count: int = Field(1, ge=0)
    """Training workers (ranks) on Ray Train; 0 trains in the calling process, without Ray, so that debuggers work.

    With 0, losses, files and errors are identical to those of one worker."""
    min_count: int | None = Field(None, ge=1)
    """Minimum number of workers of an elastic run, which grows and shrinks with the cluster's resources: it uses the
    largest number up to ``count`` that divides the global batch into whole micro-batches. None: always ``count``."""
    cpus: float = Field(1.0, ge=0)
    """Logical CPUs reserved per worker, which are also its threads that decode images.

    The calling process (``count`` 0) reserves none, and decodes on all cores that it may use."""
    threads: int = Field(1, ge=1)
    """CPU compute threads per worker."""
    gpu: bool = False
    """One GPU per worker; the calling process (``count`` 0) uses the current GPU of this machine."""
    max_failures: int = Field(2, ge=0)
    """Maximum restarts from the last checkpoint after a worker failure; restarts after node preemption do not count. The
    calling process (``count`` 0) is never restarted."""

    @model_validator(mode="after")
    def _range_fits(self) -> WorkersConfig:
        if self.min_count is not None and self.count == 0:
            raise ValueError(f"min_count {self.min_count}: count 0 trains in the calling process, expected null")
        if self.min_count is not None and self.min_count > self.count:
            raise ValueError(f"min_count {self.min_count} is more than count {self.count}")
        return self

    @property
    def decoders(self) -> int:
        """Number of threads that decode images: a worker's CPUs rounded up, or those of the calling process."""
        return max(1, math.ceil(self.cpus)) if self.count else len(os.sched_getaffinity(0))

    @property
    def ranks(self) -> int:
        """Number of ranks that share a batch; 1 for the calling process."""
        return max(1, self.count)

    @property
    def least(self) -> int:
        """Minimum number of ranks of the run."""
        return self.min_count or self.ranks


class BestConfig(Config):
    """Criterion of the best checkpoint."""

    metric: str
    """Metric of metrics.jsonl; its last logged value before the checkpoint counts."""
    order: Literal["lower", "higher"]
    """Whether lower or higher values are better."""


HELD_OUT = "held_out_"
"""Prefix of the names of held-out metrics."""


class HeldOutConfig(Config):
    """Held-out samples, and how often their loss is computed."""

    samples: int = Field(512, ge=1)
    """Number of held-out samples."""
    data: Pattern | None = None
    """Folder of codes, or tars of a run on images, whose first samples are held out; none: the last samples of the training
    data, which are then not trained on."""
    every: int = Field(500, ge=1)
    """Steps between two evaluations, each with a line in metrics.jsonl; the last step is always evaluated."""


class TrainConfig(Config):
    """Settings of a training run: steps, batches and intervals. A run directory holds exactly one run."""

    run_dir: OutputPath
    """Output folder of config.yaml, report.html, metrics.jsonl, checkpoints/, previews/: on all nodes, or a URL (gs://..)."""
    resume: bool | Literal["auto"] = False
    """Resume an interrupted run in ``run_dir``; auto: if there is one, else start it.

    The settings of the optimizer, steps, seed, precision, placement and intervals may be changed, others may not."""
    seed: int = 0
    """Seed of the initial weights, the order of the samples and all random draws."""
    steps: int = Field(1000, ge=1)
    """Optimizer steps of the whole run. A resumed run may extend it; schedules that are fractions of it follow."""
    global_batch: int = Field(64, ge=1)
    """Samples per optimizer step = micro-batch x accumulation x workers."""
    micro_batch_size: int | None = Field(None, ge=1)
    """Samples per forward pass on one worker; none means its whole share of the global batch."""
    optimizer: OptimizerConfig = OptimizerConfig()
    ema_decay: float = Field(0.999, ge=0, lt=1)
    """Decay of the EMA of the weights, reached gradually."""
    precision: Precision = "auto"
    compile: bool = False
    """Compile the transformer blocks with torch.compile: faster steps after a minute or more of compiling in each process.
    Losses agree with those of uncompiled blocks to about three digits."""
    workers: WorkersConfig = WorkersConfig()
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """Whether a loss or gradient that is NaN or infinite stops the run, or its batch is skipped, on all workers.

    A skipped batch changes neither weights nor optimizer state; the schedules go on. ``skip`` makes the CPU wait for the
    GPU once a step."""
    max_skipped: int = Field(100, ge=1)
    """Maximum number of skipped batches of the whole run, with ``on_nonfinite`` skip; one more stops it."""
    sharding: Sharding = "ddp"
    """Distribution of weights, gradients and optimizer state over workers: ddp, zero2 or fsdp2. The sharded ones are for
    generators with AdamW only; a checkpoint can be resumed with any of them."""
    log_every: int = Field(20, ge=1)
    checkpoint_every: int = Field(500, ge=1)
    """Steps between two checkpoints, the most that a lost worker costs. Uploads run while training continues."""
    keep_checkpoints: int = Field(2, ge=1)
    """Number of latest checkpoints to keep."""
    keep_best: BestConfig | None = None
    """Also keep the best checkpoint by this criterion."""
    held_out: HeldOutConfig | None = None
    """Held-out loss, logged as held_out_loss (EMA weights) and held_out_loss_raw; none: it is not computed."""
    preview_every: int = Field(500, ge=1)
    loggers: tuple[LoggerName, ...] | None = None
    """Additional loggers of metrics and previews: tensorboard, wandb, mlflow, prometheus (gauges on Ray's metrics
    endpoint); none means TensorBoard if installed."""

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
            raise ValueError("loggers: prometheus needs Ray, which workers.count 0 does not use")
        return self

    def worker_counts(self) -> list[int]:
        """Return the possible worker counts, ascending: those that divide the global batch into whole micro-batches."""
        workers, unit = self.workers, self.micro_batch_size or 1
        counts = range(workers.least, workers.ranks + 1)
        return [count for count in counts if self.global_batch % (count * unit) == 0]


class TrainingRun(Config):
    """Base configuration of a training run; each kind of run adds its own settings."""

    train: TrainConfig


SCHEDULE = {"lr", "matrix_lr", "betas", "weight_decay", "warmup_steps", "decay_fraction", "clip"}
"""All settings of an optimizer but its name, on which its state depends."""
MAY_CHANGE: dict[str, Any] = {
    "train": {
        **dict.fromkeys(("run_dir", "resume", "micro_batch_size", "compile", "workers", "sharding"), True),
        **dict.fromkeys(("log_every", "checkpoint_every", "keep_checkpoints", "keep_best"), True),
        **dict.fromkeys(
            ("preview_every", "loggers", "steps", "seed", "precision", "on_nonfinite", "max_skipped"), True
        ),
        "optimizer": SCHEDULE,
        "held_out": {"every"},
    },
    "adversarial": {"optimizer": SCHEDULE},
    "gradient_checkpointing": True,
    "preview": True,
    "validation": True,
    "collapse_limit": True,
}
"""Settings that a resumed run may change: those of placement, speed, logging, retention and optimization.

Those of the model, the data and the loss, which would make it another run, may not."""
UNNAMED = {"train": {"run_dir", "resume"}}
"""Settings that :func:`changes` leaves out: how the attempt was started, not how it trains."""


def first_difference(old: TrainingRun, new: TrainingRun) -> tuple[str, Any, Any] | None:
    """Return the dotted key, old value and new value of the first setting that differs and may not be changed."""
    return next(((key, *values) for key, values in _differences(old, new, MAY_CHANGE).items()), None)


def changes(old: TrainingRun, new: TrainingRun) -> dict[str, tuple[Any, Any]]:
    """Return old and new values of all settings that differ, by dotted key."""
    return _differences(old, new, UNNAMED)


def _differences(old: TrainingRun, new: TrainingRun, exclude: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    before, after = (_flat(run.model_dump(mode="json", exclude=exclude)) for run in (old, new))
    keys = dict.fromkeys([*before, *after])
    return {key: (before.get(key), after.get(key)) for key in keys if before.get(key) != after.get(key)}


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat
