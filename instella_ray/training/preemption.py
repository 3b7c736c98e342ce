"""Notices that a node is about to be taken away, as the training loop asks for them."""

from __future__ import annotations

import logging
import time

from .workers import Workers

INTERVAL = 3.0
"""Seconds between two looks: one takes two barriers (18 ms on two CPU workers), and notices come half a minute ahead."""
log = logging.getLogger(__name__)


class PreemptionNotice:
    """Whether a node of these workers is about to go. The ranks look at the same steps."""

    def __init__(self, workers: Workers, start: int) -> None:
        self.workers = workers
        self.step, self.next, self.since = start, start + 1, time.perf_counter()

    def given(self, step: int) -> bool:
        """Called by every rank after each step; looks once in :data:`INTERVAL` seconds, as rank 0's clock has it."""
        if step < self.next:
            return False
        nodes = self.workers.nodes_to_go()
        now = time.perf_counter()
        steps_in_interval = int(INTERVAL * (step - self.step) / max(now - self.since, 1e-9))
        self.next = step + max(1, self.workers.broadcast(steps_in_interval))
        self.step, self.since = step, now
        if nodes is not None:
            log.warning("step %d: node(s) %s will be taken away", step, ", ".join(nodes), extra={"step": step})
        return nodes is not None
