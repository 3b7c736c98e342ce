"""Training loop of one rank, and what ends it early. Independent of Ray."""

from __future__ import annotations

import logging
import time
from contextlib import closing
from functools import partial
from pathlib import Path

import torch

from ..data.loading.loader import Prefetcher
from ..memory import keep_freed_memory
from .checkpoints import Checkpointer
from .distributed import Workers, ranks
from .metrics_log import MetricsLog
from .report import RunReport
from .run_dir import Attempt
from .settings import TrainConfig
from .trainer import BuildTask, Trainer

logger = logging.getLogger(__name__)


def train_worker(build_task: BuildTask, cfg: TrainConfig, attempt: Attempt, workers: Workers) -> bool:
    """Train to ``cfg.steps`` on this rank, starting from the run's last checkpoint if it has one.

    Returns False if training stopped early, after saving a checkpoint, because a node is about to be preempted or the run
    was asked to stop.
    """
    device, (rank, _) = workers.device, ranks()
    torch.set_num_threads(cfg.workers.threads)
    keep_freed_memory()
    task = build_task(device)
    leaving = False
    with RunReport(cfg, attempt, device) as report, Checkpointer(cfg, attempt, workers) as checkpoints:
        with checkpoints.last() as folder:
            trainer = Trainer(task, cfg, device, folder)
            start = trainer.start
            log = MetricsLog(cfg, attempt, rank, task.summary, start, device, folder, report)
        notice = StopNotice(workers, start)
        with closing(Prefetcher(trainer.batch, start, cfg.steps)) as batches:
            waited = time.perf_counter()
            for step, batch in enumerate(batches, start):
                data_wait = time.perf_counter() - waited
                stepped = trainer.step(step, batch)
                done = step + 1
                final = done == cfg.steps
                evaluated = cfg.held_out is not None and (final or done % cfg.held_out.every == 0)
                log.step(step, stepped, data_wait, trainer.held_out if evaluated else None)
                if final or done % cfg.preview_every == 0:
                    log.preview(done, trainer.preview())
                leaving = not final and notice.given(done)
                if final or leaving or done % cfg.checkpoint_every == 0:
                    log.sync()
                    checkpoints.save(done, log.last, partial(save, trainer, log))
                    log.saved()
                if leaving:
                    break
                waited = time.perf_counter()
        log.close()
    task.close()
    return not leaving


def save(trainer: Trainer, log: MetricsLog, folder: Path, step: int) -> None:
    """Write the state of training and that of its log to a checkpoint's folder; collective."""
    log.save(folder)
    trainer.save(folder, step)


class StopNotice:
    """Periodic check for nodes that are about to be preempted, and for a request to stop, as Ctrl-C makes it.

    All ranks check at the same steps.
    """

    def __init__(self, workers: Workers, start: int) -> None:
        self.workers = workers
        self.step, self.next, self.since = start, start + 1, time.perf_counter()

    def given(self, step: int) -> bool:
        """Return whether training is to stop; call on every rank after each step.

        Checks about once every ``workers.poll_interval`` seconds of rank 0's clock, and returns False in between.
        """
        if step < self.next:
            return False
        nodes = self.workers.nodes_to_preempt()
        now = time.perf_counter()
        wait = max(1, int(self.workers.poll_interval * (step - self.step) / max(now - self.since, 1e-9)))
        wait = self.workers.broadcast(0 if self.workers.stop_requested() else wait)
        self.next, self.step, self.since = step + wait, step, now
        if nodes is not None:
            logger.warning("step %d: node(s) %s will be preempted", step, ", ".join(nodes), extra={"step": step})
        return nodes is not None or not wait
