"""The training loop that runs in every process of a run, and the notice that a node is about to be taken away. No Ray."""

from __future__ import annotations

import logging
import time
from contextlib import closing

import torch

from ..data.loading.loader import Prefetcher
from .checkpoints import Checkpointer
from .distributed import Workers, ranks
from .metrics_log import MetricsLog
from .run_dir import Attempt
from .settings import TrainConfig
from .trainer import BuildTask, Trainer

PREEMPTION_INTERVAL = 3.0
"""Seconds between two looks: one takes two barriers (18 ms on two CPU workers), and notices come half a minute ahead."""
logger = logging.getLogger(__name__)


def train_worker(build_task: BuildTask, cfg: TrainConfig, attempt: Attempt, workers: Workers) -> bool:
    """Train to ``cfg.steps`` on this rank, from the run's last checkpoint where there is one.

    Returns False where it stopped before, with a checkpoint, because a node is about to be taken away.
    """
    device, (rank, _) = workers.device, ranks()
    torch.set_num_threads(cfg.workers.threads)
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
                if leaving:
                    break
                waited = time.perf_counter()
        log.close()
    return not leaving


log = logging.getLogger(__name__)


class PreemptionNotice:
    """Whether a node of these workers is about to go. The ranks look at the same steps."""

    def __init__(self, workers: Workers, start: int) -> None:
        self.workers = workers
        self.step, self.next, self.since = start, start + 1, time.perf_counter()

    def given(self, step: int) -> bool:
        """Look once in :data:`PREEMPTION_INTERVAL` seconds of rank 0's clock. Every rank calls this after each step."""
        if step < self.next:
            return False
        nodes = self.workers.nodes_to_go()
        now = time.perf_counter()
        steps_in_interval = int(PREEMPTION_INTERVAL * (step - self.step) / max(now - self.since, 1e-9))
        self.next = step + max(1, self.workers.broadcast(steps_in_interval))
        self.step, self.since = step, now
        if nodes is not None:
            logger.warning("step %d: node(s) %s will be taken away", step, ", ".join(nodes), extra={"step": step})
        return nodes is not None
