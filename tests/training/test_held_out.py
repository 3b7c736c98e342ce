"""Held-out loss: of samples that are never trained on, comparable over time, and reproducible after a resume."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from instella_ray.data.formats.codes import write_codes_file
from instella_ray.data.loading.image_data import ImageBatch
from instella_ray.data.loading.loader import CodesBatch
from instella_ray.data.loading.order import BatchPlan
from instella_ray.errors import UserError
from instella_ray.models.checkpoint import load_model
from instella_ray.models.folders import checkpoint_step, finished_checkpoints
from instella_ray.training import metrics_log
from instella_ray.training.generator import GeneratorRunConfig, GeneratorTask, complete_config, run_generator
from instella_ray.training.held_out import held_out_metrics
from instella_ray.training.launch import launch
from instella_ray.training.learner import Learner
from instella_ray.training.optim import EMA
from instella_ray.training.run_dir import read_metrics
from instella_ray.training.settings import BestConfig, HeldOutConfig
from instella_ray.training.tokenizer import TokenizerConfig, TokenizerTask, run_tokenizer
from instella_ray.training.trainer import Trainer

from ..kit.training import CPU, generator_config, tokenizer_config, untimed

HELD = HeldOutConfig(samples=10, every=2)


def on_images(cfg: GeneratorRunConfig, shards: str) -> GeneratorRunConfig:
    return cfg.model_copy(update={"codes": None, "images": shards})


def keys_of(task: GeneratorTask | TokenizerTask, steps: int, batch: int) -> set[str]:
    plan = BatchPlan(len(task.data), batch, task.data.order)
    batches = [task.data.batch(plan.place(step).epoch, plan.samples(step)) for step in range(steps)]
    return {key for each in batches for key in each.keys}


@pytest.mark.parametrize("kind", ["codes", "mixture", "images", "tokenizer"])
def test_held_out_samples_are_never_trained_on(
    kind: str, codes: str, shards: str, tokenizer: str, tmp_path: Path
) -> None:
    cfg = generator_config("diffusion", codes, tokenizer, tmp_path, held_out=HELD)
    task: GeneratorTask | TokenizerTask
    if kind == "tokenizer":
        task, count = TokenizerTask(tokenizer_config(shards, tmp_path, held_out=HELD)), 64
    elif kind == "images":
        task, count = GeneratorTask(complete_config(on_images(cfg, shards)), CPU), 64
    else:
        sources: Any = codes
        if kind == "mixture":
            other = tmp_path / "other"
            shutil.copytree(codes, other)
            rows = pq.read_table(other / "0.parquet").to_pylist()
            write_codes_file(str(other / "0.parquet"), [{**row, "key": f"other{row['key']}"} for row in rows])
            sources = [{"folder": codes, "weight": 3}, {"folder": str(other)}]
        data = {**cfg.model_dump(exclude_unset=True), "codes": sources}
        task = GeneratorTask(complete_config(GeneratorRunConfig.model_validate(data)), CPU)
        count = 2 * 24 - 1 if kind == "mixture" else 24  # of which 8 and 3 are held out, and ten evaluated
    assert task.held_out is not None and task.held_out.count == 10
    held_out: CodesBatch | ImageBatch = task.held_out.data.batch(0, np.arange(10))
    trained = keys_of(task, 30, 16)
    assert len(set(held_out.keys)) == 10 and trained.isdisjoint(held_out.keys) and len(trained) == count - 10
    assert kind != "mixture" or len({key for key in held_out.keys if key.startswith("other")}) in (2, 3)


def test_views_of_an_image_are_on_one_side(shards: str) -> None:
    from instella_ray.data.loading.split import split_off

    class Views:
        """Three views of each of eight images, in two files."""

        seed, window, starts = 0, 2, np.array([0, 12, 24])

        def __len__(self) -> int:
            return 24

        def with_seed(self, seed: int) -> Views:
            return self

        def order(self, epoch: int) -> Any:
            raise AssertionError

        def batch(self, epoch: int, samples: np.ndarray) -> list[int]:
            return samples.tolist()

        def column(self, index: np.ndarray, name: str) -> list[str]:
            return [f"{i // 3}" for i in index]

    rest, held_out = split_off(Views(), 5, 0)
    assert (len(rest), len(held_out)) == (18, 6)
    assert sorted(rest.order(1)[np.arange(18)].tolist()) == list(range(18))
    # The dataset counts its samples from the same epoch on.
    assert rest.batch(2, np.array([0, 17, 18, 37])) == [0, 17, 24, 24 * 2 + 1] and held_out.batch(0, np.array([0])) == [
        18
    ]
    with pytest.raises(UserError, match=r"train\.held_out\.samples 24: the data has 24 samples, none would be left"):
        split_off(Views(), 24, 0)


def test_a_resumed_run_logs_the_same_held_out_loss_and_the_same_means(
    codes: str, tokenizer: str, tmp_path: Path
) -> None:
    """Lines come every four steps, evaluations every six, checkpoints every five: none of them together."""
    held_out = HELD.model_copy(update={"every": 6})
    often = {
        "steps": 12,
        "log_every": 4,
        "checkpoint_every": 5,
        "preview_every": 100,
        "held_out": held_out,
        "loggers": (),
    }
    best = BestConfig(metric="held_out_loss", order="lower")
    run_generator(generator_config("diffusion", codes, tokenizer, tmp_path / "whole", **often, keep_best=best))
    stopped = generator_config("diffusion", codes, tokenizer, tmp_path / "stopped", **often, keep_best=best)

    class Stopping(GeneratorTask):
        def before_step(self, step: int) -> None:
            if step == 11:
                raise RuntimeError("stopped on purpose")

    with pytest.raises(RuntimeError, match="stopped on purpose"):
        complete = complete_config(stopped)
        launch(complete, lambda device: Stopping(complete, device), description="stopped")
    train = stopped.train.model_copy(update={"resume": True})
    run_generator(stopped.model_copy(update={"train": train}))
    rows, others = (untimed(read_metrics(tmp_path / name)) for name in ("whole", "stopped"))
    assert rows == others and [row["step"] for row in rows] == [4, 6, 8, 12]
    assert ["held_out_loss" in row for row in rows] == [False, True, False, True]
    assert {"held_out_loss_raw", "held_out_bit_accuracy", "held_out_bit_accuracy_noisy"} <= rows[1].keys()
    assert rows[1]["held_out_loss"] != rows[3]["held_out_loss"] != rows[3]["held_out_loss_raw"]
    # The last value before a checkpoint is its own; the first one had none yet.
    assert [checkpoint_step(folder) for folder in finished_checkpoints(tmp_path / "stopped")] == [10, 12]


def test_lines_are_means_over_all_steps_since_the_last_one(codes: str, tokenizer: str, tmp_path: Path) -> None:
    every = {"steps": 5, "checkpoint_every": 100, "preview_every": 100, "loggers": ()}
    for name, interval in (("each", 1), ("both", 3)):
        run_generator(generator_config("diffusion", codes, tokenizer, tmp_path / name, **every, log_every=interval))
    each, (first, last) = read_metrics(tmp_path / "each"), read_metrics(tmp_path / "both")
    for line, rows in ((first, each[:3]), (last, each[3:])):
        for name in ("loss", "bit_accuracy", "gradient_norm"):
            assert line[name] == pytest.approx(np.mean([row[name] for row in rows]), abs=2e-5)
        assert line["gradient_norm_max"] == max(row["gradient_norm"] for row in rows) > line["gradient_norm"]
        assert line["lr"] == rows[-1]["lr"]


def test_evaluation_changes_nothing_that_is_trained(codes: str, tokenizer: str, tmp_path: Path) -> None:
    cfg = complete_config(generator_config("ar", codes, tokenizer, tmp_path, held_out=HELD))
    task = GeneratorTask(cfg, CPU)
    learner, ema = Learner(task.step_module, task.model, cfg.train.optimizer, CPU), EMA(task.model, 0.9)
    with torch.no_grad():
        for value in task.model.parameters():
            value.add_(0.01)
    states = [{name: value.clone() for name, value in state.items()} for state in (task.model.state_dict(), ema.state)]
    task.model.train()
    assert task.held_out is not None
    found = held_out_metrics(task.held_out, learner, ema, 8)
    # However they are cut into batches.
    assert held_out_metrics(task.held_out, learner, ema, 3) == pytest.approx(found, abs=3e-6)
    assert found["held_out_loss"] != found["held_out_loss_raw"] and task.model.training
    for before, now in zip(states, (task.model.state_dict(), ema.state), strict=True):
        assert all(torch.equal(value, now[name]) for name, value in before.items())
    assert all(parameter.grad is None for parameter in task.model.parameters())


def test_a_tokenizers_held_out_images_may_be_others(shards: str, tmp_path: Path) -> None:
    other = HeldOutConfig(samples=12, data=shards, every=3)
    cfg = tokenizer_config(shards, tmp_path / "run", 3, held_out=other, preview_every=100, loggers=())
    cfg = TokenizerConfig.model_validate({**cfg.model_dump(), "output_sizes": (32, 48)})
    folder = run_tokenizer(cfg)
    row = read_metrics(tmp_path / "run")[-1]
    task = TokenizerTask(cfg)
    assert len(task.data) == 64 and task.held_out is not None
    # The EMA's reconstructions at both sizes, measured by hand.
    bit: Any = load_model(folder)
    batch = task.held_out.data.batch(0, np.arange(12))
    psnrs = []
    for size in (32, 48):
        codes = bit.encode(torch.from_numpy(batch.pixels[32]).permute(0, 3, 1, 2) / 127.5 - 1)
        restored = (bit.decode(codes, size, size).clamp(-1, 1) + 1) / 2
        error = restored - torch.from_numpy(batch.pixels[size]).permute(0, 3, 1, 2) / 255
        psnrs.append(-10 * error.square().flatten(1).mean(1).log10())
    assert row["held_out_psnr"] == pytest.approx(float(torch.cat(psnrs).mean()), abs=1e-3)
    assert {"held_out_loss", "held_out_loss_raw", "held_out_reconstruction"} <= row.keys()
    assert 32 <= row["output_size"] <= 48


@pytest.mark.parametrize("kind", ["codes", "images", "tokenizer"])
def test_held_out_samples_are_the_same_with_another_seed(
    kind: str, codes: str, shards: str, tokenizer: str, tmp_path: Path
) -> None:
    """Captions, dropped ones and crops too: a resume may change the seed, and the best is kept by this loss."""
    found: list[Any] = []
    for seed in (0, 1):
        task: GeneratorTask | TokenizerTask
        if kind == "tokenizer":
            task = TokenizerTask(tokenizer_config(shards, tmp_path, held_out=HELD, seed=seed))
        else:
            cfg = generator_config("diffusion", codes, tokenizer, tmp_path, held_out=HELD, seed=seed)
            task = GeneratorTask(complete_config(on_images(cfg, shards) if kind == "images" else cfg), CPU)
        assert task.held_out is not None
        found.append(task.held_out.data.batch(0, np.arange(10)))
    first, second = found
    if kind == "tokenizer":
        assert all(np.array_equal(pixels, second.pixels[size]) for size, pixels in first.pixels.items())
    else:
        assert first.captions == second.captions and first.keys == second.keys


def test_more_held_out_samples_than_there_are_is_refused_before_the_run(
    codes: str, tokenizer: str, tmp_path: Path
) -> None:
    cfg = generator_config("ar", codes, tokenizer, tmp_path / "run", held_out=HeldOutConfig(samples=24))
    with pytest.raises(UserError, match=r"train\.held_out\.samples 24: 24 of the 24 samples"):
        complete_config(cfg)


def test_truncated_held_out_captions_are_not_warned_of_again(
    codes: str, tokenizer: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cfg = generator_config("ar", codes, tokenizer, tmp_path, held_out=HELD)
    cfg = cfg.model_copy(update={"text_encoder": cfg.text_encoder.model_copy(update={"max_length": 4})})
    task = GeneratorTask(complete_config(cfg), CPU)
    assert task.held_out is not None
    caplog.clear()
    with caplog.at_level("INFO"):
        inputs = task.held_out.inputs(task.held_out.data.batch(0, np.arange(10)), torch.arange(10))
    assert inputs["features"].shape[2] == 4 and not caplog.records


def test_throughput_does_not_count_the_evaluations(
    codes: str, tokenizer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate, late = Trainer.held_out, [0.0]

    def slow(trainer: Trainer) -> Mapping[str, float]:
        late[0] += 1e6
        return evaluate(trainer)

    monkeypatch.setattr(Trainer, "held_out", slow)
    monkeypatch.setattr(
        metrics_log,
        "time",
        SimpleNamespace(perf_counter=lambda: time.perf_counter() + late[0], monotonic=time.monotonic),
    )
    settings = {"steps": 4, "log_every": 1, "loggers": (), "held_out": HELD.model_copy(update={"every": 2})}
    run_generator(generator_config("diffusion", codes, tokenizer, tmp_path / "run", **settings))
    assert late == [2e6] and all(row["images_per_second"] > 1 for row in read_metrics(tmp_path / "run"))
