"""Log records: JSON with run, job and rank for machines, plain lines for people, the same ones from every process."""

from __future__ import annotations

import io
import json
import logging
import pickle
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from instella_ray import logs
from instella_ray.config import Config
from instella_ray.data.ray_data import WorkerLogging
from instella_ray.errors import UserError, run_main
from instella_ray.job import Job

log = logging.getLogger("instella_ray.somewhere")


@pytest.fixture(autouse=True)
def own(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Each test's own fields and variables; what other tests have set up comes back."""
    monkeypatch.setattr(logs, "_context", {})
    for name in (logs.FORMAT, logs.FILE, logs.RUN_ID, logs.JOB):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    root, package, ray = (logging.getLogger(name) for name in (None, logs.PACKAGE, "ray"))
    before = [(each, list(each.handlers), each.propagate, each.level) for each in (root, package, ray)]
    yield
    for each, handlers, propagate, level in before:
        each.handlers[:], each.propagate = handlers, propagate
        each.setLevel(level)


def records(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


class Settings(Config):
    """Of a job."""

    rows: int = 3


def run(fail: BaseException | None = None) -> int:
    """A job, as the files of jobs/ are written."""

    def main() -> None:
        Job("curate", Settings, lambda _: None, "").main([])
        log.info("%d rows", 3, extra={"step": 7})
        if fail is not None:
            raise fail

    return run_main(main)


def test_a_job_asked_for_json_writes_records_that_name_run_and_job(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("INSTELLA_RAY_LOG", "json")
    monkeypatch.setenv("INSTELLA_RAY_RUN_ID", "night-7")
    assert run(UserError("input a: no such file")) == 2
    said, failed = records(capsys.readouterr().err)
    assert {name: said[name] for name in ("level", "job", "run", "message", "step")} == {
        "level": "info", "job": "curate", "run": "night-7", "message": "3 rows", "step": 7
    }  # fmt: skip
    assert said["time"].endswith("Z") and len(said["time"]) == len("2026-01-31T12:00:00.000Z") and "rank" not in said
    assert (failed["level"], failed["message"]) == ("error", "input a: no such file")


def test_without_being_asked_people_read_lines(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(UserError("input a: no such file")) == 2
    log.warning("mind the gap")
    assert capsys.readouterr().err == "3 rows\nerror: input a: no such file\nwarning: mind the gap\n"
    assert run(KeyboardInterrupt()) == 130
    assert capsys.readouterr().err.endswith("interrupted\n")
    with pytest.raises(ZeroDivisionError):
        run(ZeroDivisionError("as Python shows it"))


def test_an_unexpected_failure_is_one_record_with_its_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("INSTELLA_RAY_LOG", "json")
    assert run(ZeroDivisionError("half")) == 1
    failed = records(capsys.readouterr().err)[-1]
    assert failed["message"] == "ZeroDivisionError: half" and "Traceback" in failed["error"]


def test_a_file_of_records_stands_beside_the_lines(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("INSTELLA_RAY_LOG_FILE", str(tmp_path / "log.jsonl"))
    assert run() == 0 and run() == 0
    assert capsys.readouterr().err == "3 rows\n3 rows\n"
    assert [each["message"] for each in records((tmp_path / "log.jsonl").read_text())] == ["3 rows", "3 rows"]


def test_a_run_without_an_id_gets_one_that_its_processes_inherit(monkeypatch: pytest.MonkeyPatch) -> None:
    first = logs.run_id("curate")
    assert first.startswith("curate-") and logs.run_id("encode") == first
    monkeypatch.delenv(logs.RUN_ID)
    assert logs.run_id("curate") != first


def test_a_format_that_is_none_is_named_and_lines_are_written(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("INSTELLA_RAY_LOG", "xml")
    assert run() == 0
    assert "INSTELLA_RAY_LOG=xml: expected json or text" in capsys.readouterr().err


def test_ray_sets_up_the_same_records_in_its_workers(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("INSTELLA_RAY_LOG", "json")
    logs.begin_job("encode")
    sent = pickle.dumps(WorkerLogging("JSON", fields=logs.context()))
    for name in (logs.FORMAT, logs.RUN_ID, logs.JOB):
        monkeypatch.delenv(name)
    monkeypatch.setattr(logs, "_context", {})  # another process, on another machine
    pickle.loads(sent)._apply()
    log.info("hello")
    (record,) = records(capsys.readouterr().err)
    assert (record["job"], record["message"]) == ("encode", "hello") and record["run"].startswith("encode-")


def test_what_json_cannot_hold_is_written_as_text(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("INSTELLA_RAY_LOG", "json")
    logs.set_up({"rank": 1})
    log.info("an image of \ud83d %s", "two\nlines", extra={"path": Path("a"), "level": "mine"})
    (record,) = records(capsys.readouterr().err)
    assert (
        record["path"] == "a"
        and record["rank"] == 1
        and record["level"] == "info"
        and record["message"].endswith("two\nlines")
    )


class Terminal(io.StringIO):
    """Standard error of a shell; :attr:`screen` is what is left to see of it."""

    def isatty(self) -> bool:
        return True

    @property
    def screen(self) -> list[str]:
        lines = []
        for line in self.getvalue().split("\n"):
            shown = ""
            for part in line.split("\r"):
                shown = part + shown[len(part) :]
            lines.append(shown.rstrip())
        return lines


def test_on_a_terminal_a_progress_bar_is_one_line_below_the_records(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    logs.set_up({})
    with logs.progress_bar(total=30, desc="train", unit="step", mininterval=0) as bar:
        for step in range(30):
            bar.update()
            if step in (9, 19):
                log.info("checkpoint %d is complete", step + 1)
    first, second, last, after = terminal.screen
    assert (first, second, after) == ("checkpoint 10 is complete", "checkpoint 20 is complete", "")
    assert last.startswith("train: 100%") and "30/30" in last


def test_in_a_file_a_progress_bar_is_a_line_a_minute_and_one_at_each_end(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    logs.set_up({})
    with logs.progress_bar(total=3000, desc="train", unit="step") as bar:
        for _ in range(3000):
            bar.update()
    first, last = capsys.readouterr().err.splitlines()
    assert first.startswith("train:   0%|") and last.startswith("train: 100%|")
    assert (first + last).isascii()
    now = 1000.0
    with logs.progress_bar(total=600, desc="train", unit="step") as bar:
        monkeypatch.setattr(bar, "_time", lambda: now)
        bar.start_t = bar.last_print_t = now
        for _ in range(600):
            now += 0.5  # five minutes in all
            bar.update()
        log.info("done")
    lines = capsys.readouterr().err.splitlines()
    assert [line.split("%")[0].split()[-1] for line in lines] == ["0", "20", "40", "60", "80", "100", "done", "100"]
    assert not any("\r" in line for line in lines)


def test_with_json_a_progress_bar_is_a_record_a_minute_and_one_at_each_end(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("INSTELLA_RAY_LOG", "json")
    monkeypatch.setenv("INSTELLA_RAY_RUN_ID", "night-7")
    logs.begin_job("train")
    now = 1000.0
    with logs.progress_bar(total=300, desc="training", unit="step") as bar:
        monkeypatch.setattr(bar, "_time", lambda: now)
        bar.start_t = bar.last_print_t = now
        for _ in range(300):
            now += 0.5
            bar.set_postfix(loss="0.5", refresh=False)
            bar.update()
    for _ in logs.progress_bar(range(3), desc="gone at its end", leave=False):
        pass
    first, *between, last, other = records(capsys.readouterr().err)
    assert first["message"] == "training: 0 of 300 step" and first["done"] == 0
    assert [(each["done"], each["seconds"]) for each in between] == [(120, 60.0), (240, 120.0)]
    assert last["message"] == "training: 300 of 300 step, loss=0.5"
    names = ("level", "job", "run", "done", "total", "unit", "seconds")
    assert [last[name] for name in names] == ["info", "train", "night-7", 300, 300, "step", 150.0]
    assert other["message"] == "gone at its end: 0 of 3 it"
