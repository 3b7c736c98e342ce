"""Training checkpoints: a model folder plus the optimizer and the step, in safetensors and JSON. No pickles.

Workers save on this machine; rank 0 moves what was saved into the run directory while training goes on.

Tensors are whole, however they were spread over the ranks: a run goes on with another number of those, or sharding. A run
with a discriminator keeps that and its optimizer beside them.
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
from ..runs import read_record
from .distributed import Workers, ranks
from .run_dir import (
    CHECKPOINTS,
    SCORES,
    STATE,
    Attempt,
    checkpoint_folders,
    checkpoint_name,
    checkpoint_step,
    download,
    finished_checkpoints,
    remove_checkpoint,
    scratch_folder,
    upload,
)
from .settings import BestConfig, TrainConfig

OPTIMIZER = "optimizer.safetensors"
DISCRIMINATOR, DISCRIMINATOR_OPTIMIZER = "discriminator.safetensors", "discriminator_optimizer.safetensors"
log = logging.getLogger(__name__)


class Discriminator(NamedTuple):
    """What is kept of a second model: its state, and its optimizer's."""

    weights: Mapping[str, Tensor]
    optimizer_state: Mapping[str, Tensor]


class Checkpoint(NamedTuple):
    """All that a run needs to go on."""

    step: int
    """Steps that it has behind it."""
    weights: Mapping[str, Tensor]
    ema: Mapping[str, Tensor]
    optimizer_state: Mapping[str, Tensor]
    """The optimizer's state, as :meth:`.learner.Learner.optimizer_state`."""
    discriminator: Discriminator | None


def save_checkpoint(folder: Path, cfg: ModelConfig, checkpoint: Checkpoint, extra: Mapping[str, Any]) -> None:
    """Write what :func:`read_checkpoint` reads into ``folder``, which must exist."""
    save_weights(folder, cfg, checkpoint.weights, ema=checkpoint.ema, extra=extra)
    save_file(dict(checkpoint.optimizer_state), folder / OPTIMIZER)
    if checkpoint.discriminator is not None:
        save_file(dict(checkpoint.discriminator.weights), folder / DISCRIMINATOR)
        save_file(dict(checkpoint.discriminator.optimizer_state), folder / DISCRIMINATOR_OPTIMIZER)
    # Last: a folder with its state is a complete one.
    (folder / STATE).write_text(json.dumps({"step": checkpoint.step}, indent=1))


def read_checkpoint(folder: Path) -> Checkpoint:
    """What is in ``folder``; tensors are mapped into memory, and read where they are used."""
    discriminator = None
    if (folder / DISCRIMINATOR).is_file():
        discriminator = Discriminator(
            read_tensors(folder / DISCRIMINATOR), read_tensors(folder / DISCRIMINATOR_OPTIMIZER)
        )
    step = json.loads((folder / STATE).read_text())["step"]
    weights, ema, optimizer_state = (read_tensors(folder / name) for name in (WEIGHTS, EMA, OPTIMIZER))
    return Checkpoint(step, weights, ema, optimizer_state, discriminator)


class Checkpointer:
    """What a run has in its directory's ``checkpoints``. Every rank has one; rank 0's writes.

    Used as a context that ends when all that was saved is in the run directory: with a UserError where the last one could
    not be, and otherwise as the block did.
    """

    def __init__(self, cfg: TrainConfig, attempt: Attempt, workers: Workers) -> None:
        """UserError where another attempt has taken the run over, or the run directory is not shared by all nodes."""
        self.cfg, self.attempt, self.workers = cfg, attempt, workers
        attempt.check_storage()
        attempt.check()
        self.scratch = scratch_folder(f"{attempt.run_dir}#saved")
        self.uploads = Uploads(attempt, cfg.keep_checkpoints, cfg.keep_best) if ranks()[0] == 0 else None
        if self.uploads is not None:
            shutil.rmtree(self.scratch, ignore_errors=True)  # of a worker that was killed
            self.uploads.sweep()

    @contextmanager
    def last(self) -> Iterator[Path | None]:
        """The run's last complete checkpoint as a folder of this machine, None in a new run. A barrier at either end."""
        found = finished_checkpoints(self.attempt.run_dir) if self.uploads is not None else []
        url = self.workers.broadcast(found[-1] if found else "")
        if self.uploads is not None:
            step = checkpoint_step(url) if url else 0
            how = "goes on" if url else "begins"
            log.info("training %s at step %d of %d", how, step, self.cfg.steps, extra={"step": step})
        with _on_this_node(url, self.workers) if url else nullcontext() as folder:
            yield folder

    def save(self, step: int, metrics: dict[str, Any], write: Callable[[Path, int], None]) -> None:
        """Save after ``step`` steps, and upload it while training goes on.

        ``write(folder, step)`` is called on every rank, as parts of a model may have to be gathered; rank 0's folder counts.
        """
        if self.uploads is None:
            with tempfile.TemporaryDirectory() as unused:
                write(Path(unused), step)
            return
        if (best := self.cfg.keep_best) is not None and metrics and best.metric not in metrics:
            raise UserError(f"train.keep_best: {best.metric} is not logged; expected one of {', '.join(metrics)}")
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
def _on_this_node(url: str, workers: Workers) -> Iterator[Path]:
    """A checkpoint's folder, or one copy of it for all workers of a node. Every rank takes part."""
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
