"""Start a run on Ray Train: checks first, then workers, a progress bar, and the run directory."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ray
import ray.train.torch
import torch
from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig, WorkerGroupError
from ray.train.torch import TorchTrainer
from tqdm import tqdm

from .. import storage
from ..config import dump_yaml, load_config
from ..data.pipeline import init_ray
from ..errors import UserError
from .loggers import check_loggers
from .loop import Task, train_worker
from .settings import TrainingRun, WorkersConfig, first_difference

CHECKPOINTS, CONFIG = "checkpoints", "config.yaml"
log = logging.getLogger(__name__)


def launch(run: TrainingRun, build_task: Callable[[torch.device], Task], *, description: str) -> Path:
    """Train ``build_task(device)`` on ``run.train.workers`` and return the final checkpoint's folder.

    ``build_task`` is called on every worker with what that computes on. The run directory's ``config.yaml`` holds all
    of ``run``. UserError when the directory belongs to another run already, when there is nothing to resume or it was
    begun with other settings, when a logger or the workers' resources are missing, and for bad input that only a worker met.
    """
    cfg = run.train.model_copy(update={"run_dir": str(Path(run.train.run_dir).absolute())})
    run = run.model_copy(update={"train": cfg})
    run_dir = Path(cfg.run_dir)
    check_loggers(cfg.loggers)
    check_run_dir(run)
    init_ray()
    check_resources(cfg.workers, ray.cluster_resources())
    run_dir.mkdir(parents=True, exist_ok=True)
    storage.write_text(str(run_dir / CONFIG), dump_yaml(run))
    if cfg.resume:
        _forget_after_checkpoint(run_dir)

    def worker() -> None:
        train_worker(build_task(ray.train.torch.get_device()), cfg)

    resources: dict[str, float] = {"CPU": cfg.workers.cpus}
    if cfg.workers.gpu:
        resources["GPU"] = 1
    trainer = TorchTrainer(
        worker,
        scaling_config=ScalingConfig(
            num_workers=cfg.workers.count, use_gpu=cfg.workers.gpu, resources_per_worker=resources
        ),
        run_config=RunConfig(
            name=CHECKPOINTS,
            storage_path=str(run_dir),
            failure_config=FailureConfig(max_failures=cfg.workers.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=cfg.keep_checkpoints),
        ),
    )
    with _Progress(run_dir / "metrics.jsonl", cfg.steps, description):
        try:
            result = trainer.fit()
        except SystemExit:
            # Ray Train answers Ctrl-C by ending the process; what to end, and with which code, is the caller's.
            raise KeyboardInterrupt from None
        except WorkerGroupError as error:
            # Bad input that only a worker could meet, an undecodable picture say, is as much one line as any other.
            mistakes = [failure for failure in error.worker_failures.values() if isinstance(failure, UserError)]
            if mistakes:
                raise mistakes[0] from None
            raise
    if result.checkpoint is None:
        raise UserError(f"run_dir {run_dir}: the run ended without a checkpoint")
    return Path(result.checkpoint.path)


def latest_checkpoint(run_dir: str | Path) -> Path:
    """The newest complete checkpoint folder of a run; UserError where there is none."""
    folders = finished_checkpoints(run_dir)
    if not folders:
        raise UserError(f"run_dir {run_dir}: no finished checkpoint")
    return folders[-1]


def finished_checkpoints(run_dir: str | Path) -> list[Path]:
    """The complete checkpoint folders that a run has kept, oldest first."""
    return sorted(path.parent for path in Path(run_dir, CHECKPOINTS).glob("step-*/state.json"))


def read_metrics(run_dir: str | Path) -> list[dict[str, Any]]:
    """The logged steps of a run, in order."""
    path = Path(run_dir, "metrics.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _forget_after_checkpoint(run_dir: Path) -> None:
    """Drop logged steps after the checkpoint that the run goes on from: they will be trained, and logged, anew."""
    try:
        step = json.loads((latest_checkpoint(run_dir) / "state.json").read_text())["step"]
    except UserError:
        step = 0
    kept = [json.dumps(m) + "\n" for m in read_metrics(run_dir) if m["step"] <= step]
    storage.write_text(str(run_dir / "metrics.jsonl"), "".join(kept))


def check_resources(workers: WorkersConfig, have: Mapping[str, float]) -> None:
    """UserError for workers that cannot be placed on what there is: the run would wait silently for ever."""
    need = {"CPU": workers.count * workers.cpus, "GPU": workers.count * float(workers.gpu)}
    for name, amount in need.items():
        if amount > have.get(name, 0):
            raise UserError(f"{workers.count} workers need {amount:g} {name}, the cluster has {have.get(name, 0):g}")


def check_run_dir(run: TrainingRun) -> None:
    """UserError unless ``run.train.run_dir`` is free, or holds the same run where that is to be resumed."""
    run_dir = Path(run.train.run_dir)
    config_file = run_dir / CONFIG
    if not run.train.resume:
        if not storage.is_empty(str(run_dir)):
            raise UserError(
                f"run_dir {run_dir}: holds a run already; resume=true goes on with it, or choose another folder"
            )
        return
    if not config_file.exists():
        raise UserError(f"run_dir {run_dir}: nothing to resume (no {CONFIG})")
    if different := first_difference(load_config(type(run), str(config_file)), run):
        key, old, new = different
        raise UserError(f"run_dir {run_dir}: cannot resume with {key} = {new!r}, the run began with {old!r}")


class _Progress:
    """A progress bar fed from metrics.jsonl, which the workers write wherever they run."""

    def __init__(self, path: Path, steps: int, description: str) -> None:
        self.path, self.ended = path, threading.Event()
        self.bar = tqdm(total=steps, desc=description, unit="step", dynamic_ncols=True)
        self.thread = threading.Thread(target=self._follow, daemon=True)

    def __enter__(self) -> None:
        self.thread.start()

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self.thread.join()
        self._update()
        self.bar.close()

    def _follow(self) -> None:
        while not self.ended.wait(1.0):
            self._update()

    def _update(self) -> None:
        try:
            last = json.loads(self.path.read_text().splitlines()[-1])
        except (OSError, IndexError, ValueError):
            return
        self.bar.set_postfix(loss=f"{last['loss']:.4f}", img_s=last["images_per_second"], refresh=False)
        self.bar.update(last["step"] - self.bar.n)
