"""Validation while a model trains: its checkpoints are measured on other workers as they come, and the best one is kept."""

from __future__ import annotations

import logging
import shutil
import threading
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import Field

from .. import storage
from ..config import Config
from ..errors import UserError
from ..models.checkpoint import CONFIG, EMA, WEIGHTS
from ..training.run_dir import checkpoint_step, finished_checkpoints, located
from .metrics.base import better

FOLDER, ROWS, BEST = "validation", "validation.json", "best.json"
POLL = 2.0
"""Seconds between two looks for new checkpoints."""
log = logging.getLogger(__name__)
Numbers = dict[str, dict[str, Any]]
"""Of each metric its name, value, and ends of the interval, ``low`` and ``high``."""


class ValidationSchedule(Config):
    """Which checkpoints are measured, and by what the best one is told."""

    every_steps: int = Field(2000, ge=1)
    """Steps between two checkpoints that are measured; the last one always is."""
    best_by: str
    """Metric that tells the best checkpoint."""
    folder: str | None = None
    """A folder that all nodes share, for what is measured: a folder in it for each run. None means
    ``RUN_DIR/validation``, which cannot be where the run directory is a URL."""


class Validator(ABC):
    """Measures checkpoints of a run into ``RUN_DIR/validation``: a folder each, and a row each in ``validation.json``."""

    def __init__(self, schedule: ValidationSchedule, run_dir: str) -> None:
        self.schedule, self.run_dir = schedule, located(run_dir)
        if not storage.is_local(place := schedule.folder or self.run_dir):
            raise UserError(
                f"{place}: validation beside training loads models from a folder that all "
                "nodes share, not from a URL; name one as validation.folder"
            )
        name = self.run_dir.rstrip("/").rpartition("/")[2]
        self.folder = Path(schedule.folder, name).absolute() if schedule.folder else Path(self.run_dir, FOLDER)
        self.error: BaseException | None = None
        self.given_up = threading.Event()

    @abstractmethod
    def measure(self, model: str, folder: Path) -> Numbers:
        """Measure the model folder ``model``; what is worth keeping goes into ``folder``."""

    def rows(self) -> list[dict[str, Any]]:
        """Step, and value and interval of each metric, of what was measured so far."""
        path = str(self.folder / ROWS)
        rows: list[dict[str, Any]] = storage.read_json(path) if storage.exists(path) else []
        return rows

    def due(self, ended: bool) -> list[str]:
        """Finished checkpoints that are to be measured; once training has ``ended``, the last one among them."""
        last, found = max((row["step"] for row in self.rows()), default=0), []
        checkpoints = finished_checkpoints(self.run_dir)
        for checkpoint in checkpoints:
            step = checkpoint_step(checkpoint)
            if step - last >= self.schedule.every_steps or (ended and checkpoint == checkpoints[-1] and step > last):
                found.append(checkpoint)
                last = step
        return found

    def validate(self, checkpoint: str) -> dict[str, Any]:
        """Measure a checkpoint; returns its row. It is copied first, as training deletes old ones."""
        folder = self.folder / Path(checkpoint).name
        model = folder / "model"
        if not model.exists():
            with storage.atomic_dir(model) as copy:
                fs, path = storage.filesystem(checkpoint)
                for name in (WEIGHTS, EMA, CONFIG):
                    storage.retry(partial(fs.get_file, storage.join(path, name), str(copy / name)))
        return self.add({"step": checkpoint_step(checkpoint), "metrics": self.measure(str(model), folder)})

    def add(self, row: dict[str, Any]) -> dict[str, Any]:
        """Note a row, mark the best one in ``best.json``, and drop the copies of all other models."""
        best_by = self.schedule.best_by
        rows = sorted([*(r for r in self.rows() if r["step"] != row["step"]), row], key=lambda r: r["step"])
        storage.write_json(str(self.folder / ROWS), rows)
        sign = -1 if better(best_by) == "lower" else 1
        known = [r for r in rows if r["metrics"][best_by]["value"] is not None]
        best = max(known, key=lambda r: (sign * r["metrics"][best_by]["value"], -r["step"]), default=row)
        model = self.folder / f"step-{best['step']:07d}" / "model"
        storage.write_json(str(self.folder / BEST), {**best, "best_by": best_by, "model": str(model)})
        for other in self.folder.glob("step-*/model"):
            if other != model:
                shutil.rmtree(other)
        return row

    def follow(self, ended: threading.Event) -> None:
        """Measure checkpoints as they come, until training has ended and its last one is measured."""
        try:
            while not self.given_up.is_set():
                last_look = ended.is_set()
                for checkpoint in self.due(last_look):
                    try:
                        self.validate(checkpoint)
                    except FileNotFoundError:  # deleted by training in the meantime, which had come further
                        log.warning("validation: %s was gone before it could be copied", checkpoint)
                if last_look:
                    return
                ended.wait(POLL)
        except BaseException as error:
            self.error = error


@contextmanager
def validating(validator: Validator | None) -> Iterator[None]:
    """Validate in the background what the block trains; a problem is raised once training is done. None: nothing to do."""
    if validator is None:
        yield
        return
    ended = threading.Event()
    thread = threading.Thread(target=validator.follow, args=(ended,), daemon=True, name="validation")
    thread.start()
    try:
        yield
    except BaseException:
        validator.given_up.set()  # nothing waits for what it may be about to measure
        raise
    ended.set()
    thread.join()
    if validator.error is not None:
        raise UserError(f"validation: {validator.error}") from validator.error
    best = storage.read_json(str(validator.folder / BEST))
    value = best["metrics"][best["best_by"]]["value"]
    about = {"step": best["step"], best["best_by"]: value}
    log.info("best by %s: step %d, %.4g; model %s", best["best_by"], best["step"], value, best["model"], extra=about)


def require_best_by(best_by: str, measured: Collection[str]) -> None:
    """ValueError unless ``best_by`` is among the ``measured`` metrics and has a better end."""
    if best_by not in measured or better(best_by) is None:
        names = ", ".join(name for name in measured if better(name)) or "one of metrics"
        raise ValueError(f"best_by {best_by}: expected a metric that is measured and has a better end: {names}")


def numbers(results: Iterable[tuple[str, dict[str, Any]]]) -> Numbers:
    """Of each metric's result as JSON what a row holds."""
    return {name: {key: result[key] for key in ("name", "value", "low", "high")} for name, result in results}
