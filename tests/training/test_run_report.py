"""``report.html`` of a run: written during training, still there after a kill, continued by the next attempt."""

from __future__ import annotations

import json
import math
import re
import signal
import subprocess
import sys
from array import array
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from instella_ray import storage
from instella_ray.config import dump_yaml
from instella_ray.training import report
from instella_ray.training.launch import launch
from instella_ray.training.previews import AVERAGED, RAW, TrainingPreview
from instella_ray.training.report import RunReport
from instella_ray.training.report_page import POINTS, Curve, data_text, points, running_mean
from instella_ray.training.run_dir import Attempt
from instella_ray.training.tokenizer import TokenizerTask, run_tokenizer

from ..kit.processes import wait_until
from ..kit.project import ROOT
from ..kit.training import CPU, tokenizer_config

EVERY_FOUR: dict[str, Any] = {"checkpoint_every": 4, "preview_every": 4, "loggers": ()}
HOLDING = """
import sys, time
from pathlib import Path
from instella_ray.training.launch import launch
from instella_ray.training.tokenizer import TokenizerTask
from tests.kit.training import tokenizer_config

class Holding(TokenizerTask):
    def before_step(self, step):
        super().before_step(step)
        if step == 9:
            Path(self.cfg.train.run_dir, "held").touch()
            time.sleep(600)

cfg = tokenizer_config(*sys.argv[1:], checkpoint_every=4, preview_every=4, loggers=())
launch(cfg, lambda device: Holding(cfg), description="held")
"""
"""A run that stands still in its tenth step."""


def said(page: Path | str) -> str:
    """The text of a page, without its script and style."""
    text = re.sub(r"<(style|script)\b.*?</\1>", "", storage.read_text(str(page)), flags=re.S)
    return re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", text))


@pytest.mark.process
def test_a_killed_run_leaves_its_report_and_the_next_attempt_continues_it(shards: str, tmp_path: Path) -> None:
    page = tmp_path / "run" / "report.html"
    command = [sys.executable, "-c", HOLDING, shards, str(tmp_path / "run")]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        held = tmp_path / "run" / "held"
        assert wait_until(lambda: process.poll() is not None or (held.exists() and page.exists()), 120)
        assert process.poll() is None
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert re.search(r"Running at step \d of 12, about \S+ seconds left", said(page))
    run_tokenizer(tokenizer_config(shards, tmp_path / "run", **EVERY_FOUR, resume=True))
    now = said(page)
    assert "Finished at step 12 of 12." in now and "dashed lines are restarts" in now
    assert re.search(r"restarts 1\b", now) and re.search(r"2 8 2 20\d\d-\d\d-\d\d \S+ UTC", now)
    # Curves and previews of both attempts.
    assert "step 4" in now and "step 8" in now and "step 12" in now and AVERAGED in now and RAW in now
    assert 'class="limit"' in page.read_text()
    starts = json.loads((tmp_path / "run" / "starts.json").read_text())
    assert [(start["step"], start["attempt"], start["workers"]) for start in starts] == [(0, 1, 1), (8, 2, 1)]
    assert re.search(r"checkpoint kept loss 8 \S+ 12 \S+ ", now)


def test_a_failed_run_says_why(shards: str, tmp_path: Path) -> None:
    cfg = tokenizer_config(shards, tmp_path / "run", loggers=())

    class Failing(TokenizerTask):
        def before_step(self, step: int) -> None:
            if step == 3:
                raise RuntimeError("a <b>full</b> disk")

    with pytest.raises(RuntimeError):
        launch(cfg, lambda device: Failing(cfg), description="failing")
    assert "Stopped (RuntimeError: a &lt;b&gt;full&lt;/b&gt; disk) at step 3 of 12" in said(
        tmp_path / "run" / "report.html"
    )


def open_report(run_dir: str, **train: Any) -> RunReport:
    cfg = tokenizer_config("data", run_dir, 1000, **train)
    storage.write_text(storage.join(run_dir, "config.yaml"), dump_yaml(cfg))
    return RunReport(cfg.train, Attempt.begin(run_dir, resume=True), CPU)


@pytest.mark.parametrize("where", ["local", "memory"])
def test_the_page_is_written_at_intervals_on_any_storage(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = str(tmp_path / "run") if where == "local" else f"memory://{tmp_path.name}/run"
    page = storage.join(run_dir, "report.html")
    with open_report(run_dir) as open_one:
        open_one.begin(0, [])
        open_one.add({"step": 1, "loss": 3.0, "note": "no number"})
        assert open_one.pending is not None
        open_one.pending.result()
        assert "Running at step 1 of 1,000" in said(page)
        for step in range(2, 50):
            open_one.add({"step": step, "loss": 3.0 / step, "held_out_loss": 4.0 / step, "skipped_batches": step // 20})
        assert "at step 1 of" in said(page)  # not again so soon
        monkeypatch.setattr(open_one, "next", 0.0)
        open_one.add({"step": 50, "loss": math.nan})
        open_one.pending.result()
        text = said(page)
        assert "at step 50 of" in text and "skipped batches 2" in text and "held out, EMA" in text
    assert "Stopped (to go on from the last checkpoint) at step 50" in said(page)


def test_an_attempt_that_was_taken_over_writes_no_more(tmp_path: Path) -> None:
    with open_report(str(tmp_path)) as old:
        old.begin(0, [])
        with open_report(str(tmp_path)) as new:
            new.begin(0, [])
            new.add({"step": 1000, "loss": 1.0})
        written = (tmp_path / "report.html").read_bytes()
        old.add({"step": 7, "loss": 1.0})
    assert (tmp_path / "report.html").read_bytes() == written and b"Finished" in written


def test_a_page_that_cannot_be_written_does_not_stop_the_run(
    shards: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*given: Any) -> str:
        raise OSError("disk full")

    monkeypatch.setattr(report, "render_run", fail)
    assert run_tokenizer(tokenizer_config(shards, tmp_path / "run", 2, loggers=())).endswith("step-0000002")
    assert "report.html: could not be written (disk full)" in caplog.text


def test_many_previews_are_thinned_out_evenly(tmp_path: Path) -> None:
    with open_report(str(tmp_path)) as one:
        one.begin(0, [])
        images = np.zeros((1, 8, 8, 3), np.uint8)
        for step in range(1, 200):
            one.add_preview(step, TrainingPreview({AVERAGED: images, RAW: images}, ("a",)))
        assert len(one.previews) <= 48 and {1, 199} <= set(one.previews)
        steps = sorted(one.previews)
        assert max(np.diff(steps)) <= 12


def test_curves_are_means_and_leave_out_what_is_not_finite() -> None:
    count = 10 * POINTS
    curves = {"loss": Curve(array("d", range(1, count + 2)), array("d", [*np.arange(count, dtype=float), math.nan]))}
    line = points(curves, "loss")
    assert len(line) == POINTS and line[0] == (10, 4.5) and line[-1] == (count, count - 5.5)
    smooth = running_mean(Curve(array("d", [1, 2, 3, 4]), array("d", [1.0, 3.0, 5.0, 7.0])), 2)
    assert smooth == [(2, 2.0), (3, 4.0), (4, 6.0)]


def test_the_data_of_each_kind_of_run_are_named() -> None:
    assert data_text({"data": "shards/*.tar"}) == "shards/*.tar"
    assert data_text({"codes": None, "images": ["a.tar", "b.tar"]}) == "a.tar, b.tar"
    assert data_text({"codes": [{"folder": "/c", "weight": 1}]}) == "/c"
    assert data_text({"codes": [{"folder": "/c", "weight": 3}, {"folder": "/d"}]}) == "/c (weight 3), /d (weight 1)"
