"""One of the models that a run trains, with its loss and its optimizers: the tokenizer or generator, a discriminator."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .optim import build_optimizers, rate_share
from .settings import OptimizerConfig
from .shards import broadcast, gather, part_of, ranks, whole


class Learner:
    """``step_module``'s forward is the loss of one micro-batch; what of ``model`` needs gradients learns from it.

    Here every rank has a whole copy of all, and gradients are averaged (DistributedDataParallel); subclasses share it out.
    With several ranks all of them call each method together.
    """

    def __init__(
        self,
        step_module: nn.Module,
        model: nn.Module,
        cfg: OptimizerConfig,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Ranks start from rank 0's weights. ``dtype`` is what is computed in; weights stay float32."""
        self.cfg, self.device, self.dtype, self.model = cfg, device, dtype, model.to(device)
        self.step_module = step_module.to(device)
        self._forward = self.step_module
        if ranks()[1] > 1:
            broadcast(model)
            self._forward = self._distributed()
        self.optimizers = build_optimizers(model, cfg)

    def _distributed(self) -> nn.Module:
        """The step module as it is called by one of several ranks."""
        devices = [self.device] if self.device.type == "cuda" else None
        return DistributedDataParallel(self.step_module, device_ids=devices)

    def backward(self, inputs: dict[str, Any], count: int, last: bool) -> dict[str, Tensor]:
        """Add the gradients of one of ``count`` micro-batches; returns its loss and facts.

        Ranks exchange gradients after the ``last`` one.
        """
        if isinstance(self._forward, DistributedDataParallel):
            self._forward.require_backward_grad_sync = last
        loss, facts = self._loss(inputs)
        (loss / count).backward()
        return {"loss": loss, **facts}

    def _loss(self, inputs: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        inputs = {name: _to(value, self.device) for name, value in inputs.items()}
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            loss, facts = self._forward(**inputs)
        return loss, facts

    def update(self, step: int, steps: int) -> tuple[Tensor, float]:
        """Change the weights at ``step`` of ``steps``; returns the gradient's norm before it was limited, and the rate."""
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.cfg.clip)
        share = rate_share(step, steps, self.cfg)
        self.optimizers.step(share)
        return whole(norm), share * self.cfg.lr

    def moments(self) -> dict[str, Tensor]:
        """The optimizers' state, whole, at rank 0, as ``{weight's name}/{moment's name}``."""
        found: dict[str, Tensor] = {}
        for name, parameter, state in self._states():
            found |= {f"{name}/{key}": value for key, value in state.get(parameter, {}).items()}
        return gather(found)

    def load_moments(self, moments: Mapping[str, Tensor]) -> None:
        """Take what :meth:`moments` has given, which every rank has read."""
        of: dict[str, dict[str, Tensor]] = {}
        for place, value in moments.items():
            name, _, key = place.rpartition("/")
            of.setdefault(name, {})[key] = value
        for name, parameter, state in self._states():
            # A step is one number, wherever the weight lies.
            state[parameter] = {
                key: part_of(value, parameter) if value.ndim else value.to(self.device)
                for key, value in of.get(name, {}).items()
            }

    def _states(self) -> list[tuple[str, Tensor, Any]]:
        """Each weight that learns: its name, itself, and the state of the optimizer that it belongs to."""
        names: dict[Tensor, str] = {parameter: name for name, parameter in self.model.named_parameters()}
        return [
            (names[parameter], parameter, member.state)
            for member in self.optimizers.members
            for group in member.param_groups
            for parameter in group["params"]
        ]


def _to(value: Any, device: torch.device) -> Any:
    return value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
