"""Training loop of one rank and detection of node preemption. Independent of Ray."""

from __future__ import annotations

import logging
import time
from contextlib import closing

import torch

from ..data.loading.loader import Prefetcher
from ..memory import keep_freed_memory
from .checkpoints import Checkpointer
from .distributed import Workers, ranks
from .metrics_log import MetricsLog
from .run_dir import Attempt
from .settings import TrainConfig
from .trainer import BuildTask, Trainer

PREEMPTION_INTERVAL = 3.0
"""Seconds between two checks for preemption: a check costs two barriers (18 ms on two CPU workers), and notices come
half a minute ahead."""
logger = logging.getLogger(__name__)


def train_worker(build_task: BuildTask, cfg: TrainConfig, attempt: Attempt, workers: Workers) -> bool:
    """Train to ``cfg.steps`` on this rank, starting from the run's last checkpoint if it has one.

    Returns False if training stopped early, after saving a checkpoint, because a node is about to be preempted.
    """
    device, (rank, _) = workers.device, ranks()
    torch.set_num_threads(cfg.workers.threads)
    keep_freed_memory()
    task = build_task(device)
    leaving = False
    with Checkpointer(cfg, attempt, workers) as checkpoints:
        with checkpoints.last() as folder:
            trainer = Trainer(task, cfg, device, folder)
        start = trainer.start
        log = MetricsLog(cfg, attempt, rank, task.summary, start, device)
        notice = PreemptionNotice(workers, start)
        with closing(Prefetcher(trainer.batch, start, cfg.steps)) as batches:
            waited = time.perf_counter()
            for step, batch in enumerate(batches, start):
                data_wait = time.perf_counter() - waited
                stepped = trainer.step(step, batch)
                log.step(step, stepped, data_wait)
                done = step + 1
                final = done == cfg.steps
                if final or done % cfg.preview_every == 0:
                    log.preview(done, trainer.preview())
                leaving = not final and notice.given(done)
                if final or leaving or done % cfg.checkpoint_every == 0:
                    log.sync()
                    checkpoints.save(done, log.last, trainer.save)
                    log.saved()
                if leaving:
                    break
                waited = time.perf_counter()
        log.close()
    task.close()
    return not leaving


log = logging.getLogger(__name__)


class PreemptionNotice:
    """Periodic check for nodes that are about to be preempted. All ranks check at the same steps."""

    def __init__(self, workers: Workers, start: int) -> None:
        self.workers = workers
        self.step, self.next, self.since = start, start + 1, time.perf_counter()

    def given(self, step: int) -> bool:
        """Return whether a preemption notice was received; call on every rank after each step.

        Checks about once every :data:`PREEMPTION_INTERVAL` seconds of rank 0's clock, and returns False in between.
        """
        if step < self.next:
            return False
        nodes = self.workers.nodes_to_preempt()
        now = time.perf_counter()
        steps_in_interval = int(PREEMPTION_INTERVAL * (step - self.step) / max(now - self.since, 1e-9))
        self.next = step + max(1, self.workers.broadcast(steps_in_interval))
        self.step, self.since = step, now
        if nodes is not None:
            logger.warning("step %d: node(s) %s will be preempted", step, ", ".join(nodes), extra={"step": step})
        return nodes is not None
