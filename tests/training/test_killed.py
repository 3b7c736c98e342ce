"""What happens to a run when a worker is killed, its driver, or an upload fails: at most one interval is trained again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from instella_ray.errors import UserError
from instella_ray.models.checkpoint import load_model
from instella_ray.models.folders import finished_checkpoints, latest_checkpoint
from instella_ray.training.run_dir import Attempt, read_metrics

from ..kit.chaos import effective_history, fragile_run, notes_of, times_seen
from ..kit.processes import wait_until
from ..kit.project import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.ray]


@pytest.fixture(scope="module")
def whole(ray_session: None, shards: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nothing happens to: 12 steps of 16 of 64 samples, so that checkpoints 4, 8, 12 end an epoch each."""
    folder = tmp_path_factory.mktemp("whole")
    fragile_run(shards, str(folder / "run"), str(folder / "notes"), {})
    return folder


def assert_nothing_was_lost(whole: Path, run_dir: str | Path, notes: Path) -> None:
    """The same losses, samples and final weights as those of the run that nothing happened to."""
    losses = [[(row["step"], row["loss"]) for row in read_metrics(run)] for run in (whole / "run", run_dir)]
    assert losses[0] == losses[1] and [step for step, _ in losses[0]] == list(range(1, 13))
    assert effective_history(notes) == effective_history(whole / "notes")
    assert times_seen(notes) == {3}
    if "://" not in str(run_dir):
        a, b = (load_model(latest_checkpoint(run)).state_dict() for run in (whole / "run", run_dir))
        assert all(torch.equal(value, b[name]) for name, value in a.items())


def steps_of(notes: Path, rank: int) -> list[int]:
    return [note["step"] for note in notes_of(notes) if note["rank"] == rank]


def driver(arguments: dict[str, Any], **env: str) -> subprocess.Popen[str]:
    """A process of its own that runs :func:`tests.kit.chaos.fragile_run`, on the session's Ray unless told otherwise."""
    import ray

    address = ray.get_runtime_context().gcs_address
    env = {**os.environ, "PYTHONPATH": str(ROOT), "RAY_ADDRESS": address, **env}
    command = [sys.executable, "-m", "tests.kit.chaos", json.dumps(arguments)]
    return subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


@pytest.fixture
def killed_driver(whole: Path, shards: str, tmp_path: Path) -> Iterator[dict[str, Any]]:
    """What a run was started with whose driver was killed in its sixth step, when a checkpoint of four was complete."""
    given = {"shards": shards, "run_dir": str(tmp_path / "run"), "notes": str(tmp_path / "notes"), "hold_at": 5}
    process = driver({**given, "train": {}})
    try:
        held = [tmp_path / "notes" / f"holding{rank}" for rank in (0, 1)]
        assert wait_until(lambda: process.poll() is not None or all(mark.exists() for mark in held), 120)
        assert process.poll() is None, process.communicate()[1]
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    yield given


def test_a_worker_killed_in_mid_step_costs_no_more_than_one_interval(
    whole: Path, shards: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("INSTELLA_RAY_LOG_FILE", str(tmp_path / "log.jsonl"))
    best = {"metric": "loss", "order": "lower"}
    final = fragile_run(
        shards, str(tmp_path / "run"), str(tmp_path / "notes"), {"keep_checkpoints": 1, "keep_best": best}, kill_at=9
    )
    assert_nothing_was_lost(whole, tmp_path / "run", tmp_path / "notes")
    # It went on behind the checkpoint that ended the second epoch.
    assert steps_of(tmp_path / "notes", 1) == [*range(10), *range(8, 12)]
    records = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    starts = [record["message"] for record in records if "at step" in record["message"]]
    assert starts == ["training starts at step 0 of 12", "training resumes at step 8 of 12"]
    losses = {row["step"]: row["loss"] for row in read_metrics(tmp_path / "run")}
    kept = {min((4, 8, 12), key=lambda step: losses[step]), 12}
    folders = finished_checkpoints(tmp_path / "run")
    assert [int(folder.rpartition("-")[2]) for folder in folders] == sorted(kept) and folders[-1] == final


@pytest.mark.nightly
def test_a_killed_driver_and_then_a_failing_upload_cost_no_more_than_one_interval(
    whole: Path, killed_driver: dict[str, Any], tmp_path: Path
) -> None:
    run, notes = tmp_path / "run", tmp_path / "notes"
    left = run / "checkpoints" / "step-0000006"  # an upload that its driver did not live to see the end of
    left.mkdir()
    (left / "model.safetensors").write_bytes(b"half")
    with pytest.raises(UserError, match="already holds a run"):
        fragile_run(**{**killed_driver, "train": {}})
    fragile_run(**{**killed_driver, "train": {"resume": True}}, obstruct_at=5)
    assert_nothing_was_lost(whole, run, notes)
    assert steps_of(notes, 0) == [*range(6), *range(4, 12)]
    assert [Path(folder).name for folder in finished_checkpoints(run)] == ["step-0000004", "step-0000012"]
    assert not left.exists()
    with pytest.raises(UserError, match="attempt 2 has taken over the run"):
        Attempt(str(run), 1).check()


@pytest.mark.nightly
def test_a_run_in_a_bucket_goes_on_after_a_killed_worker(whole: Path, shards: str, bucket: str, tmp_path: Path) -> None:
    where = {name: os.environ[name] for name in ("STORAGE_EMULATOR_HOST", "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT")}
    given = {"shards": shards, "run_dir": f"{bucket}/run", "notes": str(tmp_path / "notes"), "kill_at": 9}
    loggers = {"loggers": ["tensorboard"]}
    environment = json.dumps({"runtime_env": {"env_vars": where}})
    process = driver({**given, "train": loggers}, RAY_JOB_CONFIG_JSON_ENV_VAR=environment)
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors
    assert_nothing_was_lost(whole, f"{bucket}/run", tmp_path / "notes")
    assert steps_of(tmp_path / "notes", 1) == [*range(10), *range(8, 12)]
    assert [folder.rpartition("/")[2] for folder in finished_checkpoints(f"{bucket}/run")] == [
        "step-0000008",
        "step-0000012",
    ]
