"""Where a run's figures go beside ``metrics.jsonl``: TensorBoard, Weights & Biases, MLflow, Prometheus. Rank 0 alone writes.

Each is imported only where it is asked for. A resumed run goes on with the log that it began.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import math
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np

from .. import storage
from ..config import read_yaml
from ..errors import UserError
from .run_dir import CONFIG, located

if TYPE_CHECKING:
    from ray.util.metrics import Gauge

LoggerName = Literal["tensorboard", "wandb", "mlflow", "prometheus"]
RUN_IDS = "loggers.json"
"""File of a run directory that names the run as trackers know it."""
PROJECT = "instella-ray"
COPY_EVERY = 60.0
"""Seconds between two copies of event files to where they cannot grow."""
log = logging.getLogger(__name__)


class Logger(Protocol):
    """One place that figures and images go to."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """The figures after ``step`` optimizer steps."""

    def image(self, step: int, pixels: np.ndarray) -> None:
        """The preview after ``step`` optimizer steps, uint8 ``[H, W, 3]``."""

    def close(self) -> None:
        """Nothing comes after this."""


class TensorBoardLogger:
    """Event files in ``RUN/tensorboard``; they grow there, or on this machine and are copied from time to time."""

    def __init__(self, run_dir: str, start: int) -> None:
        _import("tensorboard")
        from torch.utils.tensorboard import SummaryWriter

        self.url = storage.join(run_dir, "tensorboard")
        self.copied = time.monotonic()
        self.local = storage.is_local(run_dir)
        folder = self.url if self.local else tempfile.mkdtemp(prefix="instella-ray-")
        # What an earlier attempt logged after the checkpoint that the run goes on from is logged anew: readers drop it.
        self.writer = SummaryWriter(folder, purge_step=start + 1)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()
        if not self.local and time.monotonic() - self.copied > COPY_EVERY:
            self._copy()

    def image(self, step: int, pixels: np.ndarray) -> None:
        self.writer.add_image("preview", pixels, step, dataformats="HWC")

    def close(self) -> None:
        self.writer.close()
        if not self.local:
            self._copy()
            shutil.rmtree(self.writer.log_dir)

    def _copy(self) -> None:
        try:
            for file in Path(self.writer.log_dir).iterdir():
                storage.write_bytes(storage.join(self.url, file.name), file.read_bytes())
        except Exception as error:  # each store has errors of its own, and none of them is worth a run
            log.error("%s: could not be written (%s)", self.url, error)
        self.copied = time.monotonic()


class WandbLogger:
    """A run at Weights & Biases, which ignores steps that it has seen; the ``WANDB_*`` variables say where and how."""

    def __init__(self, run_dir: str, start: int) -> None:
        self.wandb = _import("wandb")
        known = _run_ids(run_dir).get("wandb")
        self.run = self.wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=_name(run_dir),
            dir=run_dir if storage.is_local(run_dir) else None,
            id=known,
            resume="allow" if known else None,
            config=read_yaml(storage.join(run_dir, CONFIG)),
        )
        _remember(run_dir, "wandb", self.run.id)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self.run.log(dict(values), step=step)

    def image(self, step: int, pixels: np.ndarray) -> None:
        self.run.log({"preview": self.wandb.Image(pixels)}, step=step)

    def close(self) -> None:
        self.run.finish()


class MlflowLogger:
    """A run on the MLflow server that ``MLFLOW_TRACKING_URI`` names, with what it has seen already left out."""

    def __init__(self, run_dir: str, start: int) -> None:
        self.mlflow = _import("mlflow")
        self.client = self.mlflow.MlflowClient(tracking_uri=_tracking_uri())
        known = _run_ids(run_dir).get("mlflow")
        self.run_id = known or self._create(_name(run_dir))
        self.seen = 0
        if known:
            self.client.update_run(known, status="RUNNING")
            self.seen = max((m.step for m in self.client.get_metric_history(known, "loss")), default=0)
        _remember(run_dir, "mlflow", self.run_id)

    def _create(self, name: str) -> str:
        title = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        found = self.client.get_experiment_by_name(title)
        experiment = found.experiment_id if found else self.client.create_experiment(title)
        return self.client.create_run(experiment, run_name=name).info.run_id

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        if step > self.seen:
            now = int(time.time() * 1000)
            metrics = [self.mlflow.entities.Metric(name, value, now, step) for name, value in values.items()]
            self.client.log_batch(self.run_id, metrics=metrics)

    def image(self, step: int, pixels: np.ndarray) -> None:
        if step > self.seen:
            self.client.log_image(self.run_id, pixels, key="preview", step=step)

    def close(self) -> None:
        self.client.set_terminated(self.run_id)


def _prometheus(run_dir: str, start: int) -> Logger:

    return PrometheusLogger(run_dir, start)


LOGGERS: dict[LoggerName, Callable[[str, int], Logger]] = {
    "tensorboard": TensorBoardLogger,
    "wandb": WandbLogger,
    "mlflow": MlflowLogger,
    "prometheus": _prometheus,
}


def check_loggers(names: Sequence[LoggerName] | None) -> None:
    """UserError for a logger whose package is not installed, or that would not know where to log."""
    for name in names or ():
        if name != "prometheus" and importlib.util.find_spec(name) is None:  # that one Ray brings
            raise UserError(f"train.loggers: {name} is not installed (pip install {name})")
        if name == "mlflow":
            _tracking_uri()


def open_loggers(names: Sequence[LoggerName] | None, run_dir: str | Path, start: int) -> list[Logger]:
    """Those named, for a run that has ``start`` steps behind it; None means TensorBoard where it is installed."""
    default: tuple[LoggerName, ...] = ("tensorboard",) if importlib.util.find_spec("tensorboard") else ()
    return [LOGGERS[name](located(run_dir), start) for name in (default if names is None else names)]


def _import(name: str) -> Any:
    """A worker may run where the packages are others than on the machine that started the run."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(f"train.loggers: {name} cannot be imported ({error}); pip install {name}") from None


def _tracking_uri() -> str:
    if uri := os.environ.get("MLFLOW_TRACKING_URI"):
        return uri
    raise UserError("train.loggers: mlflow needs the server's address in MLFLOW_TRACKING_URI")


def _name(run_dir: str) -> str:
    """A run's name among others: its directory's."""
    return run_dir.rstrip("/").rpartition("/")[2]


def _run_ids(run_dir: str) -> dict[str, str]:
    file = storage.join(run_dir, RUN_IDS)
    return storage.read_json(file) if storage.exists(file) else {}


def _remember(run_dir: str, tracker: str, run_id: str) -> None:
    storage.write_json(storage.join(run_dir, RUN_IDS), {**_run_ids(run_dir), tracker: run_id})


GAUGES = {
    "loss": "Mean over the ranks.",
    "gradient_norm": "Before clipping.",
    "images_per_second": "Of all workers.",
    "data_wait": "Share of the time that the first worker waited for data.",
    "flops_per_second": "Of all workers, as the networks need it.",
    "mfu": "Share of the peak that is.",
    "memory_gb": "What the first worker held at most.",
}


class PrometheusLogger:
    """Gauges ``instella_training_FIGURE`` by the tag ``run``, beside ``_step``, ``_finite`` and ``_running`` (1 or 0).

    Ray prefixes each name with ``ray_`` and adds tags of the process: a restarted worker is a series of its own.
    """

    def __init__(self, run_dir: Path | str, start: int) -> None:
        self.tags = {"run": str(run_dir)}
        self._step = self._gauge("step", "Optimizer steps behind the run.")
        self._finite = self._gauge("finite", "1 while every figure is a finite number.")
        self._running = self._gauge("running", "1 until the run ends well.")
        self._figures = {name: self._gauge(name, about) for name, about in GAUGES.items()}
        self._step.set(start, tags=self.tags)
        self._running.set(1, tags=self.tags)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._step.set(step, tags=self.tags)
        self._finite.set(float(all(map(math.isfinite, values.values()))), tags=self.tags)
        for name, gauge in self._figures.items():
            if math.isfinite(value := values.get(name, math.nan)):
                gauge.set(value, tags=self.tags)

    def image(self, step: int, pixels: np.ndarray) -> None:
        """Prometheus takes numbers alone: images are in the run directory."""

    def close(self) -> None:
        self._running.set(0, tags=self.tags)

    def _gauge(self, name: str, about: str) -> Gauge:
        from ray.util.metrics import Gauge

        return Gauge(f"instella_training_{name}", description=about, tag_keys=("run",))
