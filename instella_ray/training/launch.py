"""Start a run on Ray Train: checks first, then workers, a progress bar, and the run directory."""

from __future__ import annotations

import logging
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ray
import ray.train.torch
import torch
from ray.train.v2.api.config import FailureConfig, RunConfig, ScalingConfig
from ray.train.v2.api.exceptions import WorkerGroupError
from tqdm import tqdm

from .. import logs, storage
from ..config import dump_yaml, load_config
from ..data.ray_data import init_ray
from ..errors import UserError
from ..runs import Origin, recorded
from .attempts import Attempt
from .elastic import DivisorTrainer
from .loggers import check_loggers
from .loop import train_worker
from .rocm import RocmTorchConfig
from .run_dir import CONFIG, checkpoint_step, last_metrics, latest_checkpoint, located, look_anew
from .settings import TrainConfig, TrainingRun, WorkersConfig, first_difference
from .task import Task
from .zero import require_deepspeed

log = logging.getLogger(__name__)


def launch(
    run: TrainingRun,
    build_task: Callable[[torch.device], Task],
    *,
    description: str,
    job: str = "train",
    inputs: Sequence[Origin] = (),
) -> str:
    """Train ``build_task(device)`` on ``run.train.workers`` and return the final checkpoint's folder.

    ``build_task`` is called on every worker with what that computes on. The run directory's ``config.yaml`` holds all
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
    init_ray()
    check_resources(cfg.workers, ray.cluster_resources())
    attempt = Attempt.begin(cfg.run_dir, resume=cfg.resume)
    storage.write_text(storage.join(cfg.run_dir, CONFIG), dump_yaml(run))

    fields = {"job": job, "run": logs.run_id(job), **logs.context(), "attempt": attempt.number}

    def worker() -> bool:
        logs.set_up({**fields, "rank": ray.train.get_context().get_world_rank()})
        return train_worker(build_task(ray.train.torch.get_device()), cfg, attempt)

    with recorded(cfg.run_dir, job, run, inputs) as outputs, _Progress(cfg, description):
        try:
            while not _fit(worker, cfg):
                # Left for a node that is taken away, before Ray Train had noticed that itself: on other nodes then.
                continue
        except SystemExit:
            # Ray Train answers Ctrl-C by ending the process; what to end, and with which code, is the caller's.
            raise KeyboardInterrupt from None
        except WorkerGroupError as error:
            for rank, failure in error.worker_failures.items():
                log.error("training failed on rank %d: %s", rank, failure, extra={"failed_rank": rank})
            # Bad input that only a worker could meet, an undecodable picture say, is as much one line as any other.
            mistakes = [failure for failure in error.worker_failures.values() if isinstance(failure, UserError)]
            if mistakes:
                raise mistakes[0] from None
            raise
        final = latest_checkpoint(cfg.run_dir)
        if checkpoint_step(final) < cfg.steps:
            raise UserError(f"run_dir {cfg.run_dir}: the run ended without the checkpoint of step {cfg.steps}")
        outputs.append(Origin(role="checkpoint", kind="model", path=final, facts={"step": cfg.steps}))
    return final


def _fit(worker: Callable[[], bool], cfg: TrainConfig) -> bool:
    """Run ``worker`` on every rank, anew after failures and preemptions; returns what it returned on rank 0."""
    resources: dict[str, float] = {"CPU": cfg.workers.cpus}
    if cfg.workers.gpu:
        resources["GPU"] = 1
    counts = cfg.worker_counts()
    # Checkpoints are this package's own, in the run directory; what Ray Train writes for itself is of no use later.
    with tempfile.TemporaryDirectory(prefix="instella-ray-") as scratch:
        trainer = DivisorTrainer(
            worker,
            counts=counts,
            torch_config=RocmTorchConfig(),
            scaling_config=ScalingConfig(
                num_workers=counts[0] if len(counts) == 1 else (counts[0], counts[-1]),
                use_gpu=cfg.workers.gpu,
                resources_per_worker=resources,
            ),
            run_config=RunConfig(
                name=cfg.run_dir.rstrip("/").rpartition("/")[2],
                storage_path=scratch,
                failure_config=FailureConfig(max_failures=cfg.workers.max_failures, max_preemption_failures=-1),
            ),
        )
        result: Any = trainer.fit()  # declared as what the first version of Ray Train returned
        return bool(result.return_value)


def check_resources(workers: WorkersConfig, have: Mapping[str, float]) -> None:
    """UserError for workers that cannot be placed on what there is: the run would wait silently for ever."""
    count = workers.min_count or workers.count
    need = {"CPU": count * workers.cpus, "GPU": count * float(workers.gpu)}
    for name, amount in need.items():
        if amount > have.get(name, 0):
            raise UserError(f"{count} workers need {amount:g} {name}, the cluster has {have.get(name, 0):g}")


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
