"""What can be trained: data, a model, and a module whose forward is the loss. How it is trained is the same for all."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..data.loading.loader import Data
from ..models.checkpoint import Model
from .settings import OptimizerConfig


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
        """A picture, uint8 ``[H, W, 3]``, of what the averaged model can do, or None. Called at rank 0 alone."""

    def keys(self, batch: Any) -> list[str]:
        """The samples' keys, to name them when a loss is not finite."""

    def extra(self) -> Mapping[str, Any]:
        """Further sections of the checkpoint's config.yaml."""


BuildTask = Callable[[torch.device], Task]
"""Makes a run's task in each of its processes, from what that computes with."""
