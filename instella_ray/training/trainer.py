"""One rank's part of a run: models, optimizers and averages, and one step of them. Knows nothing of Ray."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from .. import storage
from ..accelerator import compute_dtype
from ..data.loading.loader import Data
from ..data.loading.order import BatchPlan
from ..models import rng
from ..models.checkpoint import Model, assemble
from .checkpoints import Checkpoint, Discriminator, read_checkpoint, save_checkpoint
from .distributed import fill, gather, ranks
from .learner import FSDPLearner, Learner, ZeroLearner
from .optim import EMA
from .settings import OptimizerConfig, TrainConfig

LEARNERS: dict[str, type[Learner]] = {"ddp": Learner, "zero2": ZeroLearner, "fsdp2": FSDPLearner}


class NonFiniteLoss(RuntimeError):
    """The loss became NaN or infinite; nothing of that step was saved."""


class Stepped(NamedTuple):
    """What a step was like on this rank."""

    means: dict[str, Tensor]
    """The loss and what else the step modules tell, over this rank's share of the batch."""
    rate: float
    norm: Tensor
    """Of the model's gradient, before it was limited."""
    flops: float


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


class TrainingTask(Protocol):
    """What a run trains."""

    data: Data
    """Read in a thread: ``batch`` gives one worker's share of a global batch, on the CPU."""
    model: Model
    step_module: nn.Module
    """``forward(**inputs) -> (loss, parts)``; wraps ``model``, so that gradients synchronise through it. A part that is
    no single number is for :meth:`summary`."""

    @property
    def discriminator(self) -> DiscriminatorTask | None:
        """Trained beside ``model``, in the same steps."""

    def micro_batches(self, batch: Any, size: int, seeds: Tensor) -> list[dict[str, Any]]:
        """Keyword arguments for the step module, cut into micro-batches.

        ``seeds`` int64 ``[B]``: what is random about a sample in this step is drawn from its own.
        """

    def begin(self, batch: Any) -> None:
        """Called once with the first batch, before the first step of a new run."""

    def before_step(self, step: int) -> None:
        """Called before every step (model in training mode)."""

    def flops(self, parts: list[dict[str, Any]]) -> float:
        """FLOP that these micro-batches ask for, forward and backward, with what is frozen and without recomputation."""

    def summary(self, step: int, means: dict[str, Tensor]) -> dict[str, Tensor]:
        """Single numbers to log of the parts' means over a global batch; called on every rank at logged steps."""

    def preview(self, ema_model: Model) -> Any:
        """An image, uint8 ``[H, W, 3]``, of what the averaged model can do, or None. Called at rank 0 alone."""

    def keys(self, batch: Any) -> list[str]:
        """The samples' keys, to name them when a loss is not finite."""

    def extra(self) -> Mapping[str, Any]:
        """Further sections of the checkpoint's config.yaml."""


BuildTask = Callable[[torch.device], TrainingTask]
"""Makes a run's task in each of its processes, from what that computes with."""


class Trainer:
    """Trains ``task`` on this rank. All ranks call each method together, at the same steps."""

    def __init__(self, task: TrainingTask, cfg: TrainConfig, device: torch.device, last: Path | None) -> None:
        """Goes on from the checkpoint in the folder ``last``, whatever number of ranks and sharding that was saved with;
        None in a new run.
        """
        self.task, self.cfg, self.device = task, cfg, device
        self.rank, world = ranks()
        self.plan = BatchPlan(len(task.data), cfg.global_batch, task.data.order, self.rank, world)
        self.positions = torch.from_numpy(self.plan.positions())
        self.size = cfg.micro_batch_size or cfg.global_batch // world
        saved = None if last is None else read_checkpoint(last)
        self.start = saved.step if saved else 0
        """Steps that the run has behind it."""
        task.model.train().to(device)
        if saved is not None:
            task.model.load_state_dict(saved.weights)
        else:
            torch.manual_seed(cfg.seed)
            task.begin(task.data.batch(0, self.plan.samples(0)))
        dtype = compute_dtype(device, cfg.precision)
        # One rank has nothing to share out.
        kind = LEARNERS[cfg.sharding] if world > 1 else Learner
        self.learner = kind(task.step_module, task.model, cfg.optimizer, device, dtype)
        self.learners = [self.learner]
        if (second := task.discriminator) is not None:
            self.learners.append(Learner(second.step_module, second.model, second.optimizer, device, dtype))
        self.ema = EMA(task.model, cfg.ema_decay)
        if saved is not None:
            fill(self.ema.state, saved.ema)
            self.learner.load_optimizer_state(saved.optimizer_state)
            for other in self.learners[1:]:
                assert saved.discriminator is not None
                fill(other.model.state_dict(), saved.discriminator.weights)
                other.load_optimizer_state(saved.discriminator.optimizer_state)

    def batch(self, step: int) -> Any:
        """This rank's share of the global batch of ``step``."""
        return self.task.data.batch(self.plan.place(step).epoch, self.plan.samples(step))

    def step(self, step: int, batch: Any) -> Stepped:
        """Forward, backward and update; :class:`NonFiniteLoss`, with the batch's keys in a file, where that cannot be."""
        task = self.task
        task.model.train()
        task.before_step(step)
        # The step's randomness is a function of (seed, step, place in the batch): a resumed run draws the same numbers.
        parts = task.micro_batches(batch, self.size, rng.sample_seeds(self.cfg.seed, step, self.positions))
        means: dict[str, Tensor] = {}
        for number, inputs in enumerate(parts, start=1):
            last = number == len(parts)
            found = self.learner.backward(inputs, len(parts), last)
            if task.discriminator is not None:
                facts = self.learners[1].backward(task.discriminator.inputs(), len(parts), last)
                found |= {name: value for name, value in facts.items() if name != "loss"}
            for name, value in found.items():
                means[name] = means.get(name, 0) + value.detach().float() / len(parts)
        if task.discriminator is not None:
            task.discriminator.after_backward()
        (norm, rate), *others = [learner.update(step, self.cfg.steps) for learner in self.learners]
        if not all(torch.isfinite(each) for each in (norm, *(other for other, _ in others))):
            path = storage.join(self.cfg.run_dir, f"nonfinite-step{step}-rank{self.rank}.json")
            storage.write_json(path, {"step": step, "keys": task.keys(batch)})
            raise NonFiniteLoss(f"step {step}: loss or gradient is not finite; the batch's keys are in {path}")
        self.ema.update(task.model, step)
        return Stepped(means, rate, norm, task.flops(parts))

    def preview(self) -> Any:
        """The task's image of the averaged weights, at rank 0."""
        shared = isinstance(self.learner, FSDPLearner)
        state = gather(self.ema.state) if shared else self.ema.state
        if self.rank != 0:
            return None
        return self.task.preview(assemble(self.task.model.cfg, state, "averaged weights").to(self.device))

    def save(self, folder: Path, step: int) -> None:
        """Rank 0 writes all that is needed to go on after ``step`` steps into ``folder``."""
        weights, ema = gather(self.task.model.state_dict()), gather(self.ema.state)
        optimizer_state, discriminator = self.learner.optimizer_state(), None
        for other in self.learners[1:]:
            discriminator = Discriminator(gather(other.model.state_dict()), other.optimizer_state())
        if self.rank == 0:
            checkpoint = Checkpoint(step, weights, ema, optimizer_state, discriminator)
            save_checkpoint(folder, self.task.model.cfg, checkpoint, self.task.extra())
