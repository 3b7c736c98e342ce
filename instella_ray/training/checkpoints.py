"""Training checkpoints: a model folder plus optimizer state and step, in safetensors and JSON. No pickles.

Rank 0 saves to a local folder and uploads it to the run directory while training continues.

Tensors are stored unsharded, so that a run can be resumed with another number of ranks or another sharding. A run with a
discriminator also stores its weights and optimizer state.
"""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from safetensors.torch import save_file
from torch import Tensor

from .. import storage
from ..data.model_provenance import LINEAGE, lineage_section
from ..errors import UserError
from ..models.checkpoint import EMA, WEIGHTS, ModelConfig, add_section, read_tensors, save_weights
from ..models.folders import (
    CHECKPOINTS,
    STATE,
    checkpoint_folders,
    checkpoint_name,
    checkpoint_step,
    finished_checkpoints,
)
from ..runs import read_record
from .distributed import Workers, ranks
from .run_dir import SCORES, Attempt, download, remove_checkpoint, scratch_folder, upload
from .settings import BestConfig, TrainConfig

OPTIMIZER = "optimizer.safetensors"
DISCRIMINATOR, DISCRIMINATOR_OPTIMIZER = "discriminator.safetensors", "discriminator_optimizer.safetensors"
log = logging.getLogger(__name__)


class Discriminator(NamedTuple):
    """Checkpointed state of the discriminator and its optimizer."""

    weights: Mapping[str, Tensor]
    optimizer_state: Mapping[str, Tensor]


class Checkpoint(NamedTuple):
    """State needed to resume a run."""

    step: int
    """Completed steps."""
    weights: Mapping[str, Tensor]
    ema: Mapping[str, Tensor]
    optimizer_state: Mapping[str, Tensor]
    """Optimizer state in the format of :meth:`.learner.Learner.optimizer_state`."""
    discriminator: Discriminator | None
    skipped: int = 0
    """Skipped batches."""


def save_checkpoint(folder: Path, cfg: ModelConfig, checkpoint: Checkpoint, extra: Mapping[str, Any]) -> None:
    """Write a checkpoint for :func:`read_checkpoint` to the existing local ``folder``."""
    save_weights(folder, cfg, checkpoint.weights, ema=checkpoint.ema, extra=extra)
    save_file(dict(checkpoint.optimizer_state), folder / OPTIMIZER)
    if checkpoint.discriminator is not None:
        save_file(dict(checkpoint.discriminator.weights), folder / DISCRIMINATOR)
        save_file(dict(checkpoint.discriminator.optimizer_state), folder / DISCRIMINATOR_OPTIMIZER)
    # Last, because a folder with its state counts as complete.
    state = {"step": checkpoint.step, "skipped_batches": checkpoint.skipped}
    (folder / STATE).write_text(json.dumps(state, indent=1))


def read_checkpoint(folder: Path) -> Checkpoint:
    """Read the checkpoint in ``folder``; tensors are memory-mapped and loaded on use."""
    discriminator = None
    if (folder / DISCRIMINATOR).is_file():
        discriminator = Discriminator(
            read_tensors(folder / DISCRIMINATOR), read_tensors(folder / DISCRIMINATOR_OPTIMIZER)
        )
    state = json.loads((folder / STATE).read_text())
    weights, ema, optimizer_state = (read_tensors(folder / name) for name in (WEIGHTS, EMA, OPTIMIZER))
    skipped = state.get("skipped_batches", 0)  # older checkpoints hold none
    return Checkpoint(state["step"], weights, ema, optimizer_state, discriminator, skipped)


class Checkpointer:
    """Reader and writer of a run's checkpoints. Every rank has one; rank 0's writes.

    A context manager that waits on exit until all saved checkpoints are uploaded. Raises UserError if the last upload
    failed; an exception of the block propagates.
    """

    def __init__(self, cfg: TrainConfig, attempt: Attempt, workers: Workers) -> None:
        """Prepare uploads; UserError if a newer attempt has taken over, or the run directory is not shared by all nodes."""
        self.cfg, self.attempt, self.workers = cfg, attempt, workers
        attempt.check_storage()
        attempt.check()
        self.scratch = scratch_folder(f"{attempt.run_dir}#saved")
        self.uploads = Uploads(attempt, cfg.keep_checkpoints, cfg.keep_best) if ranks()[0] == 0 else None
        if self.uploads is not None:
            shutil.rmtree(self.scratch, ignore_errors=True)  # left by a killed worker
            self.uploads.sweep()

    @contextmanager
    def last(self) -> Iterator[Path | None]:
        """Provide the last complete checkpoint as a local folder, None in a new run. Collective, with barriers."""
        found = finished_checkpoints(self.attempt.run_dir) if self.uploads is not None else []
        url = self.workers.broadcast(found[-1] if found else "")
        if self.uploads is not None:
            step = checkpoint_step(url) if url else 0
            how = "resumes" if url else "starts"
            log.info("training %s at step %d of %d", how, step, self.cfg.steps, extra={"step": step})
        with _node_local(url, self.workers) if url else nullcontext() as folder:
            yield folder

    def save(self, step: int, metrics: dict[str, Any], write: Callable[[Path, int], None]) -> None:
        """Save a checkpoint after ``step`` steps and upload it in the background.

        ``write(folder, step)`` is called on every rank, because shards may have to be gathered; only rank 0's folder is
        uploaded. UserError if a newer attempt has taken over the run.
        """
        if self.uploads is None:
            with tempfile.TemporaryDirectory() as unused:
                write(Path(unused), step)
            return
        folder = self.scratch / checkpoint_name(step)
        folder.mkdir(parents=True)
        write(folder, step)
        if (record := read_record(self.attempt.run_dir)) is not None:
            add_section(folder, LINEAGE, lineage_section(record, step))
        storage.write_json(str(folder / SCORES), metrics)
        self.uploads.hand_over(folder)

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self.uploads is None:
            return
        try:
            if kind is None:
                self.uploads.finish()
            else:
                self.uploads.close()
        finally:
            shutil.rmtree(self.scratch, ignore_errors=True)


@contextmanager
def _node_local(url: str, workers: Workers) -> Iterator[Path]:
    """Provide a checkpoint as a local folder: itself, or one downloaded copy per node. Collective."""
    if storage.is_local(url):
        yield Path(storage.filesystem(url)[1])
        return
    copy, first = scratch_folder(url), workers.local_rank == 0
    if first:
        shutil.rmtree(copy, ignore_errors=True)
        download(url, copy)
    workers.barrier()
    yield copy
    workers.barrier()
    if first:
        shutil.rmtree(copy)


class Uploads:
    """Background uploads of saved checkpoints to ``attempt``'s run directory, in order. Used by rank 0 only."""

    def __init__(self, attempt: Attempt, keep: int, best: BestConfig | None) -> None:
        self.attempt, self.keep, self.best = attempt, keep, best
        self.failure: str | None = None
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="uploads")
        self.pending: Future[None] | None = None

    def hand_over(self, folder: Path) -> None:
        """Queue the upload of ``folder``, which is then deleted; waits for the previous upload first.

        UserError if a newer attempt has taken over the run.
        """
        self._wait()
        self.pending = self.thread.submit(self._move, folder)

    def finish(self) -> None:
        """Wait for the last upload; UserError if it failed."""
        self._wait()
        self.close()
        if self.failure is not None:
            raise UserError(self.failure)

    def close(self) -> None:
        """Stop the thread after the current upload has finished or failed."""
        self.thread.shutdown()

    def sweep(self) -> None:
        """Delete incomplete uploads of earlier attempts."""
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
        except Exception as error:  # stores raise unrelated error types, and a failed upload must not stop the run
            self.failure = f"checkpoint {url}: could not be uploaded ({type(error).__name__}: {error})"
            log.error("%s; training continues", self.failure, extra={"step": checkpoint_step(url)})
            return
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        log.info("checkpoint %s is complete", url, extra={"step": checkpoint_step(url)})
        self._delete_old()

    def _delete_old(self) -> None:
        """Delete checkpoints that are not to be kept. Errors are only logged, because they cost space, not the run."""
        folders = finished_checkpoints(self.attempt.run_dir)
        kept = {*folders[-self.keep :]}
        try:
            if self.best is not None:
                kept.update(best_checkpoint({folder: scores(folder) for folder in folders}, self.best))
            for folder in folders:
                if folder not in kept:
                    remove_checkpoint(folder)
        except Exception as error:
            log.error("%s: old checkpoints could not be deleted (%s)", self.attempt.run_dir, error)


def best_checkpoint(scores: Mapping[str, Mapping[str, float]], best: BestConfig) -> Sequence[str]:
    """Return the best checkpoint of ``scores`` (metrics by checkpoint) in a list, the first of equals; empty if none."""
    sign = 1 if best.order == "lower" else -1
    known = {folder: sign * values[best.metric] for folder, values in scores.items() if best.metric in values}
    return [min(known, key=lambda folder: known[folder])] if known else []


def scores(folder: str) -> dict[str, float]:
    """Return the metrics that were logged last before the checkpoint in ``folder`` was saved."""
    file = storage.join(folder, SCORES)
    return storage.read_json(file) if storage.exists(file) else {}
