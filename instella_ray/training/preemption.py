"""Notices that a node is about to be taken away, which Ray Train passes on to the workers."""

from __future__ import annotations

import logging
import time

import ray.train
from ray.train.collective import broadcast_from_rank_zero

INTERVAL = 3.0
"""Seconds between two looks: one takes two barriers (18 ms on two CPU workers), and notices come half a minute ahead."""
log = logging.getLogger(__name__)


class PreemptionNotice:
    """Whether a node of this worker group is about to go. The ranks look at the same steps."""

    def __init__(self, start: int) -> None:
        self.step, self.next, self.since = start, start + 1, time.perf_counter()

    def given(self, step: int) -> bool:
        """Called by every rank after each step; looks once in :data:`INTERVAL` seconds, as rank 0's clock has it."""
        if step < self.next:
            return False
        info = ray.train.get_preemption_info()
        now = time.perf_counter()
        steps_in_interval = int(INTERVAL * (step - self.step) / max(now - self.since, 1e-9))
        self.next = step + max(1, int(broadcast_from_rank_zero(steps_in_interval)))
        self.step, self.since = step, now
        if info is not None:
            nodes = ", ".join(info.preempted_node_ids)
            log.warning("step %d: node(s) %s will be taken away", step, nodes, extra={"step": step})
        return info is not None
