"""The training loop that runs on every worker. What is trained is a :class:`Task`; how is the same for all."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import ray.train
import ray.train.torch
import torch
from torch import Tensor, nn

from .. import storage
from ..accelerator import compute_dtype
from ..data.loader import Data, Prefetcher
from ..data.order import BatchPlan
from ..models.checkpoint import Model
from .attempts import Attempt
from .checkpoint import restore_checkpoint, restore_discriminator, save_checkpoint, save_discriminator
from .learner import Learner
from .metrics_log import MetricsLog
from .optim import EMA
from .preemption import PreemptionNotice
from .reporting import Checkpoints
from .settings import OptimizerConfig, TrainConfig


class DiscriminatorTask(Protocol):
    """A second model that learns in turn with a task's, from what that has made of the same micro-batch."""

    @property
    def model(self) -> nn.Module:
        """What learns; a checkpoint keeps all of its state."""

    @property
    def step_module(self) -> nn.Module:
        """``forward(**inputs) -> (loss, parts)``; wraps ``model``."""

    @property
    def optimizer(self) -> OptimizerConfig:
        """How it learns."""

    def inputs(self) -> dict[str, Any]:
        """Keyword arguments for the step module, from the micro-batch that the task's has just computed."""

    def after_backward(self) -> None:
        """Called once a step on every rank, when both models have their gradients."""


class Task(Protocol):
    """What a run trains: data, a model, and a module whose forward is the loss of one micro-batch."""

    data: Data
    """Read in a thread: ``batch`` gives one worker's share of a global batch, on the CPU."""
    model: Model
    step_module: nn.Module
    """``forward(**inputs) -> (loss, parts)``; wraps ``model``, so that gradients synchronise through it. A part that is
    no single number is for :meth:`summary`."""

    @property
    def discriminator(self) -> DiscriminatorTask | None:
        """Trained beside ``model``, in the same steps."""

    def micro_batches(self, batch: Any, size: int, generator: torch.Generator) -> list[dict[str, Any]]:
        """Keyword arguments for the step module, cut into micro-batches; draws the step's noise."""

    def begin(self, batch: Any) -> None:
        """Called once with the first batch, before the first step of a new run."""

    def before_step(self, step: int) -> None:
        """Called before every step (model in training mode)."""

    def flops(self, parts: list[dict[str, Any]]) -> float:
        """FLOP that these micro-batches ask for, forward and backward, with what is frozen and without recomputation."""

    def summary(self, step: int, means: dict[str, Tensor]) -> dict[str, Tensor]:
        """Single numbers to log of the parts' means over a global batch; called on every rank at logged steps."""

    def preview(self, ema_model: Model) -> Any:
        """A picture, uint8 ``[H, W, 3]``, of what the model can do, or None."""

    def keys(self, batch: Any) -> list[str]:
        """The samples' keys, to name them when a loss is not finite."""

    def extra(self) -> Mapping[str, Any]:
        """Further sections of the checkpoint's config.yaml."""


class NonFiniteLoss(RuntimeError):
    """The loss became NaN or infinite; nothing of that step was saved."""


def train_worker(task: Task, cfg: TrainConfig, attempt: Attempt) -> bool:
    """Run ``task`` to ``cfg.steps`` on this rank, from the run's last checkpoint where there is one.

    Returns False where it stopped before, with a checkpoint, because a node is about to be taken away.
    """
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    device = ray.train.torch.get_device()
    torch.set_num_threads(cfg.workers.threads)
    plan = BatchPlan(len(task.data), cfg.global_batch, task.data.order, rank, world)
    learner = Learner(task.step_module, task.model, cfg.optimizer, device)
    model, ema = task.model.train(), EMA(task.model, cfg.ema_decay)
    learners = [learner]
    if task.discriminator is not None:
        rival = task.discriminator
        learners.append(Learner(rival.step_module, rival.model, rival.optimizer, device))
    start, checkpoints = 0, Checkpoints(cfg, attempt, rank)
    with checkpoints.last() as folder:
        if folder is not None:
            start = restore_checkpoint(folder, model, ema, learner.optimizers)["step"]
            for other in learners[1:]:
                restore_discriminator(folder, other.model, other.optimizers)
    if folder is None:
        torch.manual_seed(cfg.seed)
        task.begin(task.data.batch(0, plan.samples(0)))
        ema = EMA(model, cfg.ema_decay)
    if world > 1:
        for each in learners:
            each.distribute()
    size = cfg.micro_batch_size or cfg.global_batch // world
    dtype = compute_dtype(device, cfg.precision)
    log = MetricsLog(cfg, attempt, rank, task.summary, start, device)
    batches = Prefetcher(lambda step: task.data.batch(plan.place(step).epoch, plan.samples(step)), start, cfg.steps)
    notice, leaving = PreemptionNotice(start), False
    waited = time.perf_counter()
    for step, batch in enumerate(batches, start):
        data_wait = time.perf_counter() - waited
        # The step's randomness is a function of (seed, step, rank): a resumed run draws the same numbers.
        noise = _step_seed(cfg.seed, step, rank)
        torch.manual_seed(noise)
        model.train()
        task.before_step(step)
        parts = task.micro_batches(batch, size, torch.Generator().manual_seed(noise))
        totals: dict[str, Tensor] = {}
        for number, inputs in enumerate(parts, start=1):
            last = number == len(parts)
            found = learner.backward(inputs, len(parts), last, dtype)
            if task.discriminator is not None:
                facts = learners[1].backward(task.discriminator.inputs(), len(parts), last, dtype)
                found |= {name: value for name, value in facts.items() if name != "loss"}
            for name, value in found.items():
                totals[name] = totals.get(name, 0) + value.detach().float() / len(parts)
        if task.discriminator is not None:
            task.discriminator.after_backward()
        norms = [each.clip() for each in learners]
        if not all(torch.isfinite(norm) for norm in norms):
            path = storage.join(cfg.run_dir, f"nonfinite-step{step}-rank{rank}.json")
            storage.write_json(path, {"step": step, "keys": task.keys(batch)})
            raise NonFiniteLoss(f"step {step}: loss or gradient is not finite; the batch's keys are in {path}")
        rate, *_ = [each.step(step, cfg.steps) for each in learners]
        ema.update(model, step)
        log.step(step, totals, rate, norms[0], data_wait, task.flops(parts))
        done = step + 1
        final = done == cfg.steps
        if rank == 0 and (final or done % cfg.preview_every == 0):
            log.preview(done, _preview(task, model, ema))
        leaving = not final and notice.given(done)
        if final or leaving or done % cfg.checkpoint_every == 0:
            log.sync()
            checkpoints.save(done, log.last, partial(_save, task, learners, ema, done, rank))
        if leaving:
            break
        waited = time.perf_counter()
    log.close()
    checkpoints.finish()
    return not leaving


def _step_seed(seed: int, step: int, rank: int) -> int:
    return ((seed * 1_000_003 + step) * 1009 + rank) % (2**63)


def _preview(task: Task, model: Model, ema: EMA) -> Any:
    """The task's preview with averaged weights in place of the current ones, which are put back."""
    current = {name: value.detach().clone() for name, value in model.state_dict().items()}
    model.load_state_dict(ema.state)
    model.eval()
    try:
        return task.preview(model)
    finally:
        model.load_state_dict(current)
        model.train()


def _save(task: Task, learners: Sequence[Learner], ema: EMA, step: int, rank: int, folder: Path) -> None:
    """Rank 0 writes all that :func:`train_worker` needs to go on after ``step`` steps."""
    if rank == 0:
        for other in learners[1:]:
            save_discriminator(folder, other.model, other.optimizers)
        save_checkpoint(folder, task.model, ema, learners[0].optimizers, {"step": step}, task.extra())
