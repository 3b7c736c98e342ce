"""Start a run on Ray Train: checks first, then workers, a progress bar, and the run directory."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from tqdm import tqdm

from .. import storage
from ..config import dump_yaml
from ..errors import UserError
from .loop import Task, train_worker
from .settings import TrainConfig

CHECKPOINTS = "checkpoints"
log = logging.getLogger(__name__)


def launch(cfg: TrainConfig, build_task: Callable[[], Task], *, description: str) -> Path:
    """Train ``build_task()`` on ``cfg.workers`` and return the final checkpoint's folder.

    ``build_task`` is called on every worker. UserError when the run directory belongs to another run already, when
    there is nothing to resume, or when the cluster lacks the workers' resources.
    """
    run_dir = Path(cfg.run_dir).absolute()
    cfg = cfg.model_copy(update={"run_dir": str(run_dir)})
    config_file = run_dir / "config.yaml"
    if cfg.resume and not config_file.exists():
        raise UserError(f"run_dir {run_dir}: nothing to resume (no config.yaml)")
    if not cfg.resume and not storage.is_empty(str(run_dir)):
        raise UserError(
            f"run_dir {run_dir}: holds a run already; resume=true goes on with it, or choose another folder"
        )
    _check_resources(cfg)
    run_dir.mkdir(parents=True, exist_ok=True)
    storage.write_text(str(config_file), dump_yaml(cfg))
    if cfg.resume:
        _forget_after_checkpoint(run_dir)

    def worker() -> None:
        train_worker(build_task(), cfg)

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
    if result.checkpoint is None:
        raise UserError(f"run_dir {run_dir}: the run ended without a checkpoint")
    return Path(result.checkpoint.path)


def latest_checkpoint(run_dir: str | Path) -> Path:
    """The newest complete checkpoint folder of a run; UserError where there is none."""
    folders = sorted(path.parent for path in Path(run_dir, CHECKPOINTS).glob("step-*/state.json"))
    if not folders:
        raise UserError(f"run_dir {run_dir}: no finished checkpoint")
    return folders[-1]


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


def _check_resources(cfg: TrainConfig) -> None:
    # A worker group that can never be placed would wait silently forever.
    have = ray.cluster_resources()
    need = {"CPU": cfg.workers.count * cfg.workers.cpus, "GPU": cfg.workers.count * float(cfg.workers.gpu)}
    for name, amount in need.items():
        if amount > have.get(name, 0):
            raise UserError(
                f"{cfg.workers.count} workers need {amount:g} {name}, the cluster has {have.get(name, 0):g}"
            )


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
