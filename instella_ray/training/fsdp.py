"""FSDP2: every rank holds a share of the weights, their gradients and moments, and gathers a block when it is at work."""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

from .learner import Learner


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
