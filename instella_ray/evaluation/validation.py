"""Validation while a generator trains: its checkpoints are sampled and measured on other workers, and the best is kept."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from .. import storage
from ..config import Config
from ..data.prompts import SCENES
from ..errors import UserError
from ..models.checkpoint import CONFIG, EMA, WEIGHTS
from ..sampling_config import SamplingConfig
from ..training.generator import GeneratorRunConfig
from ..training.launch import finished_checkpoints
from .evaluate import EvaluateConfig, run_evaluate
from .metric_settings import MetricsConfig
from .metrics.base import better
from .plan import SampleConfig
from .results import Evaluation
from .sample import run_sample

FOLDER, ROWS, BEST = "validation", "validation.json", "best.json"
POLL = 2.0
"""Seconds between two looks for new checkpoints."""


class ValidationConfig(Config):
    """What a checkpoint is asked to draw, how that is measured, and by what the best one is told."""

    every_steps: int = Field(2000, ge=1)
    """Steps between two checkpoints that are measured; the last one always is."""
    prompts: str = SCENES
    """As of jobs/sample.py."""
    count: int | None = Field(240, ge=1)
    images_per_prompt: int = Field(1, ge=1)
    seed: int = Field(0, ge=0)
    sampling: SamplingConfig = SamplingConfig(guidance_scale=4.0, temperature=0.6)
    text_length: int = Field(128, ge=1)
    size: int | None = Field(None, ge=16)
    """Pixels a side of the pictures; none means the tokenizer's own."""
    metrics: MetricsConfig | None = None
    """As of jobs/evaluate.py."""
    best_by: str = "scene_score"
    """Metric that tells the best checkpoint."""
    batch_size: int = Field(16, ge=1)
    actors: int | None = Field(1, ge=1)
    gpus_per_actor: float = Field(0.0, ge=0)

    @model_validator(mode="after")
    def _best_can_be_told(self) -> ValidationConfig:
        measured = self.metrics.sections() if self.metrics else ["scene_score"] if self.prompts == SCENES else []
        if self.best_by not in measured or better(self.best_by) is None:
            names = ", ".join(name for name in measured if better(name)) or "one of metrics"
            raise ValueError(
                f"best_by {self.best_by}: expected a metric that is measured and has a better end: {names}"
            )
        return self


class ValidatedRun(GeneratorRunConfig):
    """A generator run whose checkpoints may be validated."""

    validation: ValidationConfig | None = None
    """None: training alone."""


class Validator:
    """Measures checkpoints of a run into ``RUN_DIR/validation``: a folder each, and a row each in ``validation.json``."""

    def __init__(self, cfg: ValidationConfig, run_dir: str, tokenizer: str) -> None:
        self.cfg, self.run_dir, self.tokenizer = cfg, Path(run_dir).absolute(), tokenizer
        self.folder = self.run_dir / FOLDER
        self.error: BaseException | None = None
        self.given_up = threading.Event()

    def rows(self) -> list[dict[str, Any]]:
        """Step, and value and interval of each metric, of what was measured so far."""
        path = str(self.folder / ROWS)
        rows: list[dict[str, Any]] = storage.read_json(path) if storage.exists(path) else []
        return rows

    def due(self, ended: bool) -> list[Path]:
        """Finished checkpoints that are to be measured; once training has ``ended``, the last one among them."""
        last, found = max((row["step"] for row in self.rows()), default=0), []
        checkpoints = [c for c in finished_checkpoints(self.run_dir) if ended or _settled(c)]
        for checkpoint in checkpoints:
            final = ended and checkpoint == checkpoints[-1] and _step(checkpoint) > last
            if final or _step(checkpoint) - last >= self.cfg.every_steps:
                found.append(checkpoint)
                last = _step(checkpoint)
        return found

    def validate(self, checkpoint: Path) -> dict[str, Any]:
        """Sample and measure a checkpoint; returns its row. It is copied first, as training deletes old ones."""
        cfg, folder = self.cfg, self.folder / checkpoint.name
        model = folder / "model"
        if not model.exists():
            with storage.atomic_dir(model) as copy:
                for name in (WEIGHTS, EMA, CONFIG):
                    shutil.copy(checkpoint / name, copy / name)
        spread: dict[str, Any] = {"actors": cfg.actors, "gpus_per_actor": cfg.gpus_per_actor}
        places = {"model": str(model), "output": str(folder / "samples"), "mode": "resume"}
        asked = ("prompts", "count", "images_per_prompt", "seed", "sampling", "text_length", "batch_size")
        run_sample(SampleConfig(**places, **{name: getattr(cfg, name) for name in asked}, **spread))
        evaluation = EvaluateConfig(
            samples=places["output"],
            tokenizer=self.tokenizer,
            output=str(folder / "evaluation"),
            mode="resume",
            size=cfg.size,
            metrics=cfg.metrics,
            batch_size=cfg.batch_size,
            **spread,
        )
        run_evaluate(evaluation)
        (setting,) = Evaluation(evaluation.output).settings.values()
        numbers = {
            name: {key: result[key] for key in ("name", "value", "low", "high")}
            for name, result in setting["metrics"].items()
        }
        return self.add({"step": _step(checkpoint), "metrics": numbers})

    def add(self, row: dict[str, Any]) -> dict[str, Any]:
        """Note a row, mark the best one in ``best.json``, and drop the copies of all other models."""
        rows = sorted([*(r for r in self.rows() if r["step"] != row["step"]), row], key=lambda r: r["step"])
        storage.write_json(str(self.folder / ROWS), rows)
        sign = -1 if better(self.cfg.best_by) == "lower" else 1
        known = [r for r in rows if r["metrics"][self.cfg.best_by]["value"] is not None]
        best = max(known, key=lambda r: (sign * r["metrics"][self.cfg.best_by]["value"], -r["step"]), default=row)
        model = self.folder / f"step-{best['step']:07d}" / "model"
        storage.write_json(str(self.folder / BEST), {**best, "best_by": self.cfg.best_by, "model": str(model)})
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
                        print(f"validation: {checkpoint.name} was gone before it could be copied", flush=True)
                if last_look:
                    return
                ended.wait(POLL)
        except BaseException as error:
            self.error = error


@contextmanager
def validating(run: ValidatedRun) -> Iterator[None]:
    """Validate in the background what the block trains; a problem is raised once training is done."""
    if run.validation is None:
        yield
        return
    ended = threading.Event()
    validator = Validator(run.validation, run.train.run_dir, run.tokenizer)
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
    print(f"best by {best['best_by']}: step {best['step']}, {value:.4g}; model {best['model']}", flush=True)


def _settled(checkpoint: Path) -> bool:
    """Whether all of it has been there for a while: its files are copied one after another."""
    try:
        return max(path.stat().st_mtime for path in checkpoint.iterdir()) < time.time() - POLL
    except FileNotFoundError:
        return False


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))
