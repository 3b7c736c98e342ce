"""DeepSpeed ZeRO-2: every rank has the weights, and a share of the gradients and of the optimizer's state."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..packages import extra_import
from .learner import Learner
from .optim import rate_share
from .settings import OptimizerConfig
from .shards import gather

MOMENTS = ("exp_avg", "exp_avg_sq")
BUCKET = 100_000_000
"""Weights whose gradients are reduced, or which are gathered, at once: larger buckets take memory, smaller ones time."""


def require_deepspeed() -> Any:
    """The package; UserError where it is not installed."""
    return extra_import("deepspeed", "train.sharding zero2", "deepspeed")


class ZeroLearner(Learner):
    """A generator whose gradients are reduced to their owners after each micro-batch, and whose weights those hand out."""

    def __init__(
        self,
        step_module: nn.Module,
        model: nn.Module,
        cfg: OptimizerConfig,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(step_module, model, cfg, device, dtype)
        (adamw,) = self.optimizers.members
        deepspeed = require_deepspeed()
        if device.type == "cpu":
            # Or it would compile a faster reduction between processes of one machine, for half a minute.
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        self._engine, *_ = deepspeed.initialize(
            model=step_module, optimizer=adamw, config=self._settings(), dist_init_required=False
        )
        self._forward = self._engine
        self._zero = self._engine.optimizer
        self._flat: list[Tensor] = self._zero.single_partition_of_fp32_groups
        """What this rank owns of each group of weights, one after another and cut where they may."""

    def _distributed(self) -> nn.Module:
        return self.step_module

    def _settings(self) -> dict[str, Any]:
        return {
            "train_micro_batch_size_per_gpu": 1,  # its own count of samples, which nothing reads
            "zero_optimization": {
                "stage": 2,
                "overlap_comm": self.device.type == "cuda",
                "reduce_bucket_size": BUCKET,
                "allgather_bucket_size": BUCKET,
            },
            "zero_allow_untested_optimizer": True,
            "gradient_clipping": self.cfg.clip,
            # Gradients are reduced in float32, as the weights are: no module is named that may do with less.
            "torch_autocast": {
                "enabled": self.dtype != torch.float32,
                "dtype": "bfloat16",
                "lower_precision_safe_modules": [],
            },
        }

    def backward(self, inputs: dict[str, Any], count: int, last: bool) -> dict[str, Tensor]:
        self._engine.set_gradient_accumulation_boundary(last)
        loss, facts = self._loss(inputs)
        self._engine.backward(loss / count, scale_wrt_gas=False)
        return {"loss": loss, **facts}

    def update(self, step: int, steps: int) -> tuple[Tensor, float]:
        rate = rate_share(step, steps, self.cfg) * self.cfg.lr
        for group in self._zero.param_groups:
            group["lr"] = rate
        self._engine.step()
        return torch.as_tensor(self._engine.get_global_grad_norm()), rate

    def moments(self) -> dict[str, Tensor]:
        from deepspeed.utils import safe_get_full_optimizer_state

        steps = self._zero.optimizer.state[self._flat[0]]["step"]
        found: dict[str, Tensor] = {}
        for name, parameter in self._learning():
            found |= gather({f"{name}/{key}": safe_get_full_optimizer_state(parameter, key) for key in MOMENTS})
            found |= gather({f"{name}/step": steps.clone()})
        return found

    def load_moments(self, moments: Mapping[str, Tensor]) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state

        steps = next(value for name, value in moments.items() if name.endswith("/step"))
        for flat in self._flat:
            # As the optimizer makes them in its first step, which has not been yet.
            empty = {key: torch.zeros_like(flat) for key in MOMENTS}
            self._zero.optimizer.state[flat] = {"step": steps.to(flat.device), **empty}
        self._zero._lazy_init_hp_params_optimizer_state()
        for name, parameter in self._learning():
            for key in MOMENTS:
                safe_set_full_optimizer_state(parameter, moments[f"{name}/{key}"].to(self.device), key)

    def _learning(self) -> Iterator[tuple[str, nn.Parameter]]:
        return ((name, p) for name, p in self.model.named_parameters() if p.requires_grad)
