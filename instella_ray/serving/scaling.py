"""How many replicas each stage needs. The generator's follow the rows that wait for it and those on their way.

Serve copies the policy into its controller, so nothing heavy may be imported here; and the stages, which report what it
decides by, run without Ray too.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ray.serve.config import AutoscalingConfig, AutoscalingContext

WAITING, ACTIVE, SLOTS = "waiting_rows", "active_rows", "slots"
"""What a generator replica's ``record_autoscaling_stats`` reports."""


def desired_replicas(rows: float, slots: float, utilisation: float) -> int:
    """Replicas of ``slots`` slots each, so that ``rows`` rows occupy the share ``utilisation`` of them; at least 1."""
    # Less a trifle, because 7 / 0.7 is a little more than 10.
    return max(1, math.ceil(rows / (slots * utilisation) - 1e-9))


class RowsPolicy:
    """A Serve autoscaling policy: rows waiting (in replicas, and in handles before them) and active, per slot.

    Serve applies the deployment's delays, factors and bounds to the answer.
    """

    def __init__(self, utilisation: float = 0.8) -> None:
        if not 0 < utilisation <= 1:
            raise ValueError(f"utilisation {utilisation}: expected more than 0 and at most 1")
        self.utilisation = utilisation

    def __call__(self, ctx: AutoscalingContext) -> tuple[int, dict[str, Any]]:
        reported = ctx.aggregated_metrics or {}
        slots = list((reported.get(SLOTS) or {}).values())
        if not slots or not all(slots):
            # Replicas have started and not reported yet, or the controller has: no reason to change anything.
            return ctx.target_num_replicas, {}
        rows = sum((reported.get(WAITING) or {}).values()) + sum((reported.get(ACTIVE) or {}).values())
        rows += ctx.total_queued_requests or 0
        return desired_replicas(rows, sum(slots) / len(slots), self.utilisation), {}


def generator_scaling(
    lowest: int,
    highest: int,
    *,
    utilisation: float = 0.8,
    upscale_delay_s: float = 5.0,
    downscale_delay_s: float = 120.0,
    look_back_s: float = 10.0,
) -> AutoscalingConfig:
    """Between ``lowest`` and ``highest`` generator replicas, by rows per slot."""
    from ray.serve.config import AutoscalingPolicy

    policy = AutoscalingPolicy(policy_function=RowsPolicy, policy_kwargs={"utilisation": utilisation})
    return _config(lowest, highest, upscale_delay_s, downscale_delay_s, look_back_s, policy=policy)


def stage_scaling(
    lowest: int,
    highest: int,
    *,
    ongoing: float,
    upscale_delay_s: float = 5.0,
    downscale_delay_s: float = 120.0,
    look_back_s: float = 10.0,
) -> AutoscalingConfig:
    """Between ``lowest`` and ``highest`` replicas of a stage whose load is its calls: ``ongoing`` a replica."""
    return _config(lowest, highest, upscale_delay_s, downscale_delay_s, look_back_s, target_ongoing_requests=ongoing)


def _config(
    lowest: int, highest: int, up_s: float, down_s: float, look_back_s: float, **more: Any
) -> AutoscalingConfig:
    from ray.serve.config import AutoscalingConfig

    return AutoscalingConfig(
        min_replicas=lowest,
        max_replicas=highest,
        upscale_delay_s=up_s,
        downscale_delay_s=down_s,
        look_back_period_s=look_back_s,
        **more,
    )
