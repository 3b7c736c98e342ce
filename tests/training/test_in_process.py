"""Runs in the calling process: what ends them, what they leave behind, and that Ray has no part in them."""

from __future__ import annotations

import inspect
import json
import logging
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from instella_ray import logs
from instella_ray.config import load_config
from instella_ray.errors import UserError, run_main
from instella_ray.models import diffusion
from instella_ray.models.checkpoint import load_model
from instella_ray.models.folders import checkpoint_step, finished_checkpoints, latest_checkpoint
from instella_ray.operations.requirements import least
from instella_ray.planning.plan import PlanOptions, plan_run
from instella_ray.runs import read_record
from instella_ray.training import checkpoints
from instella_ray.training import tokenizer as module
from instella_ray.training.run_dir import read_metrics, upload
from instella_ray.training.tokenizer import TokenizerConfig, TokenizerTask, run_tokenizer

from ..kit.project import ROOT
from ..kit.training import HERE, tokenizer_config, untimed


def harmed(harm: Callable[[int], None]) -> type[TokenizerTask]:
    """A task that calls ``harm(step)`` before each step."""

    class Harmed(TokenizerTask):
        def before_step(self, step: int) -> None:
            super().before_step(step)
            harm(step)

    return Harmed


def read(count: int, *overrides: str) -> TokenizerConfig:
    given = ["model={}", "data=a.tar", "train.run_dir=run", f"train.workers.count={count}", *overrides]
    return load_config(TokenizerConfig, None, given)


@pytest.fixture(scope="module")
def whole(shards: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing happens to."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    run_tokenizer(tokenizer_config(shards, folder, loggers=()))
    return folder


@pytest.mark.parametrize(("first", "second"), [(False, True), ("auto", "auto")])
def test_ctrl_c_leaves_a_run_that_goes_on_as_if_it_had_never_stopped(
    whole: Path, shards: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: object, second: object
) -> None:
    cfg = tokenizer_config(shards, tmp_path / "run", loggers=(), resume=first)

    def interrupt(step: int) -> None:
        if step == 9:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, "TokenizerTask", harmed(interrupt))
        assert run_main(lambda: print(run_tokenizer(cfg))) == 130
    left = {thread.name.partition("_")[0] for thread in threading.enumerate()}
    assert left.isdisjoint({"loader", "uploads"})
    record = read_record(cfg.train.run_dir)
    assert record is not None and record.attempts[-1].status == "interrupted"
    assert [checkpoint_step(folder) for folder in finished_checkpoints(tmp_path / "run")] == [6]

    final = run_tokenizer(cfg.model_copy(update={"train": cfg.train.model_copy(update={"resume": second})}))
    assert untimed(read_metrics(tmp_path / "run")) == untimed(read_metrics(whole))
    for name in ("model", "ema", "optimizer"):
        file = f"{name}.safetensors"
        assert Path(final, file).read_bytes() == Path(latest_checkpoint(whole), file).read_bytes(), name


def test_an_error_passes_as_it_is_and_a_checkpoint_on_its_way_still_arrives(
    shards: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    failing = threading.Event()

    def fail(step: int) -> None:
        if step == 6:
            failing.set()
            raise RuntimeError("stopped on purpose")

    def late(*arguments: Any) -> None:
        assert failing.wait(60)
        upload(*arguments)

    monkeypatch.setattr(checkpoints, "upload", late)
    monkeypatch.setattr(module, "TokenizerTask", harmed(fail))
    caplog.set_level(logging.INFO, "instella_ray")
    with pytest.raises(RuntimeError, match="stopped on purpose"):
        run_tokenizer(tokenizer_config(shards, tmp_path / "run", loggers=()))
    load_model(latest_checkpoint(tmp_path / "run"))
    assert caplog.messages[-2:] == [
        f"checkpoint {latest_checkpoint(tmp_path / 'run')} is complete",
        "training failed on rank 0: stopped on purpose",
    ]
    record = read_record(str(tmp_path / "run"))
    assert record is not None and record.attempts[-1].status == "failed"


def test_threads_and_log_records_are_the_runs_while_it_is_there(
    shards: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads, carried, seen = torch.get_num_threads(), logs.context(), []

    def look(step: int) -> None:
        seen.append((torch.get_num_threads(), logs.context()["rank"], logs.context()["attempt"]))

    monkeypatch.setattr(module, "TokenizerTask", harmed(look))
    workers = HERE.model_copy(update={"threads": threads + 1})
    run_tokenizer(tokenizer_config(shards, tmp_path / "run", steps=2, loggers=(), workers=workers))
    assert seen == [(threads + 1, 0, 1)] * 2
    monkeypatch.delenv("INSTELLA_RAY_RUN_ID")
    assert torch.get_num_threads() == threads and logs.context() == carried


def test_a_gpu_that_is_not_there_is_missed_before_anything_begins(
    shards: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    cfg = tokenizer_config(shards, tmp_path / "run", workers=HERE.model_copy(update={"gpu": True}))
    with pytest.raises(UserError, match=r"train\.workers\.gpu: PyTorch sees no GPU on this machine"):
        run_tokenizer(cfg)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.loggers=[prometheus]", "prometheus needs Ray, which workers.count 0 does not use"),
        ("train.workers.min_count=1", r"min_count 1: count 0 trains in the calling process, expected null"),
        ("train.micro_batch_size=5", "a worker's share of 32 is not a multiple of micro_batch_size 5"),
    ],
)
def test_settings_that_mean_nothing_in_one_process_are_refused(override: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as found:
        read(0, "train.global_batch=32", override)
    assert "\n" not in str(found.value)


def test_one_process_is_planned_as_one_worker_and_asks_nothing_of_a_cluster() -> None:
    alone, one = (read(count) for count in (0, 1))
    assert plan_run(alone, PlanOptions()) == plan_run(one, PlanOptions())
    assert alone.train.worker_counts() == [1]
    assert least(alone) == () and sum(group.processes for group in least(one)) == 1


WITHOUT_RAY = """
import runpy, sys
sys.argv = ["train_generator.py", *sys.argv[1:]]
try:
    runpy.run_path("jobs/train_generator.py", run_name="__main__")
except SystemExit as ended:
    assert ended.code == 0, ended.code
assert "ray" not in sys.modules, "ray was imported"
"""


def words(codes: str, tokenizer: str, run_dir: Path, **validation: Any) -> list[str]:
    """Of the generator's job, for a run of two steps in its own process."""
    settings = {
        "codes": codes,
        "tokenizer": tokenizer,
        "text_encoder.layers": 2,
        "train.run_dir": str(run_dir),
        "train.steps": 2,
        "train.workers.count": 0,
        "validation": validation or None,
    }
    given = [f"{key}={json.dumps(value)}" for key, value in settings.items()]
    return ["--config", "configs/generator/tiny.yaml", *(word for item in given for word in ("--set", item))]


@pytest.mark.process
def test_a_run_in_one_process_and_its_validation_never_import_ray(codes: str, tokenizer: str, tmp_path: Path) -> None:
    asked = {"count": 6, "sampling": {"num_inference_steps": 2}, "text_length": 24}
    command = [sys.executable, "-c", WITHOUT_RAY, *words(codes, tokenizer, tmp_path / "run", **asked)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "model: " in done.stdout and checkpoint_step(latest_checkpoint(tmp_path / "run")) == 2
    assert json.loads((tmp_path / "run" / "validation" / "best.json").read_text())["step"] == 2


@pytest.mark.process
@pytest.mark.nightly
def test_a_debugger_stops_at_a_breakpoint_in_the_loss(codes: str, tokenizer: str, tmp_path: Path) -> None:
    lines, first = inspect.getsourcelines(diffusion.diffusion_loss)
    line = first + len(lines) - 1
    command = [sys.executable, "-m", "pdb", "jobs/train_generator.py", *words(codes, tokenizer, tmp_path / "run")]
    orders = f"break {diffusion.__file__}:{line}\ncontinue\nwhere\nquit\n"
    done = subprocess.run(command, cwd=ROOT, input=orders, capture_output=True, text=True)
    stack = [text.strip().removeprefix("> ") for text in done.stdout.splitlines() if ".py(" in text]
    stopped = f"diffusion.py({line})diffusion_loss()"
    assert any(stopped in text for text in stack), done.stdout + done.stderr
    assert all(any(name in text for text in stack) for name in ("main()", "launch()", "train_worker()", "forward()"))
