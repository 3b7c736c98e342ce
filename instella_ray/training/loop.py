"""The training loop that runs on every worker of Ray Train."""

from __future__ import annotations

import time

import ray.train.torch
import torch

from ..data.loader import Prefetcher
from .attempts import Attempt
from .metrics_log import MetricsLog
from .preemption import PreemptionNotice
from .reporting import Checkpoints
from .settings import TrainConfig
from .shards import ranks
from .task import Task
from .trainer import Trainer


def train_worker(task: Task, cfg: TrainConfig, attempt: Attempt) -> bool:
    """Run ``task`` to ``cfg.steps`` on this rank, from the run's last checkpoint where there is one.

    Returns False where it stopped before, with a checkpoint, because a node is about to be taken away.
    """
    device = ray.train.torch.get_device()
    torch.set_num_threads(cfg.workers.threads)
    rank, _ = ranks()
    checkpoints = Checkpoints(cfg, attempt, rank)
    with checkpoints.last() as folder:
        trainer = Trainer(task, cfg, device, folder)
    start = trainer.start
    log = MetricsLog(cfg, attempt, rank, task.summary, start, device)
    batches = Prefetcher(trainer.batch, start, cfg.steps)
    notice, leaving = PreemptionNotice(start), False
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
    checkpoints.finish()
    return not leaving
