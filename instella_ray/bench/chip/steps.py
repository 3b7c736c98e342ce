"""Training steps of the benchmark: measured with the project's trainer, one row for each setting."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import closing
from itertools import pairwise
from typing import NamedTuple

import torch

from ...accelerator import compute_dtype
from ...data.loading.loader import Prefetcher
from ...flops import DeviceWork
from ...planning.plan import PlanOptions, plan_run
from ...rendering import Goal
from ...training.generator import GeneratorRunConfig
from ...training.memory import states
from ...training.settings import TrainConfig, WorkersConfig
from ...training.tokenizer import TokenizerConfig
from ...training.trainer import Trainer, TrainingTask
from ..measure import Spread
from ..training_tasks import now
from .rows import Bench, ChipRow

WARMUP = 2
"""Steps before the measured ones: the first allocate the optimizer's state and choose kernels."""


RATE_GOALS = {"NVIDIA H200": 350.0, "AMD Instinct MI300X": 250.0}
"""Images per second of a compiled diffusion generator on a chip, by its label in :mod:`...flops`."""


class TrainingSteps(NamedTuple):
    """Measured training steps of one setting."""

    seconds: Spread
    flop: float
    """Model FLOP of a step."""
    parameters: int
    """Number of trained weights."""


def train_config(bench: Bench, micro_batch: int, *, compiled: bool = False) -> TrainConfig:
    """Return the settings of a run in this process, with one micro-batch a step."""
    cfg = bench.cfg
    return TrainConfig(
        run_dir=str(bench.folder / "run"),
        steps=WARMUP + cfg.training_steps,
        global_batch=micro_batch,
        micro_batch_size=micro_batch,
        compile=compiled,
        workers=WorkersConfig(count=0, threads=cfg.threads, gpu=bench.device.type == "cuda"),
    )


def timed_steps(bench: Bench, steps: Iterable[float], parameters: int) -> TrainingSteps:
    """Time the iteration of ``steps``, each of which yields its FLOP, after :data:`WARMUP` of them."""
    times, flop = [now(bench.device)], [0.0]
    for each in steps:
        flop.append(each)
        times.append(now(bench.device))
    seconds = [end - start for start, end in pairwise(times)]
    return TrainingSteps(Spread.of(seconds[WARMUP:]), flop[-1], parameters)


def trained(bench: Bench, task: TrainingTask, train: TrainConfig) -> TrainingSteps:
    """Train ``task`` with the trainer and the prefetching of all runs, without metrics, checkpoints and previews."""
    trainer = Trainer(task, train, bench.device, None)
    parameters = sum(p.numel() for p in task.model.parameters() if p.requires_grad)
    with closing(Prefetcher(trainer.batch, 0, train.steps)) as batches:
        steps = (trainer.step(step, batch).flops for step, batch in enumerate(batches))
        return timed_steps(bench, steps, parameters)


class TrainingSweep:
    """Rows of one network's training steps."""

    def __init__(self, bench: Bench, *, smallest_first: bool = False) -> None:
        """``smallest_first``: the seconds of the first row are taken for those of the launches alone."""
        self.bench, self.smallest_first = bench, smallest_first
        self.launches: float | None = None

    def row(
        self,
        what: str,
        run: GeneratorRunConfig | TokenizerConfig,
        measure: Callable[[], TrainingSteps],
        *,
        note: str = "",
        aims: bool = False,
    ) -> None:
        """Add a row of ``measure``, with the memory planned for ``run``; one that lacks memory says so.

        One that ``aims`` has the goal of :data:`RATE_GOALS`.
        """
        bench = self.bench
        tokens = bench.cfg.text_length if isinstance(run, GeneratorRunConfig) else None
        forecast = plan_run(run, PlanOptions(text_tokens=tokens)).memory_total
        bench.fresh()
        try:
            seconds, flop, parameters = measure()
        except torch.OutOfMemoryError:
            bench.emit(ChipRow(what, forecast_gb=forecast / 1e9, note="out of memory"))
            return
        if self.smallest_first:
            self.launches = self.launches or seconds.median
        held = states(parameters, "ddp", 1, bf16=compute_dtype(bench.device) == torch.bfloat16)
        # Weights, gradients, optimizer state and EMA are read and written once.
        work = DeviceWork(flop, 2 * (held.weights + held.gradients + held.optimizer + held.ema))
        count = run.train.global_batch
        least = RATE_GOALS.get(bench.chip.label) if aims and bench.chip else None
        goal = Goal(f"{what}, images/s", count / seconds.median, least, ">=") if least else None
        bench.add(what, seconds, work, images=count, launches=self.launches, forecast=forecast, note=note, goal=goal)
