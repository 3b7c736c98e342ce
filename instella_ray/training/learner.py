"""One of the models that a run trains, with its loss and its optimizers: the tokenizer or generator, a discriminator.

Every rank has a whole copy (DDP), or with ZeRO-2 (DeepSpeed) a share of the gradients and of the optimizer's state, or with
FSDP2 a share of the weights too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.nn.parallel import DistributedDataParallel

from ..packages import extra_import
from .distributed import broadcast, gather, part_of, ranks, whole
from .optim import build_optimizers, lr_scale
from .settings import OptimizerConfig


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
        share = lr_scale(step, steps, self.cfg)
        self.optimizers.step(share)
        return whole(norm), share * self.cfg.lr

    def optimizer_state(self) -> dict[str, Tensor]:
        """The optimizers' state, whole, at rank 0, as ``{weight's name}/{name of the state}``."""
        found: dict[str, Tensor] = {}
        for name, parameter, state in self._states():
            found |= {f"{name}/{key}": value for key, value in state.get(parameter, {}).items()}
        return gather(found)

    def load_optimizer_state(self, optimizer_state: Mapping[str, Tensor]) -> None:
        """Take what :meth:`optimizer_state` has given, which every rank has read."""
        of: dict[str, dict[str, Tensor]] = {}
        for place, value in optimizer_state.items():
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


ADAM_STATE = ("exp_avg", "exp_avg_sq")
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
        rate = lr_scale(step, steps, self.cfg) * self.cfg.lr
        for group in self._zero.param_groups:
            group["lr"] = rate
        self._engine.step()
        return torch.as_tensor(self._engine.get_global_grad_norm()), rate

    def optimizer_state(self) -> dict[str, Tensor]:
        from deepspeed.utils import safe_get_full_optimizer_state

        steps = self._zero.optimizer.state[self._flat[0]]["step"]
        found: dict[str, Tensor] = {}
        for name, parameter in self._learning():
            found |= gather({f"{name}/{key}": safe_get_full_optimizer_state(parameter, key) for key in ADAM_STATE})
            found |= gather({f"{name}/step": steps.clone()})
        return found

    def load_optimizer_state(self, optimizer_state: Mapping[str, Tensor]) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state

        steps = next(value for name, value in optimizer_state.items() if name.endswith("/step"))
        for flat in self._flat:
            # As the optimizer makes them in its first step, which has not been yet.
            empty = {key: torch.zeros_like(flat) for key in ADAM_STATE}
            self._zero.optimizer.state[flat] = {"step": steps.to(flat.device), **empty}
        self._zero._lazy_init_hp_params_optimizer_state()
        for name, parameter in self._learning():
            for key in ADAM_STATE:
                safe_set_full_optimizer_state(parameter, optimizer_state[f"{name}/{key}"].to(self.device), key)

    def _learning(self) -> Iterator[tuple[str, nn.Parameter]]:
        return ((name, p) for name, p in self.model.named_parameters() if p.requires_grad)


class FSDPLearner(Learner):
    """A generator whose blocks are gathered one by one, forward and backward, in the dtype that is computed in."""

    def _distributed(self) -> nn.Module:
        # Autocast decides what is computed in float32: times are inputs too, and would lose digits.
        policy = MixedPrecisionPolicy(self.dtype, torch.float32, cast_forward_inputs=False)
        for blocks in [module for module in self.model.modules() if isinstance(module, nn.ModuleList)]:
            for block in blocks:
                fully_shard(block, mp_policy=policy)
                register_fsdp_forward_method(block, "text_kv")
        fully_shard(self.step_module, mp_policy=policy)
        return self.step_module
