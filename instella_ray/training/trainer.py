"""Trainer of one rank: models, optimizers, EMA and the training step, and the task interface. Independent of Ray."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from ..accelerator import compute_dtype
from ..data.loading.loader import Data
from ..data.loading.order import BatchPlan
from ..models import rng
from ..models.checkpoint import Model, assemble
from .checkpoints import Checkpoint, Discriminator, read_checkpoint, save_checkpoint
from .distributed import fill, gather, ranks
from .held_out import HeldOutSet, held_out_metrics
from .learner import FSDPLearner, Learner, ZeroLearner, compile_blocks
from .nonfinite import FiniteCheck
from .optim import EMA
from .previews import AVERAGED, ORIGINALS, RAW, PreviewInputs, TrainingPreview
from .settings import OptimizerConfig, TrainConfig

LEARNERS: dict[str, type[Learner]] = {"ddp": Learner, "zero2": ZeroLearner, "fsdp2": FSDPLearner}


class Stepped(NamedTuple):
    """Results of a training step on this rank."""

    means: dict[str, Tensor]
    """Loss and further parts of the step modules, means over this rank's share of the batch; empty if it was skipped."""
    rate: float
    """Learning rate."""
    norm: Tensor
    """Norm of the model's gradient before clipping."""
    flops: float
    """Model FLOP of this rank."""
    skipped: int
    """Batches that the run has skipped so far, because their loss or gradient was not finite."""


class DiscriminatorTask(Protocol):
    """A second model trained alternately with a task's model, on its outputs for the same micro-batch."""

    @property
    def model(self) -> nn.Module:
        """Trained module; a checkpoint contains its whole state."""

    @property
    def step_module(self) -> nn.Module:
        """``forward(**inputs) -> (loss, parts)``; wraps ``model``."""

    @property
    def optimizer(self) -> OptimizerConfig:
        """Optimizer settings of ``model``."""

    def inputs(self) -> dict[str, Any]:
        """Return keyword arguments for the step module, from the task's latest micro-batch."""

    def after_backward(self) -> None:
        """Hook called once per step on every rank, after both models' backward passes."""


class TrainingTask(Protocol):
    """Model, data and loss of a training run."""

    model: Model
    step_module: nn.Module
    """``forward(**inputs) -> (loss, parts)``; wraps ``model``, so that gradients are synchronized through it. Parts that
    are not scalars are reduced by :meth:`summary`."""

    @property
    def data(self) -> Data:
        """Training data."""

    @property
    def discriminator(self) -> DiscriminatorTask | None:
        """Discriminator trained in the same steps as ``model``, or None."""

    @property
    def held_out(self) -> HeldOutSet | None:
        """Held-out samples, or None."""

    def batch(self, step: int, epoch: int, samples: np.ndarray) -> Any:
        """Load one rank's share of the global batch of ``step`` on the CPU; called in a thread, so without PyTorch.

        ``samples`` int64 ``[B]`` count from ``epoch``, as :meth:`..data.loading.order.BatchPlan.samples` returns them.
        """

    def micro_batches(self, batch: Any, size: int, seeds: Tensor) -> list[dict[str, Any]]:
        """Split a batch into micro-batches of ``size`` samples; returns keyword arguments for the step module.

        ``seeds`` int64 ``[B]``: seeds of each sample's random numbers in this step.
        """

    def begin(self, batch: Any) -> None:
        """Hook called once with the first batch, before the first step of a new run."""

    def before_step(self, step: int) -> None:
        """Hook called before every step, with the model in training mode."""

    def flops(self, parts: list[dict[str, Any]]) -> float:
        """Return the FLOP of these micro-batches: forward, backward and frozen networks, without recomputation."""

    def summary(self, step: int, means: dict[str, Tensor]) -> dict[str, Tensor]:
        """Reduce the parts' means over a global batch to scalars to log; called on every rank at logged steps."""

    def preview_inputs(self) -> PreviewInputs:
        """Return what previews are made from, without labels if there are none; called on rank 0 only."""

    def preview(self, model: Model, inputs: PreviewInputs) -> np.ndarray:
        """Return the images that ``model`` makes from ``inputs``, uint8 ``[N, H, W, 3]``; called on rank 0 only."""

    def keys(self, batch: Any) -> list[str]:
        """Return the keys of the samples, reported for a loss that is not finite."""

    def extra(self) -> Mapping[str, Any]:
        """Return further sections of the checkpoint's config.yaml."""

    def saved(self) -> None:
        """Hook called on every rank after a checkpoint, to forget what a run that is resumed from it does not have."""

    def close(self) -> None:
        """Hook called once on every rank after the last step of this process."""


BuildTask = Callable[[torch.device], TrainingTask]
"""Builds the task in each process of a run, from its device."""


class Trainer:
    """Training of ``task`` on this rank. All methods are collective: all ranks call them together, at the same steps."""

    def __init__(self, task: TrainingTask, cfg: TrainConfig, device: torch.device, last: Path | None) -> None:
        """Start from the checkpoint folder ``last``, saved with any number of ranks and any sharding; None: a new run."""
        self.task, self.cfg, self.device = task, cfg, device
        self.rank, world = ranks()
        self.plan = BatchPlan(len(task.data), cfg.global_batch, task.data.order, self.rank, world)
        self.positions = torch.from_numpy(self.plan.positions())
        self.size = cfg.micro_batch_size or cfg.global_batch // world
        saved = None if last is None else read_checkpoint(last)
        self.start = saved.step if saved else 0
        """Number of steps completed before this process started."""
        task.model.train().to(device)
        if saved is not None:
            task.model.load_state_dict(saved.weights)
        else:
            torch.manual_seed(cfg.seed)
            task.begin(task.data.batch(0, self.plan.samples(0)))
        if cfg.compile:
            compile_blocks(task.model)
        dtype = compute_dtype(device, cfg.precision)
        # A single rank needs no sharding.
        kind = LEARNERS[cfg.sharding] if world > 1 else Learner
        self.learner = kind(task.step_module, task.model, cfg.optimizer, device, dtype)
        self.learners = [self.learner]
        if (second := task.discriminator) is not None:
            self.learners.append(Learner(second.step_module, second.model, second.optimizer, device, dtype))
        self.ema = EMA(task.model, cfg.ema_decay)
        self.finite = FiniteCheck(cfg, device, saved.skipped if saved else 0)
        if saved is not None:
            fill(self.ema.state, saved.ema)
            self.learner.load_optimizer_state(saved.optimizer_state)
            for other in self.learners[1:]:
                assert saved.discriminator is not None
                fill(other.model.state_dict(), saved.discriminator.weights)
                other.load_optimizer_state(saved.discriminator.optimizer_state)

    def batch(self, step: int) -> Any:
        """Load this rank's share of the global batch of ``step``."""
        return self.task.batch(step, self.plan.place(step).epoch, self.plan.samples(step))

    def step(self, step: int, batch: Any) -> Stepped:
        """Run forward, backward and update, or skip a batch whose loss or gradient is not finite (``on_nonfinite``).

        A skipped batch changes no weight, statistic or optimizer state; the schedules go on. Raises
        :class:`.nonfinite.NonFiniteLoss` if the run is to stop instead.
        """
        task = self.task
        task.model.train()
        task.before_step(step)
        # Statistics of the batch, which the forward pass updates.
        buffers = (
            [buffer for learner in self.learners for buffer in learner.model.buffers()] if self.finite.skips else []
        )
        before = [buffer.clone() for buffer in buffers]
        # Random numbers are a function of (seed, step, position in the batch): a resumed run draws the same ones.
        parts = task.micro_batches(batch, self.size, rng.sample_seeds(self.cfg.seed, step, self.positions))
        means: dict[str, Tensor] = {}
        losses: list[Tensor] = []
        for number, inputs in enumerate(parts, start=1):
            last = number == len(parts)
            found = self.learner.backward(inputs, len(parts), last)
            losses.append(found["loss"])
            if task.discriminator is not None:
                facts = self.learners[1].backward(task.discriminator.inputs(), len(parts), last)
                losses.append(facts["loss"])
                found |= {name: value for name, value in facts.items() if name != "loss"}
            for name, value in found.items():
                means[name] = means.get(name, 0) + value.detach().float() / len(parts)
        if task.discriminator is not None:
            task.discriminator.after_backward()
        norms = [learner.clip() for learner in self.learners]
        if self.finite.passed(step, [*losses, *norms], task.keys(batch)):
            for learner in self.learners:
                learner.apply(step, self.cfg.steps)
            self.ema.update(task.model, step)
        else:
            means = {}
            for learner in self.learners:
                learner.discard()
            for buffer, value in zip(buffers, before, strict=True):
                buffer.copy_(value)
        return Stepped(means, self.learner.rate(step, self.cfg.steps), norms[0], task.flops(parts), self.finite.skipped)

    def held_out(self) -> dict[str, float]:
        """Return the metrics of the task's held-out samples, the same on all ranks; empty if it has none."""
        self.finite.check()
        held_out = self.task.held_out
        return {} if held_out is None else held_out_metrics(held_out, self.learner, self.ema, self.size)

    def preview(self) -> TrainingPreview | None:
        """Return the task's previews of the EMA and the raw weights on rank 0; None on other ranks and without any."""
        self.finite.check()
        shared, rows = isinstance(self.learner, FSDPLearner), {}
        inputs = self.task.preview_inputs() if self.rank == 0 else PreviewInputs(())
        for name, state in ((AVERAGED, self.ema.state), (RAW, self.task.model.state_dict())):
            whole = gather(state) if shared else state
            if inputs.labels:
                model = assemble(self.task.model.cfg, whole, name).to(self.device)
                rows[name] = self.task.preview(model, inputs)
        if inputs.originals is not None:
            rows = {ORIGINALS: inputs.originals, **rows}
        return TrainingPreview(rows, inputs.labels) if rows else None

    def save(self, folder: Path, step: int) -> None:
        """Gather the training state after ``step`` steps and write it to ``folder`` on rank 0."""
        self.finite.check()
        weights, ema = gather(self.task.model.state_dict()), gather(self.ema.state)
        optimizer_state, discriminator = self.learner.optimizer_state(), None
        for other in self.learners[1:]:
            discriminator = Discriminator(gather(other.model.state_dict()), other.optimizer_state())
        if self.rank == 0:
            checkpoint = Checkpoint(step, weights, ema, optimizer_state, discriminator, self.finite.skipped)
            save_checkpoint(folder, self.task.model.cfg, checkpoint, self.task.extra())
        self.task.saved()
