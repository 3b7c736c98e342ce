"""Shared fixtures: one Ray session for all tests that need it, environment set before Ray is imported."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

os.environ.update(
    RAY_AUTH_MODE="disabled",
    RAY_ENABLE_UV_RUN_RUNTIME_ENV="0",
    RAY_USAGE_STATS_ENABLED="0",
    RAY_DATA_DISABLE_PROGRESS_BARS="1",
    RAY_TRAIN_HEALTH_CHECK_INTERVAL_S="0.2",
    RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S="0.5",
    RAY_SERVE_HANDLE_AUTOSCALING_METRIC_PUSH_INTERVAL_S="0.5",
    OMP_NUM_THREADS="1",
    HF_HUB_OFFLINE="1",
)

import pytest

ROOT = Path(__file__).parents[1]
MARKERS = ("gpu", "slow", "ray")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests without a marker are unit tests; fast ones run first, those that kill things last."""

    def rank(item: pytest.Item) -> int:
        found = [len(MARKERS) - i for i, name in enumerate(MARKERS) if item.get_closest_marker(name)]
        if not found:
            item.add_marker("unit")
        return max(found, default=0)

    items.sort(key=rank)


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """A local Ray with more logical CPUs than this machine has cores."""
    import ray

    ray.init(
        num_cpus=4,
        include_dashboard=False,
        object_store_memory=256 << 20,
        logging_level="ERROR",
        log_to_driver=False,
    )
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The folder of shared reference data beside the project; tests that need it are skipped elsewhere."""
    folder = ROOT.parent / "shared"
    if not folder.is_dir():
        pytest.skip("the shared reference data is not beside the project")
    return folder
