"""Ray Train backend: worker group, elastic worker counts, failure policy and AMD GPU visibility."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar, cast

import ray
import ray.exceptions
import ray.train.torch
import torch
from ray._private.services import get_webui_url_from_internal_kv
from ray.train.collective import barrier, broadcast_from_rank_zero
from ray.train.torch import TorchConfig
from ray.train.torch.config import _TorchBackend
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.execution.callback import RayTrainCallback
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.failure_handling import DefaultFailurePolicy, FailureDecision
from ray.train.v2._internal.execution.scaling_policy import ElasticScalingPolicy, FixedScalingPolicy
from ray.train.v2._internal.execution.worker_group import WorkerGroup as RayWorkerGroup
from ray.train.v2.api.config import FailureConfig, RunConfig, ScalingConfig
from ray.train.v2.api.exceptions import TrainingFailedError, WorkerGroupError
from ray.train.v2.torch.torch_trainer import TorchTrainer

from .. import logs
from ..data.ray_data import init_ray
from ..errors import UserError
from .interrupts import StopRequest
from .run_dir import Attempt
from .settings import TrainConfig, WorkersConfig

if TYPE_CHECKING:
    from .trainer import BuildTask

# The loop and what it trains are imported where they run: Ray Train's controller imports this module, and nothing of them.

T = TypeVar("T", bound=int | str)

CUDA, HIP = "CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES"
log = logging.getLogger(__name__)


class RayTrain:
    """Launcher on Ray Train, in the connected Ray cluster or a new local one."""

    def __init__(self, workers: WorkersConfig) -> None:
        """Connect to Ray; UserError if the cluster lacks the workers' resources."""
        init_ray()
        check_resources(workers, ray.cluster_resources())

    def train(
        self, build_task: BuildTask, cfg: TrainConfig, attempt: Attempt, fields: Mapping[str, Any], stop: StopRequest
    ) -> None:
        """Train to ``cfg.steps``, restarting from the last checkpoint after failures.

        ``fields`` are added to the workers' log records. A worker's UserError or :class:`.nonfinite.NonFiniteLoss` is raised
        unchanged. Workers look for a request to stop in the run directory.
        """
        stop.passed_by(attempt.request_stop)

        def worker() -> bool:
            from .loop import train_worker

            logs.set_up_worker({**fields, "rank": ray.train.get_context().get_world_rank()})
            return train_worker(build_task, cfg, attempt, WorkerGroup(attempt))

        try:
            while not _fit(worker, cfg, stop):
                if stop.made:
                    raise KeyboardInterrupt
                # The workers stopped on a preemption notice before Ray Train detected it: restart on other nodes.
        except WorkerGroupError as error:
            for rank, failure in error.worker_failures.items():
                log.error("training failed on rank %d: %s", rank, failure, extra={"failed_rank": rank})
            # Bad input found by a worker, such as an undecodable image, is reported in one line like any other.
            hopeless = [failure for failure in error.worker_failures.values() if isinstance(failure, UserError)]
            if hopeless:
                raise hopeless[0] from None
            raise


class WorkerGroup:
    """Worker group of Ray Train; implements :class:`.distributed.Workers`.

    A check for preemption costs two barriers (18 ms on two CPU workers), and notices come half a minute ahead.
    """

    poll_interval = 3.0

    def __init__(self, attempt: Attempt) -> None:
        self.attempt = attempt

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

    def nodes_to_preempt(self) -> Sequence[str] | None:
        info = ray.train.get_preemption_info()
        return None if info is None else info.preempted_node_ids

    def stop_requested(self) -> bool:
        return ray.train.get_context().get_world_rank() == 0 and self.attempt.stop_requested()


def resources(workers: WorkersConfig, count: int) -> dict[str, float]:
    """Return the logical CPUs and GPUs that ``count`` workers reserve, by Ray's names."""
    return {"CPU": count * workers.cpus, "GPU": count * float(workers.gpu)}


def check_resources(workers: WorkersConfig, have: Mapping[str, float]) -> None:
    """Raise UserError if the cluster cannot place the workers, because the run would wait forever without a message."""
    count = workers.min_count or workers.count
    for name, amount in resources(workers, count).items():
        if amount > have.get(name, 0):
            raise UserError(f"{count} workers need {amount:g} {name}, the cluster has {have.get(name, 0):g}")


def _fit(worker: Callable[[], bool], cfg: TrainConfig, stop: StopRequest) -> bool:
    """Run ``worker`` on every rank, with restarts after failures and preemptions; returns rank 0's result."""
    resources: dict[str, float] = {"CPU": cfg.workers.cpus}
    if cfg.workers.gpu:
        resources["GPU"] = 1
    counts = cfg.worker_counts()
    # Checkpoints are written to the run directory by Checkpointer; Ray Train's own state is not needed after the run.
    with tempfile.TemporaryDirectory(prefix="instella-ray-") as scratch:
        trainer = DivisorTrainer(
            worker,
            counts=counts,
            stop=stop,
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
        result: Any = trainer.fit()  # annotated with the result type of Ray Train v1
        return bool(result.return_value)


class DivisorPolicy(ElasticScalingPolicy):
    """Elastic scaling policy restricted to the worker numbers ``counts``; picks the largest that fits."""

    def __init__(self, scaling_config: ScalingConfig, counts: Sequence[int]) -> None:
        super().__init__(scaling_config)
        self.counts = tuple(counts)

    def _count_possible_workers(self, reserved_resources: Any) -> int:
        possible = super()._count_possible_workers(reserved_resources)
        return max((count for count in self.counts if count <= possible), default=0)


class UserErrorFailurePolicy(DefaultFailurePolicy):
    """Ray's failure policy without retries of a UserError: the next attempt would read and draw the same."""

    def make_decision(self, training_failed_error: TrainingFailedError) -> FailureDecision:
        failures = training_failed_error.worker_failures if isinstance(training_failed_error, WorkerGroupError) else {}
        if any(isinstance(failure, UserError) for failure in failures.values()):
            return FailureDecision.RAISE
        return super().make_decision(training_failed_error)


class LocalScalingPolicy(FixedScalingPolicy):
    """Ray's policy for a fixed number of workers, without the process that asks an autoscaler for their resources."""

    def after_controller_start(self, train_run_context: Any) -> None:
        """Request nothing: :func:`check_resources` has found the resources on this machine."""

    def _maybe_send_resource_request(self) -> None:
        """Request nothing."""


class LocalWorkerGroup(RayWorkerGroup):
    """Worker group that uses idle processes: without variables of their own, which they inherit from the local Ray."""

    @staticmethod
    def _get_worker_runtime_env(custom_runtime_env: Any) -> Any:
        return custom_runtime_env


class LocalController(TrainController):
    """Ray Train's controller, with :class:`LocalWorkerGroup`."""

    worker_group_cls = LocalWorkerGroup

    def __init__(self, **parts: Any) -> None:
        os.environ["RAY_WARN_BLOCKING_GET_INSIDE_ASYNC"] = "0"  # which Ray Train sets for a process of its own
        super().__init__(**parts)


def _has_ray_of_its_own() -> bool:
    """Return whether this process has started Ray, on this machine alone, and without a dashboard."""
    node = ray._private.worker._global_node
    return node is not None and node.is_head() and len(ray.nodes()) == 1 and not get_webui_url_from_internal_kv()


class DivisorTrainer(TorchTrainer):
    """TorchTrainer with :class:`DivisorPolicy` over ``counts`` and :class:`UserErrorFailurePolicy`, ended by ``stop``.

    It has no manager of Ray Data's datasets, which no run uses. Without a dashboard it has no cleaner of placement groups,
    which asks the dashboard once a second whether the controller is alive: a local Ray has none, and ends with the driver.
    There, a fixed number of CPU workers starts in fewer processes (:class:`LocalController`, :class:`LocalScalingPolicy`).
    """

    def __init__(self, *args: Any, counts: Sequence[int], stop: StopRequest, **options: Any) -> None:
        super().__init__(*args, **options)
        self.counts, self.stop = counts, stop

    def _create_default_callbacks(self) -> list[RayTrainCallback]:
        dropped: tuple[type[RayTrainCallback], ...] = (DatasetsCallback,)
        if not get_webui_url_from_internal_kv():
            dropped += (PlacementGroupCleanerCallback,)
        return [callback for callback in super()._create_default_callbacks() if not isinstance(callback, dropped)]

    def _initialize_and_run_controller(self, **parts: Any) -> Any:
        scaling = cast(ScalingConfig, self.scaling_config)
        parts["failure_policy"] = UserErrorFailurePolicy(cast(FailureConfig, self.run_config.failure_config))
        if len(self.counts) > 1:
            parts["scaling_policy"] = DivisorPolicy(scaling, self.counts)
        # What an idle process has found out about GPUs is not what a worker of theirs is to see.
        elif not scaling.use_gpu and _has_ray_of_its_own():
            return self._run_locally(**{**parts, "scaling_policy": LocalScalingPolicy(scaling)})
        return super()._initialize_and_run_controller(**parts)

    def _register_sigint_handler(self, controller: Any) -> None:
        """Leave the first Ctrl-C to ``stop``, where Ray's handler would abort the run."""

        def abort() -> None:
            with suppress(ray.exceptions.RayActorError):
                ray.get(controller.abort.remote())

        self.stop.on_second.append(abort)

    def _run_locally(self, **parts: Any) -> Any:
        """Run the controller as the base class does, but in an idle process of a local Ray."""
        controller: Any = ray.remote(num_cpus=0)(LocalController).remote(**parts)
        self._register_sigint_handler(controller)
        ray.get(controller.run.remote())
        return ray.get(controller.get_result.remote())


def mirror_visible_devices() -> None:
    """Set HIP_VISIBLE_DEVICES to the devices that Ray Train shares among a node's workers.

    Ray sets HIP_VISIBLE_DEVICES to each worker's own GPU on an AMD node, while Ray Train sets only CUDA_VISIBLE_DEVICES to
    all GPUs of the node's workers. HIP ignores the latter if both are set, so the second worker would not see its device.
    """
    if HIP in os.environ and CUDA in os.environ:
        os.environ[HIP] = os.environ[CUDA]


class RocmTorchBackend(_TorchBackend):
    """Torch backend that makes the workers' devices visible to HIP before the process group is initialized."""

    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        worker_group.execute(mirror_visible_devices)
        super().on_start(worker_group, backend_config)


@dataclass
class RocmTorchConfig(TorchConfig):
    """Torch configuration of every run; without AMD GPUs the backend changes nothing."""

    @property
    def backend_cls(self) -> type[RocmTorchBackend]:
        return RocmTorchBackend
