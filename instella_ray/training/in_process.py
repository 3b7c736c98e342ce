"""A run in the process that asks for it, without Ray: for debuggers, tests, and machines that one process has to itself."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from .. import logs
from ..errors import UserError
from .attempts import Attempt
from .loop import train_worker
from .settings import TrainConfig, WorkersConfig
from .task import BuildTask
from .workers import Alone

log = logging.getLogger(__name__)


class CallingProcess:
    """Trains in this process."""

    def __init__(self, workers: WorkersConfig) -> None:
        """UserError where a GPU is asked for and there is none."""
        if workers.gpu and not torch.cuda.is_available():
            raise UserError("train.workers.gpu: PyTorch sees no GPU here, where the run would compute")
        self.device = torch.device("cuda", torch.cuda.current_device()) if workers.gpu else torch.device("cpu")

    def train(self, build_task: BuildTask, cfg: TrainConfig, attempt: Attempt, fields: Mapping[str, Any]) -> None:
        """Train to ``cfg.steps``; ``fields`` are for the log records of that time. What is raised there passes through."""
        with logs.carrying({**fields, "rank": 0}), _own_threads():
            try:
                train_worker(build_task, cfg, attempt, Alone(self.device))
            except Exception as error:
                log.error("training failed on rank 0: %s", error, extra={"failed_rank": 0})
                raise


@contextmanager
def _own_threads() -> Iterator[None]:
    """Give this process as many threads to compute with after the block as it had before."""
    before = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(before)
