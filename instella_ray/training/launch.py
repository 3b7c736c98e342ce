"""Launching of training runs: validation, Ray Train or in-process training, progress bar and run record."""

from __future__ import annotations

import logging
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch

from .. import logs, storage
from ..config import dump_yaml, load_config
from ..errors import UserError
from ..models.folders import checkpoint_step, finished_checkpoints, latest_checkpoint
from ..runs import Provenance, recorded
from .distributed import SingleProcess
from .interrupts import StopRequest, stopping_on_signals
from .learner import require_deepspeed
from .loggers import check_loggers
from .loop import train_worker
from .optim import lr_scale
from .run_dir import ATTEMPTS, CONFIG, Attempt, last_metrics, located
from .settings import TrainConfig, TrainingRun, WorkersConfig, changes, first_difference
from .trainer import BuildTask

log = logging.getLogger(__name__)


class Launcher(Protocol):
    """Backend that runs the training loop; constructed after its resources were checked."""

    def train(
        self, build_task: BuildTask, cfg: TrainConfig, attempt: Attempt, fields: Mapping[str, Any], stop: StopRequest
    ) -> None:
        """Train to ``cfg.steps`` in every process of the run, with ``fields`` and the rank in its log records.

        KeyboardInterrupt if ``stop`` was made, after a checkpoint.
        """


def launch(
    run: TrainingRun,
    build_task: BuildTask,
    *,
    description: str,
    job: str = "train",
    inputs: Sequence[Provenance] = (),
) -> str:
    """Train ``build_task(device)`` on ``run.train.workers`` and return the final checkpoint's folder.

    ``build_task`` is called in every process with its device. The run directory's ``config.yaml`` holds all of ``run``,
    and its ``run.json`` lists the ``inputs``, as every checkpoint does. UserError if the directory already holds another
    run, there is nothing to resume or the run has other settings that may not be changed, a logger or the workers'
    resources are missing, a newer attempt has taken over the run, the last checkpoint cannot be written, or a worker found
    bad input. :class:`instella_ray.errors.Interrupted` on Ctrl-C and SIGTERM, after a checkpoint.
    """
    cfg = run.train.model_copy(update={"run_dir": located(run.train.run_dir)})
    run = run.model_copy(update={"train": cfg})
    check_loggers(cfg.loggers)
    if cfg.sharding == "zero2":
        require_deepspeed()
    begun = check_run_dir(run)
    launcher = _launcher(cfg.workers)
    attempt = Attempt.begin(cfg.run_dir, resume=bool(cfg.resume))
    storage.write_text(storage.join(cfg.run_dir, CONFIG), dump_yaml(run))

    fields = {"job": job, "run": logs.run_id(job), **logs.context(), "attempt": attempt.number}
    changed = _changed(begun, run) if begun is not None else {}
    with (
        stopping_on_signals() as stop,
        recorded(cfg.run_dir, job, run, inputs, changed) as outputs,
        _Progress(cfg, description),
    ):
        launcher.train(build_task, cfg, attempt, fields, stop)
        final = latest_checkpoint(cfg.run_dir)
        if checkpoint_step(final) < cfg.steps:
            raise UserError(f"run_dir {cfg.run_dir}: the run ended without the checkpoint of step {cfg.steps}")
        outputs.append(Provenance(role="checkpoint", kind="model", path=final, facts={"step": cfg.steps}))
    return final


def _launcher(workers: WorkersConfig) -> Launcher:
    """Build the launcher; UserError if this machine or the cluster lacks the workers' resources."""
    if workers.count == 0:
        return CallingProcess(workers)
    from .ray_train import RayTrain  # imports Ray, which in-process training does not need

    return RayTrain(workers)


def check_run_dir(run: TrainingRun) -> TrainingRun | None:
    """Return the run to resume, with the settings of its last attempt; None for a new run.

    UserError unless ``run.train.run_dir`` is empty or, with ``resume``, holds the same run, which has not done more steps.
    """
    run_dir, resume = run.train.run_dir, run.train.resume
    config_file = storage.join(run_dir, CONFIG)
    if not resume:
        check_free(run_dir)
        return None
    storage.invalidate_listing(config_file)
    if not storage.exists(config_file):
        if resume == "auto":
            # An attempt that ended before it wrote the configuration has left its mark alone.
            check_free(run_dir, besides=(ATTEMPTS,))
            return None
        raise UserError(f"run_dir {run_dir}: nothing to resume (no {CONFIG})")
    begun = load_config(type(run), config_file)
    if different := first_difference(begun, run):
        key, old, new = different
        raise UserError(f"run_dir {run_dir}: cannot resume with {key} = {new!r}, the run was started with {old!r}")
    if (done := _steps_done(run_dir)) > run.train.steps:
        raise UserError(
            f"run_dir {run_dir}: cannot resume with train.steps = {run.train.steps}, the run has done {done}"
        )
    return begun


def _steps_done(run_dir: str) -> int:
    """Return the steps of the run's last complete checkpoint; 0 if there is none."""
    return max(map(checkpoint_step, finished_checkpoints(run_dir)), default=0)


def _changed(begun: TrainingRun, run: TrainingRun) -> dict[str, tuple[Any, Any]]:
    """Return and log the settings that a resume changes, and what they make of the learning rate."""
    found = changes(begun, run)
    for key, (old, new) in found.items():
        log.info("resumed with another %s: %s -> %s", key, old, new, extra={"key": key, "old": old, "new": new})
    if not found:
        return found  # without listing the checkpoints again
    step = _steps_done(run.train.run_dir)
    old, new = (lr_scale(step, cfg.steps, cfg.optimizer) * cfg.optimizer.lr for cfg in (begun.train, run.train))
    if old != new:
        log.info("learning rate of the next step: %.4g -> %.4g", old, new, extra={"step": step})
    return found


def check_free(run_dir: str, besides: Collection[str] = ()) -> None:
    """Raise UserError unless ``run_dir`` does not exist or holds nothing but the names ``besides``."""
    storage.invalidate_listing(run_dir)
    if not storage.is_empty(run_dir, besides):
        raise UserError(
            f"run_dir {run_dir}: already holds a run; set resume=true to continue it, or choose another folder"
        )


class _Progress:
    """Progress bar that follows metrics.jsonl, which works wherever the workers run."""

    def __init__(self, cfg: TrainConfig, description: str) -> None:
        self.run_dir, self.ended = cfg.run_dir, threading.Event()
        self.interval = 1.0 if storage.is_local(cfg.run_dir) else 15.0
        self.bar = logs.progress_bar(total=cfg.steps, desc=description, unit="step")
        self.thread = threading.Thread(target=self._follow, daemon=True)

    def __enter__(self) -> None:
        self.thread.start()

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self.thread.join()
        self._update()
        self.bar.close()

    def _follow(self) -> None:
        while not self.ended.wait(self.interval):
            self._update()

    def _update(self) -> None:
        try:
            last = last_metrics(self.run_dir)
        except Exception:  # a failed read of the store must not stop the run
            return
        if last is None:
            return
        loss = f"{last['loss']:.4f}" if "loss" in last else "skipped"
        self.bar.set_postfix(loss=loss, img_s=last["images_per_second"], refresh=False)
        self.bar.update(last["step"] - self.bar.n)


class CallingProcess:
    """Launcher that trains in the calling process."""

    def __init__(self, workers: WorkersConfig) -> None:
        """Choose the device; UserError if a GPU is requested and none is available."""
        if workers.gpu and not torch.cuda.is_available():
            raise UserError("train.workers.gpu: PyTorch sees no GPU on this machine, which count 0 trains on")
        self.device = torch.device("cuda", torch.cuda.current_device()) if workers.gpu else torch.device("cpu")

    def train(
        self, build_task: BuildTask, cfg: TrainConfig, attempt: Attempt, fields: Mapping[str, Any], stop: StopRequest
    ) -> None:
        """Train to ``cfg.steps`` with ``fields`` in the log records; exceptions propagate unchanged."""
        with logs.carrying({**fields, "rank": 0}), _restored_threads():
            try:
                finished = train_worker(build_task, cfg, attempt, SingleProcess(self.device, stop))
            except Exception as error:
                log.error("training failed on rank 0: %s", error, extra={"failed_rank": 0})
                raise
        if not finished:
            raise KeyboardInterrupt


@contextmanager
def _restored_threads() -> Iterator[None]:
    """Restore this process's number of compute threads after the block."""
    before = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(before)
