"""The training loop that runs in every process of a run. Knows nothing of Ray."""

from __future__ import annotations

import time
from contextlib import closing

import torch

from ..data.loading.loader import Prefetcher
from .attempts import Attempt
from .metrics_log import MetricsLog
from .preemption import PreemptionNotice
from .reporting import Checkpoints
from .settings import TrainConfig
from .shards import ranks
from .task import BuildTask
from .trainer import Trainer
from .workers import Workers


def train_worker(build_task: BuildTask, cfg: TrainConfig, attempt: Attempt, workers: Workers) -> bool:
    """Train to ``cfg.steps`` on this rank, from the run's last checkpoint where there is one.

    Returns False where it stopped before, with a checkpoint, because a node is about to be taken away.
    """
    device, (rank, _) = workers.device, ranks()
    torch.set_num_threads(cfg.workers.threads)
    task = build_task(device)
    leaving = False
    with Checkpoints(cfg, attempt, workers) as checkpoints:
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
