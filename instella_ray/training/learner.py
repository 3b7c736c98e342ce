"""Distributed optimization of one model: DDP, ZeRO-2 (DeepSpeed) and FSDP2.

DDP replicates everything on every rank, ZeRO-2 shards gradients and optimizer state, FSDP2 shards the weights as well.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.nn.parallel import DistributedDataParallel

from ..accelerator import upload
from ..models.bit_layers import BITBlock
from ..models.generator import GeneratorBlock
from ..models.layers import TimestepEmbedding
from ..packages import extra_import
from .distributed import broadcast, gather, part_of, ranks, whole
from .optim import build_optimizers, lr_scale
from .settings import OptimizerConfig


class Learner:
    """Optimization of the parameters of ``model`` that require gradients.

    ``step_module``'s forward computes the loss of one micro-batch. This class replicates all state on every rank and
    averages gradients (DistributedDataParallel); subclasses shard it. All methods are collective.
    """

    shards_one_rank: ClassVar[bool] = False
    """Whether the step module is wrapped even if there is a single rank."""

    def __init__(
        self,
        step_module: nn.Module,
        model: nn.Module,
        cfg: OptimizerConfig,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Broadcast rank 0's weights and build the optimizers. ``dtype`` is the compute dtype; weights stay float32."""
        self.cfg, self.device, self.dtype, self.model = cfg, device, dtype, model.to(device)
        self.step_module = step_module.to(device)
        self._forward = self.step_module
        if ranks()[1] > 1 or self.shards_one_rank:
            broadcast(model)
            self._forward = self._distributed()
        self.optimizers = build_optimizers(model, cfg, dtype)

    def _distributed(self) -> nn.Module:
        """Return the step module wrapped for several ranks."""
        devices = [self.device] if self.device.type == "cuda" else None
        return DistributedDataParallel(self.step_module, device_ids=devices)

    def backward(self, inputs: dict[str, Any], count: int, last: bool) -> dict[str, Tensor]:
        """Accumulate the gradients of one of ``count`` micro-batches; returns its loss and further parts.

        Ranks synchronize gradients after the ``last`` one.
        """
        if isinstance(self._forward, DistributedDataParallel):
            self._forward.require_backward_grad_sync = last
        loss, facts = self._loss(self._forward, inputs)
        (loss / count).backward()
        return {"loss": loss, **facts}

    def _loss(self, module: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        inputs = {name: _to(value, self.device) for name, value in inputs.items()}
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            loss, facts = module(**inputs)
        return loss, facts

    @torch.no_grad()
    def evaluate(self, module: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of one batch and its parts, without gradients, by a ``module`` that shares the weights."""
        return self._loss(module, inputs)

    def update(self, step: int, steps: int) -> tuple[Tensor, float]:
        """Update the weights at ``step`` of ``steps``; returns the gradient norm before clipping and the learning rate."""
        norm = self.clip()
        self.apply(step, steps)
        return norm, self.rate(step, steps)

    def clip(self) -> Tensor:
        """Clip the gradients and return their norm before, a scalar that is the same on all ranks."""
        return whole(nn.utils.clip_grad_norm_(self.model.parameters(), self.cfg.clip))

    def apply(self, step: int, steps: int) -> None:
        """Update the weights by the clipped gradients, and clear these."""
        self.optimizers.step(lr_scale(step, steps, self.cfg))

    def discard(self) -> None:
        """Clear the gradients without an update."""
        self.model.zero_grad(set_to_none=True)

    def rate(self, step: int, steps: int) -> float:
        """Return the learning rate at ``step`` of ``steps``."""
        return lr_scale(step, steps, self.cfg) * self.cfg.lr

    def optimizer_state(self) -> dict[str, Tensor]:
        """Return the unsharded optimizer state on rank 0, with keys ``{parameter name}/{state name}``."""
        found: dict[str, Tensor] = {}
        for name, parameter, state in self._states():
            found |= {f"{name}/{key}": value for key, value in state.get(parameter, {}).items()}
        return gather(found)

    def load_optimizer_state(self, optimizer_state: Mapping[str, Tensor]) -> None:
        """Load the result of :meth:`optimizer_state`, given on every rank."""
        of: dict[str, dict[str, Tensor]] = {}
        for place, value in optimizer_state.items():
            name, _, key = place.rpartition("/")
            of.setdefault(name, {})[key] = value
        for name, parameter, state in self._states():
            # The step is a scalar, which is not sharded with the parameter.
            state[parameter] = {
                key: part_of(value, parameter) if value.ndim else value.to(self.device)
                for key, value in of.get(name, {}).items()
            }

    def _states(self) -> list[tuple[str, Tensor, Any]]:
        """Return each optimized parameter's name, the parameter, and the state of its optimizer."""
        names: dict[Tensor, str] = {parameter: name for name, parameter in self.model.named_parameters()}
        return [
            (names[parameter], parameter, member.state)
            for member in self.optimizers.members
            for group in member.param_groups
            for parameter in group["params"]
        ]


def compile_blocks(model: nn.Module) -> None:
    """Compile each transformer block of ``model`` in place with torch.compile; the names of its state stay the same."""
    # Each size of image and each caption length may be another variant of the code. Beyond Dynamo's default limit of 8 the
    # rest would run uncompiled, without notice.
    torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit
    for module in model.modules():
        if isinstance(module, (GeneratorBlock, BITBlock)):
            module.compile()


def _to(value: Any, device: torch.device) -> Any:
    return upload(value, device) if isinstance(value, Tensor) else value


ADAM_STATE = ("exp_avg", "exp_avg_sq")
BUCKET = 100_000_000
"""Elements per ZeRO-2 communication bucket: larger buckets need more memory, smaller ones more time."""


def require_deepspeed() -> Any:
    """Import and return DeepSpeed; UserError if it is not installed."""
    return extra_import("deepspeed", "train.sharding zero2", "deepspeed")


class ZeroLearner(Learner):
    """Learner with DeepSpeed ZeRO-2: gradients are reduced to their owning ranks, which broadcast updated weights."""

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
            # Otherwise DeepSpeed spends half a minute compiling a shared-memory all-reduce.
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        self._engine, *_ = deepspeed.initialize(
            model=step_module, optimizer=adamw, config=self._settings(), dist_init_required=False
        )
        self._forward = self._engine
        self._zero = self._engine.optimizer
        self._flat: list[Tensor] = self._zero.single_partition_of_fp32_groups
        """This rank's flat partition of each parameter group."""

    def _distributed(self) -> nn.Module:
        return self.step_module

    def _settings(self) -> dict[str, Any]:
        return {
            "train_micro_batch_size_per_gpu": 1,  # required by DeepSpeed, otherwise unused
            "zero_optimization": {
                "stage": 2,
                "overlap_comm": self.device.type == "cuda",
                "reduce_bucket_size": BUCKET,
                "allgather_bucket_size": BUCKET,
            },
            "zero_allow_untested_optimizer": True,
            "gradient_clipping": self.cfg.clip,
            # No lower-precision modules: gradients are reduced in float32 like the weights.
            "torch_autocast": {
                "enabled": self.dtype != torch.float32,
                "dtype": "bfloat16",
                "lower_precision_safe_modules": [],
            },
        }

    def backward(self, inputs: dict[str, Any], count: int, last: bool) -> dict[str, Tensor]:
        self._engine.set_gradient_accumulation_boundary(last)
        loss, facts = self._loss(self._forward, inputs)
        self._engine.backward(loss / count, scale_wrt_gas=False)
        return {"loss": loss, **facts}

    def clip(self) -> Tensor:
        """Return the norm; DeepSpeed clips in its step. A norm that is not finite is infinite."""
        return torch.as_tensor(self._zero.scaled_global_norm())

    def apply(self, step: int, steps: int) -> None:
        for group in self._zero.param_groups:
            group["lr"] = self.rate(step, steps)
        self._engine.step()

    def discard(self) -> None:
        # In its step, DeepSpeed itself drops gradients that are not finite, and what belongs to them.
        for gradients in self._zero.averaged_gradients.values():
            for gradient in gradients:
                gradient.fill_(torch.nan)
        self._engine.step()

    def optimizer_state(self) -> dict[str, Tensor]:
        from deepspeed.utils import safe_get_full_optimizer_state

        # DeepSpeed links the state of all groups after the first group's first step, when the others have none yet.
        self._zero._hp_optimizer_states_linked = False
        self._zero._lazy_init_hp_params_optimizer_state()
        steps = self._zero.optimizer.state[self._flat[0]].get("step")
        if steps is None:  # no step has been made: all batches were skipped
            return {}
        found: dict[str, Tensor] = {}
        for name, parameter in self._trainable():
            found |= gather({f"{name}/{key}": safe_get_full_optimizer_state(parameter, key) for key in ADAM_STATE})
            found |= gather({f"{name}/step": steps.clone()})
        return found

    def load_optimizer_state(self, optimizer_state: Mapping[str, Tensor]) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state

        steps = next((value for name, value in optimizer_state.items() if name.endswith("/step")), None)
        if steps is None:
            return
        for flat in self._flat:
            # The optimizer creates its state in its first step, which has not run yet.
            empty = {key: torch.zeros_like(flat) for key in ADAM_STATE}
            self._zero.optimizer.state[flat] = {"step": steps.to(flat.device, copy=True), **empty}
        self._zero._lazy_init_hp_params_optimizer_state()
        for name, parameter in self._trainable():
            for key in ADAM_STATE:
                safe_set_full_optimizer_state(parameter, optimizer_state[f"{name}/{key}"].to(self.device), key)

    def _trainable(self) -> Iterator[tuple[str, nn.Parameter]]:
        return ((name, p) for name, p in self.model.named_parameters() if p.requires_grad)


class FSDPLearner(Learner):
    """Learner with FSDP2: weights are gathered block by block in the compute dtype, in forward and backward."""

    shards_one_rank = True

    def _distributed(self) -> nn.Module:
        # Inputs are not cast, because timesteps would lose precision; autocast chooses the compute dtypes.
        policy = MixedPrecisionPolicy(self.dtype, torch.float32, cast_forward_inputs=False)
        for module in self.model.modules():
            if isinstance(module, TimestepEmbedding):  # computed in float32 without autocast
                fully_shard(module)
        for blocks in [module for module in self.model.modules() if isinstance(module, nn.ModuleList)]:
            for block in blocks:
                fully_shard(block, mp_policy=policy)
                register_fsdp_forward_method(block, "text_kv")
        fully_shard(self.step_module, mp_policy=policy)
        return self.step_module

    def evaluate(self, module: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        found = super().evaluate(module, inputs)
        for each in module.modules():
            if isinstance(each, FSDPModule):
                each.reshard()  # weights that stay gathered would be used after they have changed
        return found
