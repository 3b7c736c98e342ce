"""Validation during training: evaluates each checkpoint in the background and keeps the best one."""

from __future__ import annotations

import logging
import os
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
from ..config import Config, OutputPath
from ..errors import UserError
from ..evaluation.metrics.base import better
from ..models.checkpoint import CONFIG, EMA, WEIGHTS
from ..models.folders import (
    BEST_FILE,
    checkpoint_step,
    finished_checkpoints,
    validated_model,
    validation_folder,
)
from .run_dir import located
from .validation_report import write_report

ROWS = "validation.json"
POLL = 2.0
"""Seconds between polls for new checkpoints."""
log = logging.getLogger(__name__)
Numbers = dict[str, dict[str, Any]]
"""By metric: its name, value, and interval bounds ``low`` and ``high``."""


class ValidationSchedule(Config):
    """Schedule of validation and criterion of the best checkpoint."""

    every_steps: int = Field(2000, ge=1)
    """Minimum number of steps between validated checkpoints; the last checkpoint is always validated."""
    best_by: str
    """Metric that selects the best checkpoint."""
    folder: OutputPath | None = None
    """Shared folder of all nodes for validation outputs, with a subfolder per run. None means ``RUN_DIR/validation``,
    which is not possible if the run directory is a URL."""


class Validator(ABC):
    """Base class of validators, which write a folder and a row of ``validation.json`` for each validated checkpoint.

    The output folder is ``RUN_DIR/validation``, or ``schedule.folder`` with the run's name. Raises UserError if it is a URL.
    """

    def __init__(self, schedule: ValidationSchedule, run_dir: str) -> None:
        self.schedule, self.run_dir = schedule, located(run_dir)
        if not storage.is_local(place := schedule.folder or self.run_dir):
            raise UserError(
                f"{place}: validation during training loads models from a shared folder, not from a URL; "
                "expected a folder that all nodes share as validation.folder"
            )
        self.folder = Path(validation_folder(self.run_dir, schedule.folder))
        above = next(folder for folder in self.folder.parents if folder.exists())
        if not os.access(above, os.W_OK):
            raise UserError(f"validation.folder {self.folder}: {above} cannot be written")
        self.error: BaseException | None = None
        self.given_up = threading.Event()

    @abstractmethod
    def measure(self, model: str, folder: Path) -> Numbers:
        """Evaluate the model folder ``model`` and write outputs to ``folder``."""

    def rows(self) -> list[dict[str, Any]]:
        """Return the validated checkpoints: step, and value and interval of each metric."""
        path = str(self.folder / ROWS)
        rows: list[dict[str, Any]] = storage.read_json(path) if storage.exists(path) else []
        return rows

    def due(self, ended: bool) -> list[str]:
        """Return finished checkpoints to validate, including the last one if training has ``ended``."""
        last, found = max((row["step"] for row in self.rows()), default=0), []
        checkpoints = finished_checkpoints(self.run_dir)
        for checkpoint in checkpoints:
            step = checkpoint_step(checkpoint)
            if step - last >= self.schedule.every_steps or (ended and checkpoint == checkpoints[-1] and step > last):
                found.append(checkpoint)
                last = step
        return found

    def validate(self, checkpoint: str) -> dict[str, Any]:
        """Validate a checkpoint and return its row. The checkpoint is copied first, since training deletes old ones."""
        folder = self.folder / Path(checkpoint).name
        model = folder / "model"
        if not model.exists():
            with storage.atomic_dir(model) as copy:
                fs, path = storage.filesystem(checkpoint)
                for name in (WEIGHTS, EMA, CONFIG):
                    storage.retry(partial(fs.get_file, storage.join(path, name), str(copy / name)))
        return self.add({"step": checkpoint_step(checkpoint), "metrics": self.measure(str(model), folder)})

    def add(self, row: dict[str, Any]) -> dict[str, Any]:
        """Store a row, write the best one to ``best.json``, and delete the copies of all other models."""
        best_by = self.schedule.best_by
        rows = sorted([*(r for r in self.rows() if r["step"] != row["step"]), row], key=lambda r: r["step"])
        storage.write_json(str(self.folder / ROWS), rows)
        sign = -1 if better(best_by) == "lower" else 1
        known = [r for r in rows if r["metrics"][best_by]["value"] is not None]
        best = max(known, key=lambda r: (sign * r["metrics"][best_by]["value"], -r["step"]), default=row)
        model = Path(validated_model(str(self.folder), best["step"]))
        storage.write_json(str(self.folder / BEST_FILE), {**best, "best_by": best_by, "model": str(model)})
        write_report(self.folder, self.run_dir.rpartition("/")[2], rows, best["step"], best_by)
        for other in self.folder.glob("step-*/model"):
            if other != model:
                shutil.rmtree(other)
        return row

    def follow(self, ended: threading.Event) -> None:
        """Validate new checkpoints until training has ended and its last checkpoint is validated."""
        try:
            while not self.given_up.is_set():
                last_look = ended.is_set()
                for checkpoint in self.due(last_look):
                    try:
                        self.validate(checkpoint)
                    except FileNotFoundError:  # training keeps only the latest checkpoints
                        log.warning("validation: %s was deleted before it could be copied", checkpoint)
                if last_look:
                    return
                ended.wait(POLL)
        except BaseException as error:
            self.error = error


@contextmanager
def validating(validator: Validator | None) -> Iterator[None]:
    """Validate checkpoints in a background thread while the block trains; with None do nothing.

    Raises UserError for a failed validation after training has ended.
    """
    if validator is None:
        yield
        return
    ended = threading.Event()
    thread = threading.Thread(target=validator.follow, args=(ended,), daemon=True, name="validation")
    thread.start()
    try:
        yield
    except BaseException:
        validator.given_up.set()  # training failed: do not wait for pending validations
        raise
    ended.set()
    thread.join()
    if validator.error is not None:
        raise UserError(f"validation: {validator.error}") from validator.error
    best = storage.read_json(str(validator.folder / BEST_FILE))
    value = best["metrics"][best["best_by"]]["value"]
    about = {"step": best["step"], best["best_by"]: value}
    log.info("best by %s: step %d, %.4g; model %s", best["best_by"], best["step"], value, best["model"], extra=about)


def require_best_by(best_by: str, measured: Collection[str]) -> None:
    """Raise ValueError unless ``best_by`` is among the ``measured`` metrics and has a better direction."""
    if best_by not in measured or better(best_by) is None:
        names = ", ".join(name for name in measured if better(name)) or "one of metrics"
        raise ValueError(f"best_by {best_by}: expected a measured metric with a better direction: {names}")


def numbers(results: Iterable[tuple[str, dict[str, Any]]]) -> Numbers:
    """Convert metric results (JSON) to the form stored in a row."""
    return {name: {key: result[key] for key in ("name", "value", "low", "high")} for name, result in results}
