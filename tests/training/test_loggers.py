"""Loggers: figures and images reach them, a resumed run goes on without double steps, what is missing is said at once."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from instella_ray import storage
from instella_ray.config import dump_yaml
from instella_ray.errors import UserError
from instella_ray.training.loggers import RUN_IDS, LoggerName, check_loggers, open_loggers
from instella_ray.training.tokenizer import run_tokenizer

from ..kit.training import tokenizer_config

IMAGE = np.zeros((8, 16, 3), np.uint8)


def log(names: list[LoggerName], run_dir: Path, start: int, steps: range) -> None:
    """A run that goes on after ``start`` steps, logs ``steps`` and their loss, and one preview at the end."""
    for logger in open_loggers(names, run_dir, start):
        for step in steps:
            logger.scalars(step, {"loss": step / 10, "lr": 1e-4})
        logger.image(steps[-1], IMAGE)
        logger.close()


def test_tensorboard_shows_a_resumed_run_without_double_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorboard", reason="the package tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.summary.writer import event_file_writer

    # Within a second, number 10 of a process comes before its number 9 by name.
    monkeypatch.setattr(event_file_writer._global_uid, "_value", 9)
    log(["tensorboard"], tmp_path, 0, range(1, 9))
    log(["tensorboard"], tmp_path, 6, range(7, 11))  # the checkpoint of step 6 was the last
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, round(event.value, 4)) for event in events.Scalars("loss")] == [
        (step, step / 10) for step in range(1, 11)
    ]
    assert [(image.step, image.width, image.height) for image in events.Images("preview")] == [(10, 16, 8)]


def test_event_files_are_copied_to_where_they_cannot_grow(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="the package tensorboard is not installed")
    run_dir = f"memory://{tmp_path.name}/run"
    (logger,) = open_loggers(["tensorboard"], run_dir, 0)
    logger.scalars(1, {"loss": 0.5})
    logger.close()
    (events,) = storage.glob(f"{run_dir}/tensorboard/*")
    assert b"loss" in storage.read_bytes(events)


def test_none_means_tensorboard_where_it_is_installed(tmp_path: Path) -> None:
    names = [type(logger).__name__ for logger in open_loggers(None, tmp_path, 0)]
    assert names == (["TensorBoardLogger"] if importlib.util.find_spec("tensorboard") else [])
    check_loggers(["prometheus"])  # Ray brings it
    assert type(open_loggers(["prometheus"], tmp_path, 0)[0]).__name__ == "PrometheusLogger"
    assert open_loggers((), tmp_path, 0) == []


@pytest.mark.parametrize("name", ["wandb", "mlflow", "tensorboard"])
def test_a_logger_that_is_not_installed_stops_the_run_before_it_begins(
    name: str, no_ray: None, shards: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda asked: None if asked == name else find(asked))
    with pytest.raises(UserError, match=rf"train\.loggers: {name} is not installed \(pip install {name}\)"):
        run_tokenizer(tokenizer_config(shards, tmp_path / "run", loggers=(name,)))
    assert not (tmp_path / "run").exists()
    # A worker may lack what the machine has that started the run.
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match=rf"train\.loggers: {name} cannot be imported"):
        open_loggers([name], tmp_path, 0)  # type: ignore[list-item]


def test_mlflow_needs_an_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    with pytest.raises(UserError, match="MLFLOW_TRACKING_URI"):
        check_loggers(["mlflow"])


class FakeWandb:
    """The calls that the adapter makes: the real package is not among this project's, and wants an account or a server."""

    def __init__(self) -> None:
        self.begun: list[dict[str, Any]] = []
        self.logged: list[tuple[int, list[str]]] = []
        self.finished = 0

    def init(self, **options: Any) -> Any:
        self.begun.append(options)
        log = lambda values, step: self.logged.append((step, sorted(values)))  # noqa: E731
        return SimpleNamespace(id=options["id"] or "abc", log=log, finish=self.finish)

    def finish(self) -> None:
        self.finished += 1

    def Image(self, pixels: np.ndarray) -> tuple[int, ...]:
        return pixels.shape


def test_wandb_goes_on_with_the_run_that_it_began(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)  # type: ignore[arg-type]
    (tmp_path / "config.yaml").write_text(dump_yaml(tokenizer_config("data", tmp_path)))
    log(["wandb"], tmp_path, 0, range(1, 3))
    log(["wandb"], tmp_path, 2, range(3, 5))
    assert [(begun["id"], begun["resume"]) for begun in fake.begun] == [(None, None), ("abc", "allow")]
    assert fake.begun[0]["config"]["train"]["steps"] == 12 and fake.begun[0]["name"] == tmp_path.name
    scalars = [step for step, names in fake.logged if names == ["loss", "lr"]]
    assert scalars == [1, 2, 3, 4] and [s for s, names in fake.logged if names == ["preview"]] == [2, 4]
    assert fake.finished == 2 and json.loads((tmp_path / RUN_IDS).read_text()) == {"wandb": "abc"}


class FakeMlflow:
    """A tracking server's client, kept in memory: the real package is not among this project's."""

    entities = SimpleNamespace(Metric=lambda name, value, at, step: SimpleNamespace(key=name, value=value, step=step))

    def __init__(self) -> None:
        self.experiments: dict[str, str] = {}
        self.metrics: dict[str, list[Any]] = {}
        self.images: list[tuple[str, int]] = []
        self.status: dict[str, str] = {}

    def MlflowClient(self, tracking_uri: str) -> FakeMlflow:
        assert tracking_uri == "http://127.0.0.1:1"
        return self

    def get_experiment_by_name(self, name: str) -> Any:
        return SimpleNamespace(experiment_id=self.experiments[name]) if name in self.experiments else None

    def create_experiment(self, name: str) -> str:
        return self.experiments.setdefault(name, "1")

    def create_run(self, experiment: str, run_name: str) -> Any:
        run_id = f"run{len(self.metrics)}"
        self.metrics[run_id], self.status[run_id] = [], "RUNNING"
        return SimpleNamespace(info=SimpleNamespace(run_id=run_id))

    def update_run(self, run_id: str, status: str) -> None:
        self.status[run_id] = status

    def get_metric_history(self, run_id: str, key: str) -> list[Any]:
        return [metric for metric in self.metrics[run_id] if metric.key == key]

    def log_batch(self, run_id: str, metrics: list[Any]) -> None:
        self.metrics[run_id] += metrics

    def log_image(self, run_id: str, image: np.ndarray, key: str, step: int) -> None:
        self.images.append((key, step))

    def set_terminated(self, run_id: str) -> None:
        self.status[run_id] = "FINISHED"


def test_mlflow_keeps_each_step_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeMlflow()
    monkeypatch.setitem(sys.modules, "mlflow", fake)  # type: ignore[arg-type]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1")
    log(["mlflow"], tmp_path, 0, range(1, 9))
    log(["mlflow"], tmp_path, 6, range(7, 11))
    assert [metric.step for metric in fake.metrics["run0"] if metric.key == "loss"] == list(range(1, 11))
    assert fake.images == [("preview", 8), ("preview", 10)] and fake.status == {"run0": "FINISHED"}
    log(["mlflow"], tmp_path / "other", 0, range(1, 2))
    assert set(fake.metrics) == {"run0", "run1"} and fake.experiments == {"instella-ray": "1"}
