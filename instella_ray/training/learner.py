"""One of the models that a run trains, with its loss and its optimizers: the tokenizer or generator, a discriminator."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .optim import build_optimizers, rate_share
from .settings import OptimizerConfig


class Learner:
    """``step_module``'s forward is the loss of one micro-batch; what of ``model`` needs gradients learns from it."""

    def __init__(self, step_module: nn.Module, model: nn.Module, cfg: OptimizerConfig, device: torch.device) -> None:
        self.cfg, self.device, self.model = cfg, device, model.to(device)
        self.step_module = step_module.to(device)
        self.optimizers = build_optimizers(model, cfg)
        self._forward = self.step_module

    def distribute(self) -> None:
        """Average gradients over the ranks from now on; they start from rank 0's weights."""
        devices = [self.device] if self.device.type == "cuda" else None
        self._forward = DistributedDataParallel(self.step_module, device_ids=devices)

    def backward(self, inputs: dict[str, Any], count: int, last: bool, dtype: torch.dtype) -> dict[str, Tensor]:
        """Add the gradients of one of ``count`` micro-batches, computed in ``dtype``; returns its loss and facts.

        Ranks exchange gradients after the ``last`` one.
        """
        inputs = {name: _to(value, self.device) for name, value in inputs.items()}
        if isinstance(self._forward, DistributedDataParallel):
            self._forward.require_backward_grad_sync = last
        with torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32):
            loss, facts = self._forward(**inputs)
        (loss / count).backward()
        return {"loss": loss, **facts}

    def clip(self) -> Tensor:
        """Limit the gradient's norm; returns what it was."""
        return nn.utils.clip_grad_norm_(self.model.parameters(), self.cfg.clip)

    def step(self, step: int, steps: int) -> float:
        """Update the weights at ``step`` of ``steps``; returns the learning rate."""
        share = rate_share(step, steps, self.cfg)
        self.optimizers.step(share)
        return share * self.cfg.lr


def _to(value: Any, device: torch.device) -> Any:
    return value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
