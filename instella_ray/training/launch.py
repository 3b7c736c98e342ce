"""Start a run: checks, then the processes that train it or this one, a progress bar, and the record of its end."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from tqdm import tqdm

from .. import logs, storage
from ..config import dump_yaml, load_config
from ..errors import UserError
from ..runs import Provenance, recorded
from .distributed import Alone
from .learner import require_deepspeed
from .loggers import check_loggers
from .loop import train_worker
from .run_dir import CONFIG, Attempt, checkpoint_step, last_metrics, latest_checkpoint, located, look_anew
from .settings import TrainConfig, TrainingRun, WorkersConfig, first_difference
from .trainer import BuildTask


class Launcher(Protocol):
    """One way to run the training loop, made when it is known that it can be gone."""

    def train(self, build_task: BuildTask, cfg: TrainConfig, attempt: Attempt, fields: Mapping[str, Any]) -> None:
        """Train to ``cfg.steps`` in every process of the run, whose log records carry ``fields`` and the rank."""


def launch(
    run: TrainingRun,
    build_task: BuildTask,
    *,
    description: str,
    job: str = "train",
    inputs: Sequence[Provenance] = (),
) -> str:
    """Train ``build_task(device)`` on ``run.train.workers`` and return the final checkpoint's folder.

    ``build_task`` is called in every process with what that computes on. The run directory's ``config.yaml`` holds all
    of ``run``, and its ``run.json`` names the ``inputs``, as every checkpoint does. UserError when the directory belongs
    to another run already, when there is nothing to resume or it was
    begun with other settings, when a logger or the workers' resources are missing, when another start has taken the run
    over, when the last checkpoint cannot be written, and for bad input that only a worker met.
    """
    cfg = run.train.model_copy(update={"run_dir": located(run.train.run_dir)})
    run = run.model_copy(update={"train": cfg})
    check_loggers(cfg.loggers)
    if cfg.sharding == "zero2":
        require_deepspeed()
    check_run_dir(run)
    launcher = _launcher(cfg.workers)
    attempt = Attempt.begin(cfg.run_dir, resume=cfg.resume)
    storage.write_text(storage.join(cfg.run_dir, CONFIG), dump_yaml(run))

    fields = {"job": job, "run": logs.run_id(job), **logs.context(), "attempt": attempt.number}
    with recorded(cfg.run_dir, job, run, inputs) as outputs, _Progress(cfg, description):
        launcher.train(build_task, cfg, attempt, fields)
        final = latest_checkpoint(cfg.run_dir)
        if checkpoint_step(final) < cfg.steps:
            raise UserError(f"run_dir {cfg.run_dir}: the run ended without the checkpoint of step {cfg.steps}")
        outputs.append(Provenance(role="checkpoint", kind="model", path=final, facts={"step": cfg.steps}))
    return final


def _launcher(workers: WorkersConfig) -> Launcher:
    """UserError where this machine or the cluster lacks what the workers need."""
    if workers.count == 0:
        return CallingProcess(workers)
    from .ray_train import RayTrain  # and Ray with it, which no other run needs

    return RayTrain(workers)


def check_run_dir(run: TrainingRun) -> None:
    """UserError unless ``run.train.run_dir`` is free, or holds the same run where that is to be resumed."""
    run_dir = run.train.run_dir
    config_file = storage.join(run_dir, CONFIG)
    if not run.train.resume:
        check_free(run_dir)
        return
    look_anew(config_file)
    if not storage.exists(config_file):
        raise UserError(f"run_dir {run_dir}: nothing to resume (no {CONFIG})")
    if different := first_difference(load_config(type(run), config_file), run):
        key, old, new = different
        raise UserError(f"run_dir {run_dir}: cannot resume with {key} = {new!r}, the run began with {old!r}")


def check_free(run_dir: str) -> None:
    """UserError unless ``run_dir`` is not there yet, or holds nothing."""
    look_anew(run_dir)
    if not storage.is_empty(run_dir):
        raise UserError(
            f"run_dir {run_dir}: holds a run already; resume=true goes on with it, or choose another folder"
        )


class _Progress:
    """A progress bar fed from metrics.jsonl, which the workers write wherever they run."""

    def __init__(self, cfg: TrainConfig, description: str) -> None:
        self.run_dir, self.ended = cfg.run_dir, threading.Event()
        self.interval = 1.0 if storage.is_local(cfg.run_dir) else 15.0
        self.bar = tqdm(total=cfg.steps, desc=description, unit="step", dynamic_ncols=True)
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
        except Exception:  # a store out of reach for a moment: a bar is no reason to stop
            return
        if last is None:
            return
        self.bar.set_postfix(loss=f"{last['loss']:.4f}", img_s=last["images_per_second"], refresh=False)
        self.bar.update(last["step"] - self.bar.n)


log = logging.getLogger(__name__)


class CallingProcess:
    """Trains in this process."""

    def __init__(self, workers: WorkersConfig) -> None:
        """UserError where a GPU is asked for and there is none."""
        if workers.gpu and not torch.cuda.is_available():
            raise UserError("train.workers.gpu: PyTorch sees no GPU here, where the run would compute")
        self.device = torch.device("cuda", torch.cuda.current_device()) if workers.gpu else torch.device("cpu")

    def train(self, build_task: BuildTask, cfg: TrainConfig, attempt: Attempt, fields: Mapping[str, Any]) -> None:
        """Train to ``cfg.steps``; ``fields`` are for the log records of that time. What is raised there passes through."""
        with logs.carrying({**fields, "rank": 0}), _own_threads():
            try:
                train_worker(build_task, cfg, attempt, Alone(self.device))
            except Exception as error:
                log.error("training failed on rank 0: %s", error, extra={"failed_rank": 0})
                raise


@contextmanager
def _own_threads() -> Iterator[None]:
    """Give this process as many threads to compute with after the block as it had before."""
    before = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(before)
