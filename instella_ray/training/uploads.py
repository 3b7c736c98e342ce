"""Checkpoints on their way to the run directory: one at a time, while training goes on, and which of them are kept."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from .. import storage
from ..errors import UserError
from .attempts import Attempt
from .run_dir import (
    CHECKPOINTS,
    SCORES,
    checkpoint_folders,
    checkpoint_step,
    finished_checkpoints,
    remove_checkpoint,
    upload,
)
from .settings import BestConfig

log = logging.getLogger(__name__)


class Uploads:
    """Moves saved checkpoints into ``attempt``'s run directory in a thread, in their order. Rank 0 alone has one."""

    def __init__(self, attempt: Attempt, keep: int, best: BestConfig | None) -> None:
        self.attempt, self.keep, self.best = attempt, keep, best
        self.failure: str | None = None
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="uploads")
        self.pending: Future[None] | None = None

    def hand_over(self, folder: Path) -> None:
        """Upload ``folder`` under its own name and delete it here, once the one before is through.

        UserError when a newer attempt has taken the run over.
        """
        self._wait()
        self.pending = self.thread.submit(self._move, folder)

    def finish(self) -> None:
        """Wait for the last upload; UserError where it has failed."""
        self._wait()
        self.close()
        if self.failure is not None:
            raise UserError(self.failure)

    def close(self) -> None:
        """End the thread when the upload that it is at is through, or has failed."""
        self.thread.shutdown()

    def sweep(self) -> None:
        """Delete what earlier attempts have left half uploaded."""
        for folder, complete in checkpoint_folders(self.attempt.run_dir).items():
            if not complete:
                storage.remove_tree(folder)

    def _wait(self) -> None:
        if self.pending is not None:
            self.pending.result()
            self.pending = None

    def _move(self, folder: Path) -> None:
        url = storage.join(self.attempt.run_dir, CHECKPOINTS, folder.name)
        self.failure = None
        try:
            upload(folder, url, self.attempt.check)
        except UserError:
            raise
        except Exception as error:  # each store has errors of its own, and none of them is worth a run
            self.failure = f"checkpoint {url}: could not be uploaded ({type(error).__name__}: {error})"
            log.error("%s; training goes on to the next one", self.failure, extra={"step": checkpoint_step(url)})
            return
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        log.info("checkpoint %s is complete", url, extra={"step": checkpoint_step(url)})
        self._forget_others()

    def _forget_others(self) -> None:
        """Delete checkpoints beyond those to keep. A store that refuses costs space, not the run."""
        folders = finished_checkpoints(self.attempt.run_dir)
        kept = {*folders[-self.keep :]}
        try:
            if self.best is not None:
                kept.update(best_checkpoint({folder: _scores(folder) for folder in folders}, self.best))
            for folder in folders:
                if folder not in kept:
                    remove_checkpoint(folder)
        except Exception as error:
            log.error("%s: old checkpoints could not be deleted (%s)", self.attempt.run_dir, error)


def best_checkpoint(scores: Mapping[str, Mapping[str, float]], best: BestConfig) -> Sequence[str]:
    """The one of ``scores`` (logged figures by checkpoint) that is best by ``best``, the first of equals; none of none."""
    sign = 1 if best.order == "lower" else -1
    known = {folder: sign * values[best.metric] for folder, values in scores.items() if best.metric in values}
    return [min(known, key=lambda folder: known[folder])] if known else []


def _scores(folder: str) -> dict[str, float]:
    file = storage.join(folder, SCORES)
    return storage.read_json(file) if storage.exists(file) else {}
