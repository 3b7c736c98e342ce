"""Run directories on a disk and elsewhere: what counts as a checkpoint, who may write, what is uploaded and kept."""

from __future__ import annotations

import json
import logging
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from ray.train.v2._internal.execution.failure_handling import FailureDecision
from ray.train.v2.api.config import FailureConfig, ScalingConfig
from ray.train.v2.api.exceptions import WorkerGroupError

from instella_ray import storage
from instella_ray.errors import UserError
from instella_ray.models.folders import checkpoint_folders, finished_checkpoints, latest_checkpoint
from instella_ray.training.checkpoints import Uploads, best_checkpoint
from instella_ray.training.metrics_log import MetricsFile
from instella_ray.training.nonfinite import NonFiniteLoss
from instella_ray.training.ray_train import DivisorPolicy, UserErrorFailurePolicy
from instella_ray.training.run_dir import SCORES, Attempt, last_metrics, local_folder, read_metrics
from instella_ray.training.settings import BestConfig, TrainConfig, WorkersConfig


@pytest.fixture(params=["disk", "memory"])
def run_dir(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty folder on a disk, and one in a store that is read and written as a bucket is."""
    return str(tmp_path / "run") if request.param == "disk" else f"memory://{tmp_path.name}/run"


def saved(tmp_path: Path, step: int, **scores: float) -> Path:
    folder = tmp_path / "scratch" / f"step-{step:07d}"
    folder.mkdir(parents=True)
    for name in ("a.safetensors", "model.safetensors"):
        (folder / name).write_bytes(name.encode())
    (folder / "state.json").write_text(json.dumps({"step": step}))
    (folder / SCORES).write_text(json.dumps(scores))
    return folder


def names(run_dir: str) -> list[int]:
    return [int(folder.rpartition("-")[2]) for folder in finished_checkpoints(run_dir)]


def test_a_new_run_has_one_beginning_whoever_comes_first(run_dir: str) -> None:
    def start(_: int) -> Attempt | None:
        try:
            return Attempt.begin(run_dir, resume=False)
        except UserError as error:
            assert "already holds a run, which another process has just started" in str(error)
            return None

    with ThreadPoolExecutor(8) as threads:
        (attempt,) = filter(None, threads.map(start, range(8)))
    assert attempt.number == 1
    attempt.check()
    attempt.check_storage()


def test_the_newest_attempt_stops_those_before(run_dir: str) -> None:
    first = Attempt.begin(run_dir, resume=False)
    with ThreadPoolExecutor(4) as threads:
        later = sorted(threads.map(lambda _: Attempt.begin(run_dir, resume=True).number, range(4)))
    assert later == [2, 3, 4, 5]
    for number in range(1, 5):
        with pytest.raises(UserError, match=rf"attempt {number + 1} has taken over the run .* attempt {number} stops"):
            Attempt(run_dir, number).check()
    Attempt(run_dir, 5).check()
    assert first.number == 1


def test_a_folder_that_nodes_do_not_share_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"not the same folder on .* expected a file system that all nodes share"):
        Attempt(str(tmp_path), 1).check_storage()


def test_checkpoints_are_uploaded_and_the_last_and_the_best_kept(run_dir: str, tmp_path: Path) -> None:
    uploads = Uploads(Attempt.begin(run_dir, resume=False), 2, BestConfig(metric="psnr", order="higher"))
    seen = []
    for step, value in ((1, 20.0), (2, 30.0), (3, 25.0), (4, 21.0), (5, 22.0)):
        folder = saved(tmp_path, step, psnr=value)
        uploads.hand_over(folder)
        uploads._wait()
        seen.append(names(run_dir))
        assert not folder.exists()
    assert seen == [[1], [1, 2], [2, 3], [2, 3, 4], [2, 4, 5]]
    uploads.finish()
    with local_folder(latest_checkpoint(run_dir)) as here:
        assert json.loads((here / "state.json").read_text()) == {"step": 5}
        assert (here / "model.safetensors").read_bytes() == b"model.safetensors"


def test_what_was_half_uploaded_does_not_count_and_goes_at_the_next_start(run_dir: str, tmp_path: Path) -> None:
    uploads = Uploads(Attempt.begin(run_dir, resume=False), 2, None)
    uploads.hand_over(saved(tmp_path, 4))
    uploads.finish()
    half = storage.join(run_dir, "checkpoints", "step-0000008")
    storage.write_text(storage.join(half, "model.safetensors"), "half")
    assert latest_checkpoint(run_dir).endswith("step-0000004")
    Uploads(Attempt.begin(run_dir, resume=True), 2, None).sweep()
    assert names(run_dir) == [4] and len(checkpoint_folders(run_dir)) == 1


def test_an_upload_that_fails_costs_that_checkpoint_unless_it_is_the_last(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run_dir = str(tmp_path / "run")
    uploads = Uploads(Attempt.begin(run_dir, resume=False), 5, None)
    for step in (2, 4):
        storage.write_text(storage.join(run_dir, "checkpoints", f"step-{step:07d}"), "in the way")
    with caplog.at_level(logging.ERROR):
        for step in (1, 2, 3):
            uploads.hand_over(saved(tmp_path, step))
        uploads._wait()
    (line,) = caplog.messages
    assert "step-0000002: could not be uploaded" in line and line.endswith("training continues")
    assert names(run_dir) == [1, 3]
    uploads.hand_over(saved(tmp_path, 4))
    with pytest.raises(UserError, match="step-0000004: could not be uploaded"):
        uploads.finish()


def test_an_attempt_that_was_overtaken_uploads_and_logs_no_more(run_dir: str, tmp_path: Path) -> None:
    attempt = Attempt.begin(run_dir, resume=False)
    file, uploads = MetricsFile(attempt, 0), Uploads(attempt, 2, None)
    file.add({"step": 1})
    Attempt.begin(run_dir, resume=True)
    uploads.hand_over(saved(tmp_path, 1))
    with pytest.raises(UserError, match="attempt 1 stops"):
        uploads.finish()
    with pytest.raises(UserError, match="attempt 1 stops"):
        file.add({"step": 2})
        file.sync()
    assert names(run_dir) == [] and read_metrics(run_dir) == [{"step": 1}]


def test_metrics_go_on_behind_the_checkpoint(run_dir: str) -> None:
    attempt = Attempt.begin(run_dir, resume=False)
    first = MetricsFile(attempt, 0)
    for step in range(1, 6):
        first.add({"step": step, "loss": 1.0})
    first.sync()
    second = MetricsFile(attempt, 3)
    assert [row["step"] for row in read_metrics(run_dir)] == [1, 2, 3]
    second.add({"step": 4, "loss": 2.0})
    second.sync()
    assert [(row["step"], row["loss"]) for row in read_metrics(run_dir)][-2:] == [(3, 1.0), (4, 2.0)]


def test_a_line_that_is_being_written_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2, "lo')
    assert read_metrics(tmp_path) == [{"step": 1}] and read_metrics(tmp_path / "nowhere") == []
    with pytest.raises(UserError, match="no finished checkpoint"):
        latest_checkpoint(tmp_path)


@pytest.mark.parametrize("rows", [1, 3, 5000])
def test_the_last_line_is_found_from_the_end_of_a_file_of_any_length(run_dir: str, rows: int) -> None:
    assert last_metrics(run_dir) is None
    lines = "".join(json.dumps({"step": step, "loss": 0.5}) + "\n" for step in range(1, rows + 1))
    storage.write_text(storage.join(run_dir, "metrics.jsonl"), lines + '{"step": 9')
    assert last_metrics(run_dir) == {"step": rows, "loss": 0.5}


@given(st.dictionaries(st.text(min_size=1), st.floats(-1e6, 1e6), min_size=1), st.booleans())
def test_the_best_has_no_better(values: dict[str, float], lower: bool) -> None:
    best = BestConfig(metric="loss", order="lower" if lower else "higher")
    (found,) = best_checkpoint({name: {"loss": value} for name, value in values.items()}, best)
    assert values[found] == (min if lower else max)(values.values())
    assert best_checkpoint({name: {"other": 1.0} for name in values}, best) == []


@given(st.integers(1, 512), st.integers(1, 16), st.integers(1, 16), st.integers(1, 4), st.integers(0, 20))
def test_a_range_of_workers_means_those_numbers_that_share_a_batch(
    batch: int, least: int, most: int, micro: int, room: int
) -> None:
    try:
        cfg = TrainConfig(
            run_dir="run",
            global_batch=batch,
            micro_batch_size=micro,
            workers=WorkersConfig(count=most, min_count=least, cpus=2),
        )
    except ValidationError:
        assert least > most or batch % (least * micro) or batch % (most * micro)
        return
    counts = cfg.worker_counts()
    assert counts[0] == least and counts[-1] == most and not any(batch % (count * micro) for count in counts)
    policy = DivisorPolicy(ScalingConfig(num_workers=(least, most), resources_per_worker={"CPU": 2}), counts)
    found = policy._count_possible_workers({"node": {"CPU": 2.0 * room}})
    assert found == max((count for count in counts if count <= room), default=0)


@pytest.mark.parametrize(
    ("failure", "decision"),
    [
        (UserError("input"), FailureDecision.RAISE),
        (NonFiniteLoss("step 3"), FailureDecision.RAISE),
        (RuntimeError("a node is gone"), FailureDecision.RETRY),
    ],
)
def test_what_would_happen_again_is_not_tried_again(failure: Exception, decision: FailureDecision) -> None:
    policy = UserErrorFailurePolicy(FailureConfig(max_failures=1))
    error = WorkerGroupError("failed", {0: RuntimeError("connection lost"), 1: failure})
    assert policy.make_decision(error) == decision
    assert policy.make_decision(error) == FailureDecision.RAISE
