"""A resumed run with other settings: what may change, where it is named, and that what has been done stays."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch

from instella_ray.config import load_config
from instella_ray.errors import UserError
from instella_ray.models.checkpoint import read_tensors
from instella_ray.runs import read_record
from instella_ray.training.optim import lr_scale
from instella_ray.training.run_dir import read_metrics
from instella_ray.training.settings import OptimizerConfig
from instella_ray.training.tokenizer import TokenizerConfig, run_tokenizer

from ..kit.training import tokenizer_config, untimed

STEPS = 4
OPTIMIZER = OptimizerConfig(lr=1e-3, warmup_steps=2)


def run(shards: str, folder: Path, steps: int = STEPS, **train: object) -> Path:
    settings: dict[str, object] = {"loggers": (), "checkpoint_every": 2, "preview_every": 100, "optimizer": OPTIMIZER}
    cfg = tokenizer_config(shards, folder, steps, **(settings | train))
    # Without the schedules that are fractions of the run, which are others in a longer one.
    return Path(run_tokenizer(cfg.model_copy(update={"freeze_norm_fraction": 1.0, "late_fraction": 0.0})))


@pytest.fixture(scope="module")
def begun(shards: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of four steps."""
    folder = tmp_path_factory.mktemp("begun") / "run"
    run(shards, folder)
    return folder


def copied(begun: Path, to: Path) -> Path:
    shutil.copytree(begun, to)
    return to


def test_an_extended_run_equals_one_that_was_as_long_from_the_start(begun: Path, shards: str, tmp_path: Path) -> None:
    whole, longer = tmp_path / "whole", copied(begun, tmp_path / "run")
    ends = run(shards, whole, 8), run(shards, longer, 8, resume=True)
    assert untimed(read_metrics(longer)) == untimed(read_metrics(whole))
    for name in ("model", "ema", "optimizer"):
        assert len({Path(end, f"{name}.safetensors").read_bytes() for end in ends}) == 1, name


def test_a_run_at_a_url_is_resumed(shards: str, tmp_path: Path) -> None:
    url = f"memory://{tmp_path.name}/run"
    for steps in (2, STEPS):
        run_tokenizer(tokenizer_config(shards, url, steps, loggers=(), resume=steps == STEPS))
    assert [row["step"] for row in read_metrics(url)] == [1, 2, 3, 4]


def test_what_a_resume_changes_is_named_and_takes_effect(
    begun: Path, shards: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = copied(begun, tmp_path / "run")
    done = read_metrics(folder)
    caplog.set_level(logging.INFO, "instella_ray")
    optimizer = OPTIMIZER.model_copy(update={"lr": 1e-4, "clip": 0.01, "decay_fraction": 0.5})
    final = run(
        shards, folder, 8, resume=True, seed=9, precision="bf16", micro_batch_size=8, log_every=2, optimizer=optimizer
    )
    expected = {
        "train.seed": (0, 9),
        "train.steps": (4, 8),
        "train.micro_batch_size": (None, 8),
        "train.optimizer.lr": (1e-3, 1e-4),
        "train.optimizer.decay_fraction": (0.0, 0.5),
        "train.optimizer.clip": (1.0, 0.01),
        "train.precision": ("fp32", "bf16"),
        "train.log_every": (1, 2),
    }
    lines = [f"resumed with another {key}: {old} -> {new}" for key, (old, new) in expected.items()]
    said = [line for line in caplog.messages if line.startswith("resumed with")]
    assert sorted(said) == sorted(lines)
    assert "learning rate of the next step: 0.001 -> 0.0001" in caplog.messages
    record = read_record(str(folder))
    assert record is not None and record.attempts[0].changes == {} and record.attempts[1].changes == expected
    assert json.loads((folder / "run.json").read_text())["attempts"][1]["changes"]["train.seed"] == [0, 9]
    written = load_config(TokenizerConfig, str(folder / "config.yaml")).train
    assert (written.optimizer, written.steps, written.seed) == (optimizer, 8, 9)

    rows = read_metrics(folder)
    assert rows[: len(done)] == done and [row["step"] for row in rows[len(done) :]] == [6, 8]
    assert rows[-1]["lr"] == lr_scale(7, 8, optimizer) * 1e-4 < 1e-4
    # Adam's moments went on, from four steps to eight.
    steps = {
        float(value) for name, value in read_tensors(final / "optimizer.safetensors").items() if name.endswith("/step")
    }
    assert steps == {8.0}
    # A second resume with the same settings changes nothing, and says nothing.
    caplog.clear()
    run(shards, folder, 8, resume=True, seed=9, precision="bf16", micro_batch_size=8, log_every=2, optimizer=optimizer)
    assert not [line for line in caplog.messages if line.startswith(("resumed with", "learning rate"))]


def test_another_seed_draws_other_samples_from_the_resume_on(begun: Path, shards: str, tmp_path: Path) -> None:
    same, other = (copied(begun, tmp_path / name) for name in ("same", "other"))
    run(shards, same, 6, resume=True)
    run(shards, other, 6, resume=True, seed=1)
    a, b = (untimed(read_metrics(folder)) for folder in (same, other))
    assert a[:STEPS] == b[:STEPS] and a[STEPS]["loss"] != b[STEPS]["loss"]


def test_a_run_is_not_resumed_with_fewer_steps_than_it_has_done(begun: Path, shards: str, no_ray: None) -> None:
    before = (begun / "config.yaml").read_bytes()
    with pytest.raises(UserError, match=r"cannot resume with train\.steps = 3, the run has done 4"):
        run(shards, begun, 3, resume=True)
    assert (begun / "config.yaml").read_bytes() == before


def test_the_optimizer_is_loaded_with_another_learning_rate_in_every_group(
    shards: str, tmp_path: Path, begun: Path
) -> None:
    muon = OPTIMIZER.model_copy(update={"name": "muon"})
    run(shards, tmp_path / "run", optimizer=muon)
    before = read_tensors(tmp_path / "run" / "checkpoints" / "step-0000004" / "model.safetensors")
    # Hardly any rate: the weights of the resumed steps stay where they were.
    still = muon.model_copy(update={"lr": 1e-12, "matrix_lr": 1e-12})
    final = run(shards, tmp_path / "run", 6, resume=True, optimizer=still)
    for name, value in read_tensors(final / "model.safetensors").items():
        if "quantizer.norm" not in name:  # statistics, not trained
            torch.testing.assert_close(value, before[name], rtol=0, atol=1e-8)
