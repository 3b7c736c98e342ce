"""Loggers of training metrics: TensorBoard, Weights & Biases, MLflow and Prometheus. Only rank 0 writes.

Each package is imported only if its logger is configured. A resumed run continues the existing log.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import math
import os
import re
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
"""File of a run directory with the run's ids at Weights & Biases and MLflow."""
PROJECT = "instella-ray"
PREVIEW, PREVIEWS = "preview", "preview_over_time"
"""Names of the latest preview, and of the grid of those of all steps so far."""
COPY_EVERY = 60.0
"""Seconds between two copies of TensorBoard event files to an object store, where files cannot be appended to."""
log = logging.getLogger(__name__)


class Logger(Protocol):
    """Destination of metrics and preview images."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Log metrics after ``step`` optimizer steps."""

    def image(self, step: int, pixels: np.ndarray, name: str = PREVIEW) -> None:
        """Log an image after ``step`` optimizer steps, uint8 ``[H, W, 3]``."""

    def close(self) -> None:
        """Flush and close the log."""


class TensorBoardLogger:
    """Event files in ``RUN/tensorboard``: written in place, or for a remote run directory locally and copied regularly."""

    def __init__(self, run_dir: str, start: int) -> None:
        _import("tensorboard")
        from torch.utils.tensorboard import SummaryWriter

        self.url = storage.join(run_dir, "tensorboard")
        self.copied = time.monotonic()
        self.local = storage.is_local(run_dir)
        folder = self.url if self.local else tempfile.mkdtemp(prefix="instella-ray-")
        _wait_for_a_later_second(self.url)
        # Steps after the resumed checkpoint are trained and logged again: readers drop their earlier events.
        self.writer = SummaryWriter(folder, purge_step=start + 1)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()
        if not self.local and time.monotonic() - self.copied > COPY_EVERY:
            self._copy()

    def image(self, step: int, pixels: np.ndarray, name: str = PREVIEW) -> None:
        self.writer.add_image(name, pixels, step, dataformats="HWC")

    def close(self) -> None:
        self.writer.close()
        if not self.local:
            self._copy()
            shutil.rmtree(self.writer.log_dir)

    def _copy(self) -> None:
        try:
            for file in Path(self.writer.log_dir).iterdir():
                storage.write_bytes(storage.join(self.url, file.name), file.read_bytes())
        except Exception as error:  # stores raise unrelated error types, and a failed copy must not fail the run
            log.error("%s: could not be written (%s)", self.url, error)
        self.copied = time.monotonic()


class WandbLogger:
    """Weights & Biases run, configured by the ``WANDB_*`` variables; the service ignores steps already logged."""

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
        _save_run_id(run_dir, "wandb", self.run.id)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self.run.log(dict(values), step=step)

    def image(self, step: int, pixels: np.ndarray, name: str = PREVIEW) -> None:
        self.run.log({name: self.wandb.Image(pixels)}, step=step)

    def close(self) -> None:
        self.run.finish()


class MlflowLogger:
    """MLflow run on the server at ``MLFLOW_TRACKING_URI``; steps already logged are skipped."""

    def __init__(self, run_dir: str, start: int) -> None:
        self.mlflow = _import("mlflow")
        self.client = self.mlflow.MlflowClient(tracking_uri=_tracking_uri())
        known = _run_ids(run_dir).get("mlflow")
        self.run_id = known or self._create(_name(run_dir))
        self.seen = 0
        if known:
            self.client.update_run(known, status="RUNNING")
            self.seen = max((m.step for m in self.client.get_metric_history(known, "loss")), default=0)
        _save_run_id(run_dir, "mlflow", self.run_id)

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

    def image(self, step: int, pixels: np.ndarray, name: str = PREVIEW) -> None:
        if step > self.seen:
            self.client.log_image(self.run_id, pixels, key=name, step=step)

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
    """Raise UserError if a logger's package is not installed or its server address is not set."""
    for name in names or ():
        if name != "prometheus" and importlib.util.find_spec(name) is None:  # Ray includes the Prometheus client
            raise UserError(f"train.loggers: {name} is not installed (pip install {name})")
        if name == "mlflow":
            _tracking_uri()


def open_loggers(names: Sequence[LoggerName] | None, run_dir: str | Path, start: int) -> list[Logger]:
    """Open the loggers ``names`` for a run that starts after ``start`` steps; None means TensorBoard if installed."""
    default: tuple[LoggerName, ...] = ("tensorboard",) if importlib.util.find_spec("tensorboard") else ()
    return [LOGGERS[name](located(run_dir), start) for name in (default if names is None else names)]


def _wait_for_a_later_second(folder: str) -> None:
    """Wait up to a second, until an event file begun now is named after those in ``folder``.

    Readers take event files in the order of their names, ``events.out.tfevents.SECONDS.HOST.PROCESS.NUMBER``: of two from
    one second the later may come first, and its steps are then dropped for the earlier's.
    """
    files = "\n".join(storage.glob(f"{folder}/events.out.tfevents.*"))
    latest = max(map(int, re.findall(r"/events\.out\.tfevents\.(\d+)\.", files)), default=0)
    time.sleep(min(max(0.0, latest + 1 - time.time()), 1.0))


def _import(name: str) -> Any:
    """Import a logger's package; UserError if it is missing, as installed packages may differ between nodes."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(f"train.loggers: {name} cannot be imported ({error}); pip install {name}") from None


def _tracking_uri() -> str:
    if uri := os.environ.get("MLFLOW_TRACKING_URI"):
        return uri
    raise UserError("train.loggers: mlflow needs the server's address in MLFLOW_TRACKING_URI")


def _name(run_dir: str) -> str:
    """Return the run's display name: the name of its directory."""
    return run_dir.rstrip("/").rpartition("/")[2]


def _run_ids(run_dir: str) -> dict[str, str]:
    file = storage.join(run_dir, RUN_IDS)
    return storage.read_json(file) if storage.exists(file) else {}


def _save_run_id(run_dir: str, tracker: str, run_id: str) -> None:
    storage.write_json(storage.join(run_dir, RUN_IDS), {**_run_ids(run_dir), tracker: run_id})


GAUGES = {
    "loss": "Training loss, mean over ranks and over the steps since the last logged one.",
    "held_out_loss": "Loss of the held-out samples with the EMA weights.",
    "gradient_norm": "Gradient norm before clipping, mean over the steps since the last logged one.",
    "images_per_second": "Training throughput of all workers.",
    "data_wait": "Fraction of time that rank 0 waited for data.",
    "flops_per_second": "Model FLOP/s of all workers.",
    "mfu": "Model FLOP/s as a fraction of the peak.",
    "memory_gb": "Peak memory of rank 0 in GB.",
    "checkpoint_age_seconds": "Seconds since the last checkpoint of this attempt, or since its start.",
}


class PrometheusLogger:
    """Gauges ``instella_training_METRIC`` with the tag ``run``, and ``_step``, ``_finite`` and ``_running`` (1 or 0).

    Ray prefixes each name with ``ray_`` and adds process tags, so a restarted worker starts a new time series.
    """

    def __init__(self, run_dir: Path | str, start: int) -> None:
        self.tags = {"run": str(run_dir)}
        self._step = self._gauge("step", "Completed optimizer steps.")
        self._finite = self._gauge("finite", "1 while all metrics are finite, else 0.")
        self._running = self._gauge("running", "1 while the run is in progress; 0 after it finished successfully.")
        self._figures = {name: self._gauge(name, about) for name, about in GAUGES.items()}
        self._step.set(start, tags=self.tags)
        self._running.set(1, tags=self.tags)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._step.set(step, tags=self.tags)
        self._finite.set(float(all(map(math.isfinite, values.values()))), tags=self.tags)
        for name, gauge in self._figures.items():
            if math.isfinite(value := values.get(name, math.nan)):
                gauge.set(value, tags=self.tags)

    def image(self, step: int, pixels: np.ndarray, name: str = PREVIEW) -> None:
        """Do nothing: Prometheus stores only numbers; images are in the run directory."""

    def close(self) -> None:
        self._running.set(0, tags=self.tags)

    def _gauge(self, name: str, about: str) -> Gauge:
        from ray.util.metrics import Gauge

        return Gauge(f"instella_training_{name}", description=about, tag_keys=("run",))
