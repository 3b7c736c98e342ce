"""A run on Ray Train: its worker group, how many workers that has, what is tried again, and AMD's GPUs."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import ray
import ray.train.torch
import torch
from ray.train.collective import barrier, broadcast_from_rank_zero
from ray.train.torch import TorchConfig
from ray.train.torch.config import _TorchBackend
from ray.train.v2._internal.execution.failure_handling import DefaultFailurePolicy, FailureDecision
from ray.train.v2._internal.execution.scaling_policy import ElasticScalingPolicy
from ray.train.v2.api.config import FailureConfig, RunConfig, ScalingConfig
from ray.train.v2.api.exceptions import TrainingFailedError, WorkerGroupError
from ray.train.v2.torch.torch_trainer import TorchTrainer

from .. import logs
from ..data.ray_data import init_ray
from ..errors import UserError
from .loop import train_worker
from .run_dir import Attempt
from .settings import TrainConfig, WorkersConfig
from .trainer import BuildTask, NonFiniteLoss

T = TypeVar("T", bound=int | str)

NOT_RETRIED = (UserError, NonFiniteLoss)
"""Failures that would come again: the next attempt would read the same input, and draw the same numbers."""
CUDA, HIP = "CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES"
log = logging.getLogger(__name__)


class RayTrain:
    """Trains on workers of the cluster that this process is connected to, or of one that is started here."""

    def __init__(self, workers: WorkersConfig) -> None:
        """UserError where the cluster has no room for the workers."""
        init_ray()
        check_resources(workers, ray.cluster_resources())

    def train(self, build_task: BuildTask, cfg: TrainConfig, attempt: Attempt, fields: Mapping[str, Any]) -> None:
        """Train to ``cfg.steps``, anew from the last checkpoint after failures; ``fields`` are for the workers' log records.

        UserError and :class:`.trainer.NonFiniteLoss` of a worker are raised as they are, Ctrl-C as KeyboardInterrupt.
        """

        def worker() -> bool:
            logs.set_up({**fields, "rank": ray.train.get_context().get_world_rank()})
            return train_worker(build_task, cfg, attempt, WorkerGroup())

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
            # Bad input that only a worker could meet, an undecodable image say, is as much one line as any other.
            hopeless = [failure for failure in error.worker_failures.values() if isinstance(failure, NOT_RETRIED)]
            if hopeless:
                raise hopeless[0] from None
            raise


class WorkerGroup:
    """Ray Train's workers, as the one that this is called on sees them; see :class:`.workers.Workers`."""

    @property
    def device(self) -> torch.device:
        return ray.train.torch.get_device()

    @property
    def local_rank(self) -> int:
        return ray.train.get_context().get_local_rank()

    def broadcast(self, value: T) -> T:
        return broadcast_from_rank_zero(value)

    def barrier(self) -> None:
        barrier()

    def nodes_to_go(self) -> Sequence[str] | None:
        info = ray.train.get_preemption_info()
        return None if info is None else info.preempted_node_ids


def check_resources(workers: WorkersConfig, have: Mapping[str, float]) -> None:
    """UserError for workers that cannot be placed on what there is: the run would wait silently for ever."""
    count = workers.min_count or workers.count
    need = {"CPU": count * workers.cpus, "GPU": count * float(workers.gpu)}
    for name, amount in need.items():
        if amount > have.get(name, 0):
            raise UserError(f"{count} workers need {amount:g} {name}, the cluster has {have.get(name, 0):g}")


def _fit(worker: Callable[[], bool], cfg: TrainConfig) -> bool:
    """Run ``worker`` on every rank, anew after failures and preemptions; returns what it returned on rank 0."""
    resources: dict[str, float] = {"CPU": cfg.workers.cpus}
    if cfg.workers.gpu:
        resources["GPU"] = 1
    counts = cfg.worker_counts()
    # Checkpointer are this package's own, in the run directory; what Ray Train writes for itself is of no use later.
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


class DivisorPolicy(ElasticScalingPolicy):
    """Takes the largest of ``counts`` that there is room for, where Ray's own policy takes any number."""

    def __init__(self, scaling_config: ScalingConfig, counts: Sequence[int]) -> None:
        super().__init__(scaling_config)
        self.counts = tuple(counts)

    def _count_possible_workers(self, reserved_resources: Any) -> int:
        room = super()._count_possible_workers(reserved_resources)
        return max((count for count in self.counts if count <= room), default=0)


class UserErrorFailurePolicy(DefaultFailurePolicy):
    """Ray's failure policy, but a run that failed by a user's mistake is not started again."""

    def make_decision(self, training_failed_error: TrainingFailedError) -> FailureDecision:
        failures = training_failed_error.worker_failures if isinstance(training_failed_error, WorkerGroupError) else {}
        if any(isinstance(failure, NOT_RETRIED) for failure in failures.values()):
            return FailureDecision.RAISE
        return super().make_decision(training_failed_error)


class DivisorTrainer(TorchTrainer):
    """A trainer on as many workers, of ``counts``, as there is room for, with :class:`UserErrorFailurePolicy`."""

    def __init__(self, *args: Any, counts: Sequence[int], **options: Any) -> None:
        super().__init__(*args, **options)
        self.counts = counts

    def _initialize_and_run_controller(self, **parts: Any) -> Any:
        parts["failure_policy"] = UserErrorFailurePolicy(cast(FailureConfig, self.run_config.failure_config))
        if len(self.counts) > 1:
            parts["scaling_policy"] = DivisorPolicy(cast(ScalingConfig, self.scaling_config), self.counts)
        return super()._initialize_and_run_controller(**parts)


def mirror_visible_devices() -> None:
    """Let HIP see the devices that Ray Train shares among a node's workers.

    Ray gives each worker on an AMD node its own GPU in HIP_VISIBLE_DEVICES, Ray Train sets CUDA_VISIBLE_DEVICES to all of
    the node's alone, and HIP ignores that where both are set: the second worker would ask for a device that it cannot see.
    """
    if HIP in os.environ and CUDA in os.environ:
        os.environ[HIP] = os.environ[CUDA]


class RocmTorchBackend(_TorchBackend):
    """The process group of PyTorch, begun when the workers' devices are visible to HIP."""

    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        worker_group.execute(mirror_visible_devices)
        super().on_start(worker_group, backend_config)


@dataclass
class RocmTorchConfig(TorchConfig):
    """For every run: without AMD's GPUs nothing is mirrored."""

    @property
    def backend_cls(self) -> type[RocmTorchBackend]:
        return RocmTorchBackend
