"""One rank's part of a run: models, optimizers and averages, and one step of them. Knows nothing of Ray."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import storage
from ..accelerator import compute_dtype
from ..data.loading.order import BatchPlan
from ..models import rng
from ..models.checkpoint import assemble
from .checkpoint import Checkpoint, Discriminator, read_checkpoint, save_checkpoint
from .fsdp import FSDPLearner
from .learner import Learner
from .optim import EMA
from .settings import TrainConfig
from .shards import fill, gather, ranks
from .task import Task
from .zero import ZeroLearner

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


class Trainer:
    """Trains ``task`` on this rank. All ranks call each method together, at the same steps."""

    def __init__(self, task: Task, cfg: TrainConfig, device: torch.device, last: Path | None) -> None:
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
        if (rival := task.discriminator) is not None:
            self.learners.append(Learner(rival.step_module, rival.model, rival.optimizer, device, dtype))
        self.ema = EMA(task.model, cfg.ema_decay)
        if saved is not None:
            fill(self.ema.state, saved.average)
            self.learner.load_moments(saved.moments)
            for other in self.learners[1:]:
                assert saved.discriminator is not None
                fill(other.model.state_dict(), saved.discriminator.weights)
                other.load_moments(saved.discriminator.moments)

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
        """The task's picture of the averaged weights, at rank 0."""
        shared = isinstance(self.learner, FSDPLearner)
        state = gather(self.ema.state) if shared else self.ema.state
        if self.rank != 0:
            return None
        return self.task.preview(assemble(self.task.model.cfg, state, "averaged weights").to(self.device))

    def save(self, folder: Path, step: int) -> None:
        """Rank 0 writes all that is needed to go on after ``step`` steps into ``folder``."""
        weights, average = gather(self.task.model.state_dict()), gather(self.ema.state)
        moments, rival = self.learner.moments(), None
        for other in self.learners[1:]:
            rival = Discriminator(gather(other.model.state_dict()), other.moments())
        if self.rank == 0:
            checkpoint = Checkpoint(step, weights, average, moments, rival)
            save_checkpoint(folder, self.task.model.cfg, checkpoint, self.task.extra())
