"""Autoscaling of the stages: the generator by waiting and active rows, the others by their concurrent calls.

Serve loads the policy in its controller, so this module must import nothing heavy; it imports Ray only in functions,
because the stages, which report the policy's input, also run without Ray.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ray.serve.config import AutoscalingConfig, AutoscalingContext

WAITING, ACTIVE, SLOTS = "waiting_rows", "active_rows", "slots"
"""Keys of the values that ``record_autoscaling_stats`` of a generator replica reports."""


def desired_replicas(rows: float, slots: float, utilisation: float) -> int:
    """Return the number of replicas, at least 1, at which ``rows`` occupy the share ``utilisation`` of all slots."""
    # Subtracts a tolerance for rounding errors: 7 / 0.7 is slightly more than 10.
    return max(1, math.ceil(rows / (slots * utilisation) - 1e-9))


class RowsPolicy:
    """Serve autoscaling policy by rows per slot: rows waiting in replicas, queued in handles, and active.

    Serve applies the deployment's delays, factors and limits to the result.
    """

    def __init__(self, utilisation: float = 0.8) -> None:
        if not 0 < utilisation <= 1:
            raise ValueError(f"utilisation {utilisation}: expected more than 0 and at most 1")
        self.utilisation = utilisation

    def __call__(self, ctx: AutoscalingContext) -> tuple[int, dict[str, Any]]:
        reported = ctx.aggregated_metrics or {}
        slots = list((reported.get(SLOTS) or {}).values())
        if not slots or not all(slots):
            # No reports yet after a start of the replicas or the controller: keep the current number.
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
    """Return Serve's config for ``lowest`` to ``highest`` generator replicas, scaled by rows per slot."""
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
    """Return Serve's config for ``lowest`` to ``highest`` replicas with a target of ``ongoing`` calls per replica."""
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
