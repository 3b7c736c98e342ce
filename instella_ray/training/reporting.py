"""The checkpoints of a run as its workers see them: the one to go on from, and those that they save."""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import TracebackType
from typing import Any

from .. import storage
from ..data.model_provenance import LINEAGE, lineage_section
from ..errors import UserError
from ..models.checkpoint import add_section
from ..runs import read_record
from .attempts import Attempt
from .run_dir import SCORES, checkpoint_name, checkpoint_step, download, finished_checkpoints, scratch_folder
from .settings import TrainConfig
from .shards import ranks
from .uploads import Uploads
from .workers import Workers

log = logging.getLogger(__name__)


class Checkpoints:
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

    def __enter__(self) -> Checkpoints:
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
