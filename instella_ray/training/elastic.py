"""Ray Train's choice of how many workers there are, among the numbers that the global batch can be shared by."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from ray.train.v2._internal.execution.scaling_policy import ElasticScalingPolicy
from ray.train.v2.api.config import FailureConfig, ScalingConfig
from ray.train.v2.torch.torch_trainer import TorchTrainer

from .mistakes import MistakePolicy


class DivisorPolicy(ElasticScalingPolicy):
    """Takes the largest of ``counts`` that there is room for, where Ray's own policy takes any number."""

    def __init__(self, scaling_config: ScalingConfig, counts: Sequence[int]) -> None:
        super().__init__(scaling_config)
        self.counts = tuple(counts)

    def _count_possible_workers(self, reserved_resources: Any) -> int:
        room = super()._count_possible_workers(reserved_resources)
        return max((count for count in self.counts if count <= room), default=0)


class DivisorTrainer(TorchTrainer):
    """A trainer on as many workers, of ``counts``, as there is room for, that does not repeat mistakes."""

    def __init__(self, *args: Any, counts: Sequence[int], **options: Any) -> None:
        super().__init__(*args, **options)
        self.counts = counts

    def _initialize_and_run_controller(self, **parts: Any) -> Any:
        parts["failure_policy"] = MistakePolicy(cast(FailureConfig, self.run_config.failure_config))
        if len(self.counts) > 1:
            parts["scaling_policy"] = DivisorPolicy(cast(ScalingConfig, self.scaling_config), self.counts)
        return super()._initialize_and_run_controller(**parts)
