"""Shared fixtures: one Ray session for all tests that need it, environment set before Ray is imported."""

from __future__ import annotations

import importlib.util
import json
import os
import socket
from collections.abc import Generator, Iterator
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
    RAY_metrics_report_interval_ms="1000",
    HF_HUB_OFFLINE="1",
)
# As the endpoint's own process sets Serve up; the last one is for this process, whose handles are called by tests.
from instella_ray.serving.serve_settings import ROUTER_LOOP, SETTINGS

os.environ.update({**SETTINGS, ROUTER_LOOP: "1"})
# Without bytecode on the disk every worker of Ray compiles the project's files anew.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

import hypothesis
import pytest

# Examples take longer on a busy machine, which is no failure.
hypothesis.settings.register_profile("tests", deadline=None)
hypothesis.settings.load_profile("tests")
# Before any of it is imported: its asserts tell values, as those of the tests do.
pytest.register_assert_rewrite("tests.kit")

ROOT = Path(__file__).parents[1]
PRETENDED = ROOT / "tests" / "pretended"
if pretended := os.environ.get("INSTELLA_TEST_BF16"):
    if pretended not in ("yes", "no"):
        raise pytest.UsageError(f"INSTELLA_TEST_BF16={pretended}: expected yes or no")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(PRETENDED), os.environ.get("PYTHONPATH")]))
    spec = importlib.util.spec_from_file_location("pretended", PRETENDED / "sitecustomize.py")
    assert spec and spec.loader
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
MARKERS = ("process", "unit", "gpu", "ray", "slow", "nightly")
"""In the order in which tests are run; one that has several counts as the last of them."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests without a marker are unit tests. Long ones run before them, so that no core waits for another at the end."""

    def rank(item: pytest.Item) -> int:
        found = [number for number, name in enumerate(MARKERS) if item.get_closest_marker(name)]
        if not found:
            item.add_marker("unit")
        return max(found, default=MARKERS.index("unit"))

    items.sort(key=rank)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Half of a surrogate pair in what a test has printed or logged cannot be sent from one process to another."""
    report = yield
    report.sections = [(name, text.encode(errors="backslashreplace").decode()) for name, text in report.sections]
    return report


@pytest.fixture(autouse=True)
def records_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """What one test lets its process's log records carry, the next one's do not."""
    monkeypatch.setattr("instella_ray.logs._context", {})
    for name in ("INSTELLA_RAY_JOB", "INSTELLA_RAY_RUN_ID"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """A local Ray with more logical CPUs than this machine has cores."""
    import ray
    import ray.serve

    os.environ.update(SETTINGS)

    for left in (2, 1, 0):
        try:
            ray.init(
                num_cpus=4,
                include_dashboard=False,
                object_store_memory=256 << 20,
                logging_level="ERROR",
                log_to_driver=False,
            )
            break
        except Exception:
            # A node gives its agent 15 seconds to start, which a busy machine may not have for it.
            ray.shutdown()
            if not left:
                raise
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The folder of shared reference data beside the project; tests that need it are skipped elsewhere."""
    folder = ROOT.parent / "shared"
    if not folder.is_dir():
        pytest.skip("the shared reference data is not beside the project")
    return folder


@pytest.fixture(scope="session")
def tiny_clip(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A small architecture known to open_clip by name, and a file of random weights for it."""
    open_clip = pytest.importorskip("open_clip", reason="the extras 'eval' and 'curate' are not installed")
    import torch

    folder = tmp_path_factory.mktemp("clip")
    config = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 48, "layers": 2, "width": 64, "head_width": 32, "patch_size": 16},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
    }
    (folder / "tiny-test.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder / "tiny-test.json")
    torch.manual_seed(1)
    torch.save(open_clip.create_model("tiny-test").state_dict(), folder / "tiny.pt")
    return "tiny-test", str(folder / "tiny.pt")


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of an empty bucket, in an emulator of Google's storage on loopback."""
    pytest.importorskip("gcsfs", reason="the extra 'gcs' is not installed")
    emulator = pytest.importorskip("gcp_storage_emulator.server", reason="the extra 'dev' is not installed")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    server = emulator.create_server("127.0.0.1", port, in_memory=True, default_bucket="bucket")
    server.start()
    yield "gs://bucket"
    server.stop()
