"""Ctrl-C and SIGTERM: a checkpoint after the current step, and the command that goes on."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from instella_ray.commands import demo
from instella_ray.errors import Interrupted
from instella_ray.job import resume_command
from instella_ray.models.folders import checkpoint_step, finished_checkpoints
from instella_ray.runs import read_record
from instella_ray.training.interrupts import SIGNALS, StopRequest, stopping_on_signals
from instella_ray.training.run_dir import Attempt, read_metrics

from ..kit.processes import wait_until
from ..kit.project import ROOT

STEPS = 2000
"""More than a run does before it is interrupted."""


def words(shards: str, run_dir: Path, **settings: object) -> list[str]:
    """Of the tokenizer's job, for a run that logs every step and has no checkpoint of its own before the last."""
    given = {
        "data": shards,
        "train.run_dir": str(run_dir),
        "train.steps": STEPS,
        "train.checkpoint_every": 1000,
        "train.preview_every": 1000,
        "train.log_every": 1,
        "train.loggers": [],
        "train.workers.count": 0,
        "train.workers.threads": 1,
        "train.global_batch": 4,
        "train.precision": "fp32",
        "stages": {},
        "validation": None,
        **settings,
    }
    sets = [f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in given.items()]
    return ["--config", "configs/tokenizer/tiny.yaml", *(word for item in sets for word in ("--set", item))]


@contextmanager
def running(command: list[str]) -> Iterator[subprocess.Popen[str]]:
    """A process in a group of its own, as a terminal starts it."""
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


def interrupt(process: subprocess.Popen[str], run_dir: Path, number: signal.Signals) -> str:
    """What the process says on standard error when it is signalled after its third step."""
    assert wait_until(lambda: process.poll() is not None or len(read_metrics(run_dir)) >= 3, 240)
    assert process.poll() is None, process.communicate()
    os.killpg(process.pid, number)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 130, said
    return said


def shown_command(said: str) -> list[str]:
    (line,) = (line for line in said.splitlines() if line.startswith("continue with: "))
    program, *rest = shlex.split(line.removeprefix("continue with: "))
    assert program == "python"
    return [sys.executable, *rest]


@pytest.mark.process
@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.nightly)])
def test_ctrl_c_saves_the_last_step_and_prints_the_command_that_goes_on(
    number: signal.Signals, shards: str, tmp_path: Path
) -> None:
    run_dir = tmp_path / "a run"
    with running([sys.executable, "jobs/train_tokenizer.py", *words(shards, run_dir)]) as process:
        said = interrupt(process, run_dir, number)
    assert f"{number.name}: the run stops after this step, with a checkpoint; a second one stops it at once" in said
    assert "Traceback" not in said
    rows = read_metrics(run_dir)
    (saved,) = finished_checkpoints(run_dir)
    assert checkpoint_step(saved) == rows[-1]["step"] < STEPS
    record = read_record(str(run_dir))
    assert record is not None and record.attempts[-1].status == "interrupted"
    assert len(shown_command(said)) == len(words(shards, run_dir)) + 4

    last = rows[-1]["step"] + 2
    on = [*shown_command(said), "--set", f"train.steps={last}"]
    done = subprocess.run(on, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"training resumes at step {last - 2} of {last}" in done.stderr
    went_on = read_metrics(run_dir)
    assert went_on[:-2] == rows and [row["step"] for row in went_on] == list(range(1, last + 1))


@pytest.mark.nightly
@pytest.mark.ray
def test_ctrl_c_on_ray_saves_the_last_step_and_ends_all_processes(shards: str, tmp_path: Path) -> None:
    # A Ray of its own, because the signal goes to all processes of the group.
    settings = {"train.workers.count": 1, "train.workers.cpus": 0.5}
    command = [sys.executable, "jobs/train_tokenizer.py", *words(shards, tmp_path / "run", **settings)]
    with running(["env", "-u", "RAY_ADDRESS", *command]) as process:
        said = interrupt(process, tmp_path / "run", signal.SIGINT)
    (saved,) = finished_checkpoints(tmp_path / "run")
    assert checkpoint_step(saved) == read_metrics(tmp_path / "run")[-1]["step"]
    assert shown_command(said)[-1] == "train.resume=true"


def _request_of_a_thread() -> StopRequest:
    with stopping_on_signals() as stop:
        return stop


def test_the_first_signal_asks_and_the_second_stops() -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    asked: list[str] = []
    with pytest.raises(Interrupted), stopping_on_signals() as stop:
        stop.passed_by(lambda: asked.append("first"))
        stop.on_second.append(lambda: asked.append("second"))
        with ThreadPoolExecutor(1) as pool:  # a run beside it, in a thread, to which no signal comes
            assert pool.submit(_request_of_a_thread).result() is stop
        os.kill(os.getpid(), signal.SIGINT)
        assert wait_until(lambda: asked == ["first"], 10) and stop.made
        stop.passed_by(lambda: asked.append("late"))  # a run that was still starting
        assert wait_until(lambda: asked == ["first", "late"], 10)
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("went on after a second signal")
    assert asked == ["first", "late", "second"]
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_workers_elsewhere_find_the_request_of_their_own_attempt(tmp_path: Path) -> None:
    first = Attempt.begin(str(tmp_path), resume=False)
    assert not first.stop_requested()
    first.request_stop()
    assert first.stop_requested()
    assert not Attempt.begin(str(tmp_path), resume=True).stop_requested()


def test_the_command_that_goes_on_has_the_same_words(monkeypatch: pytest.MonkeyPatch) -> None:
    resuming = ["--set", "train.resume=true"]
    given = ["--set", "data=a b/*.tar"]
    assert resume_command("instella-ray train-tokenizer", given, resuming) == (
        "instella-ray train-tokenizer --set 'data=a b/*.tar' --set train.resume=true"
    )
    again = [*given, *resuming]
    assert resume_command("instella-ray x", again, resuming) == resume_command("instella-ray x", given, resuming)
    monkeypatch.setattr(sys, "argv", ["jobs/train_tokenizer.py", "--config", "c.yaml"])
    assert resume_command(None, None, resuming) == (
        "python jobs/train_tokenizer.py --config c.yaml --set train.resume=true"
    )


def test_the_demo_goes_on_with_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "instella_ray")

    def stopped(config: demo.DemoConfig, mode: str) -> None:
        Path(config.folder).mkdir()
        Path(config.path("state.json")).write_text("{}")
        raise Interrupted

    monkeypatch.setattr(demo, "run_demo", stopped)
    with pytest.raises(KeyboardInterrupt):
        demo.main(["--tiny", "--fresh", "--folder", str(tmp_path / "d")])
    assert caplog.messages[-1] == f"continue with: instella-ray demo --tiny --folder {tmp_path / 'd'} --resume"
