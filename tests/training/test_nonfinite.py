"""A loss or gradient that is not finite: the run stops at it, or its batch is skipped and leaves no trace."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from instella_ray.errors import run_main
from instella_ray.models.checkpoint import read_tensors
from instella_ray.training import nonfinite
from instella_ray.training import tokenizer as module
from instella_ray.training.logged import logged_metrics
from instella_ray.training.losses import ReconstructionLoss
from instella_ray.training.nonfinite import FiniteCheck, NonFiniteLoss
from instella_ray.training.run_dir import read_metrics
from instella_ray.training.settings import TrainConfig
from instella_ray.training.tokenizer import TokenizerConfig, TokenizerTask, run_tokenizer, tokenizer_metrics
from instella_ray.training.trainer import Trainer

from ..kit.training import ADVERSARIAL, CPU, Spike, tokenizer_config, untimed


def tokenizer_run(shards: str, run_dir: Path, **train: object) -> TokenizerConfig:
    """With everything that a batch changes: weights, EMA, statistics of the logits and a discriminator."""
    cfg = tokenizer_config(shards, run_dir, loggers=(), micro_batch_size=8, **train)
    model = cfg.model.model_copy(update={"normalize_logits": True})
    return cfg.model_copy(update={"model": model, "adversarial": ADVERSARIAL})


def state(trainer: Trainer, folder: Path, step: int) -> dict[str, Tensor]:
    """All that a checkpoint of ``trainer`` holds."""
    folder.mkdir()
    trainer.save(folder, step)
    files = sorted(folder.glob("*.safetensors"))
    return {f"{file.name}/{name}": value for file in files for name, value in read_tensors(file).items()}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(value, b[name]) for name, value in a.items())


@pytest.mark.parametrize("harm", ["loss is infinite", "gradient is NaN", "statistics are NaN", "discriminator is NaN"])
def test_a_skipped_batch_changes_nothing_but_its_count(harm: str, shards: str, tmp_path: Path) -> None:
    cfg = tokenizer_run(shards, tmp_path / "run", on_nonfinite="skip")
    task = TokenizerTask(cfg)
    first, second = Spike(task.step_module), Spike(task.discriminator.step_module)  # type: ignore[union-attr]
    task.step_module = first
    task.discriminator.step_module = second  # type: ignore[union-attr, assignment]
    second.maps = second.inner.maps  # type: ignore[assignment]
    trainer = Trainer(task, cfg.train, CPU, None)
    for step in range(3):
        assert trainer.step(step, trainer.batch(step)).means
    before = state(trainer, tmp_path / "before", 3)
    assert any("quantizer.norm" in name for name in before) and any("ratios" in name for name in before)

    spike = second if harm == "discriminator is NaN" else first
    name, value = {"loss is infinite": ("offset", math.inf), "statistics are NaN": ("images", math.nan)}.get(
        harm, ("factor", math.nan)
    )
    usual = getattr(spike, name)
    setattr(spike, name, value)
    stepped = trainer.step(3, trainer.batch(3))
    assert (stepped.means, stepped.skipped) == ({}, 1)
    assert equal(state(trainer, tmp_path / "after", 4), before)

    setattr(spike, name, usual)
    stepped = trainer.step(4, trainer.batch(4))
    assert math.isfinite(stepped.means["loss"]) and stepped.skipped == 1
    assert not equal(state(trainer, tmp_path / "later", 5), before)


def spoilt(*steps: int) -> type[TokenizerTask]:
    """A task whose loss is NaN at ``steps``."""

    class Spoilt(TokenizerTask):
        def __init__(self, cfg: TokenizerConfig) -> None:
            super().__init__(cfg)
            self.spike = self.step_module = Spike(self.step_module)

        def before_step(self, step: int) -> None:
            super().before_step(step)
            self.spike.factor = math.nan if step in steps else 1.0

    return Spoilt


def test_a_resumed_run_has_skipped_what_an_uninterrupted_one_does(
    shards: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "TokenizerTask", spoilt(2, 5, 8))
    caplog.set_level(logging.INFO, "instella_ray")
    whole = run_tokenizer(tokenizer_run(shards, tmp_path / "whole", on_nonfinite="skip"))
    warnings = [record.getMessage() for record in caplog.records if "skipped (" in record.getMessage()]
    path = tmp_path / "whole" / "nonfinite-step2-rank0.json"
    assert warnings[0] == (
        f"step 2: loss or gradient is not finite; the batch's keys are in {path}; skipped (1 of at most 100)"
    )
    assert len(json.loads(path.read_text())["keys"]) == 16 and len(warnings) == 3
    rows = read_metrics(tmp_path / "whole")
    assert [row["skipped_batches"] for row in rows] == [0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3, 3]
    assert [row["step"] for row in rows if "loss" not in row] == [3, 6, 9]
    cfg = tokenizer_run(shards, tmp_path / "whole", on_nonfinite="skip")
    own = tokenizer_metrics(cfg, ReconstructionLoss(cfg.loss))
    assert set().union(*rows) == {"step", *logged_metrics(cfg.train, own)}

    # Stopped by the limit at step 8, with a checkpoint of 6 steps.
    with pytest.raises(NonFiniteLoss, match=r"step 8: .*; train.max_skipped = 2 batches have been skipped already"):
        run_tokenizer(tokenizer_run(shards, tmp_path / "stopped", on_nonfinite="skip", max_skipped=2))
    more: dict[str, object] = {"on_nonfinite": "skip", "max_skipped": 3, "resume": True}
    again = run_tokenizer(tokenizer_run(shards, tmp_path / "stopped", **more))
    assert untimed(read_metrics(tmp_path / "stopped")) == untimed(rows)
    for file in Path(whole).glob("*.safetensors"):
        assert file.read_bytes() == Path(again, file.name).read_bytes(), file.name


def test_a_stopped_run_goes_on_by_skipping_what_stopped_it(
    shards: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "TokenizerTask", spoilt(8))
    cfg = tokenizer_config(shards, tmp_path / "run", loggers=())
    assert run_main(lambda: print(run_tokenizer(cfg))) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: step 8: loss or gradient is not finite; ")
    assert last.endswith("; train.on_nonfinite=skip trains on without such batches")
    assert "skipped_batches" not in read_metrics(tmp_path / "run")[-1]
    on = cfg.train.model_copy(update={"resume": True, "on_nonfinite": "skip"})
    run_tokenizer(cfg.model_copy(update={"train": on}))
    assert read_metrics(tmp_path / "run")[-1]["skipped_batches"] == 1


def test_a_gpu_is_asked_only_where_something_is_logged_or_saved(tmp_path: Path) -> None:
    given = {"run_dir": str(tmp_path), "steps": 50, "log_every": 8, "checkpoint_every": 100, "preview_every": 100}

    def begun(**train: object) -> FiniteCheck:
        return FiniteCheck(TrainConfig.model_validate({**given, **train}), torch.device("cuda"), 0)

    good, bad = torch.tensor(1.0), torch.tensor(math.inf)
    check = begun()
    for step in range(6):
        assert check.passed(step, [good, bad if step == 2 else good], [f"key {step}"])
    check.passed(6, [good], [])
    with pytest.raises(NonFiniteLoss, match="step 2"):
        check.passed(7, [good], [])
    assert json.loads((tmp_path / "nonfinite-step2-rank0.json").read_text()) == {"step": 2, "keys": ["key 2"]}

    check = begun()
    check.passed(0, [bad], [])
    with pytest.raises(NonFiniteLoss, match="step 0"):
        check.check()  # before a preview, and before a checkpoint of a run that ends early
    check = begun(log_every=1000)
    for step in range(nonfinite.UNCHECKED - 1):
        check.passed(step, [bad], [])
    with pytest.raises(NonFiniteLoss, match="step 0"):
        check.passed(nonfinite.UNCHECKED - 1, [good], [])
    assert not begun(on_nonfinite="skip").passed(0, [bad], [])


def test_a_limit_below_what_is_skipped_already_stops_at_the_next(tmp_path: Path) -> None:
    """A resume may lower it."""
    cfg = TrainConfig(run_dir=str(tmp_path), on_nonfinite="skip", max_skipped=3)
    check = FiniteCheck(cfg, CPU, skipped=5)
    assert check.passed(0, [torch.tensor(1.0)], ["a"])
    with pytest.raises(NonFiniteLoss, match="5 batches have been skipped already"):
        check.passed(1, [torch.tensor(math.nan)], ["b"])
