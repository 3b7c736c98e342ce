"""What is wrong with a run is said in one line, with exit code 2, before its directory is touched or a worker starts."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import pytest

from instella_ray.config import dump_yaml
from instella_ray.errors import UserError, run_main
from instella_ray.training.generator_validation import GeneratorValidation, GeneratorValidator
from instella_ray.training.launch import check_run_dir
from instella_ray.training.settings import (
    BestConfig,
    HeldOutConfig,
    OptimizerConfig,
    TrainConfig,
    WorkersConfig,
    changes,
    first_difference,
)
from instella_ray.training.tokenizer import complete_tokenizer, run_tokenizer

from ..kit.models import TINY_BIT
from ..kit.project import ROOT, job
from ..kit.shards import image_bytes, tar_bytes
from ..kit.training import ADVERSARIAL, tokenizer_config


def refused(capsys: pytest.CaptureFixture[str], name: str, config: Path, *overrides: str) -> str:
    """The one line that the job prints on standard error."""
    argv = ["--config", str(config), *(word for item in overrides for word in ("--set", item))]
    assert run_main(lambda: job(name)(argv)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.parametrize(
    ("members", "message"),
    [
        (None, "no shard found"),
        ([("a.jpg", image_bytes())], "shard without captions"),
        ([("a.txt", b"a caption without an image")], "no usable image"),
    ],
)
def test_a_tokenizer_without_images_is_refused(
    members: list[tuple[str, bytes]] | None,
    message: str,
    no_ray: None,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shard = tmp_path / "shard.tar"
    if members is not None:
        shard.write_bytes(tar_bytes(members))
    run_dir = tmp_path / "run"
    file = ROOT / "configs/tokenizer/tiny.yaml"
    line = refused(capsys, "train_tokenizer", file, f"data={shard}", f"train.run_dir={run_dir}")
    assert line.startswith(f"error: {shard}") and message in line
    assert not run_dir.exists()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("text_encoder.name=package:no_such_package/model", "text encoder 'package:no_such_package/model'"),
        ("text_encoder.layers=99", "text encoder layers = 99: expected 1 to 6"),
        ("model.num_tokens=128", "model.num_tokens = 128: codes and text encoder require 4"),
        ("model.text_width=64", "model.text_width = 64: codes and text encoder require 384"),
        ("codes=nowhere", "nowhere: not a finished folder of codes"),
        ("tokenizer=nowhere", "nowhere: no model.safetensors found"),
        ("train.workers.threads=0", "'train.workers.threads' = 0"),
        ("train.micro_batch_size=0", "'train.micro_batch_size' = 0"),
        ("preview.temperature=-1", "'preview.temperature' = -1"),
        ("preview.sampler=euler", "'preview.sampler' = 'euler'"),
        (
            "train.keep_best={metric: bit_acuracy, order: higher}",
            "train.keep_best.metric 'bit_acuracy': not logged by this run, did you mean 'bit_accuracy'?",
        ),
        ("validation={every_steps: 2, prompts: gone.txt, best_by: psnr, metrics: {psnr: {}}}", "gone.txt"),
        ("validation={every_steps: 2, best_by: psnr, metrics: {psnr: {}}}", "metrics.psnr: needs"),
        ("validation={every_steps: 2, size: 36}", "validation.size 36: not a multiple of 8, as the tokenizer decodes"),
    ],
)
def test_a_generator_that_cannot_be_trained_is_refused(
    override: str,
    message: str,
    no_ray: None,
    codes: str,
    tokenizer: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run_dir = tmp_path / "run"
    given = [f"codes={codes}", f"tokenizer={tokenizer}", f"train.run_dir={run_dir}", override]
    assert message in refused(capsys, "train_generator", ROOT / "configs/generator/tiny.yaml", *given)
    assert not run_dir.exists()


def test_the_first_setting_that_differs_is_found_and_what_may_change_is_not() -> None:
    run = tokenizer_config("data", Path("run"))

    def changed(**train: object) -> tuple[str, object, object] | None:
        settings = TrainConfig.model_validate({**run.train.model_dump(), **train})
        return first_difference(run, run.model_copy(update={"train": settings}))

    assert changed(resume=True, log_every=7, checkpoint_every=7, preview_every=7, keep_checkpoints=7) is None
    assert changed(workers={"count": 4}, micro_batch_size=2, run_dir="elsewhere") is None
    assert changed(seed=3, steps=1000, precision="bf16", on_nonfinite="skip", max_skipped=3) is None
    optimizer = run.train.optimizer.model_dump()
    good = {"lr": 0.5, "matrix_lr": 0.5, "betas": (0.5, 0.9), "weight_decay": 0.5, "clip": 0.5}
    assert changed(optimizer={**optimizer, **good, "warmup_steps": 5, "decay_fraction": 0.5}) is None
    assert changed(optimizer={**optimizer, "name": "muon"}) == ("train.optimizer.name", "adamw", "muon")
    assert changed(global_batch=8) == ("train.global_batch", 16, 8)
    assert changed(ema_decay=0.5) == ("train.ema_decay", 0.999, 0.5)
    assert first_difference(run, run.model_copy(update={"adversarial": ADVERSARIAL})) is not None
    third, milder = (
        run.model_copy(update={"adversarial": ADVERSARIAL.model_copy(update={"optimizer": OptimizerConfig(lr=lr)})})
        for lr in (1e-3, 1e-4)
    )
    assert first_difference(third, milder) is None
    assert changes(third, milder) == {"adversarial.optimizer.lr": (1e-3, 1e-4)}
    assert first_difference(run, run.model_copy(update={"data": "other"})) == ("data", "data", "other")


@pytest.mark.parametrize(
    ("metric", "held_out", "message"),
    [
        ("psnr", False, None),
        ("held_out_psnr", True, None),
        ("held_out_loss_raw", True, None),
        ("held_out_los", True, "did you mean 'held_out_loss'"),
        ("held_out_loss", False, "not logged by this run"),
        ("held_out_dead_bits", True, "not logged by this run"),
        ("discriminator", True, "not logged by this run, expected one of loss, lr, "),
    ],
)
def test_the_best_is_kept_by_a_metric_that_the_run_logs(
    metric: str, held_out: bool, message: str | None, shards: str, tmp_path: Path
) -> None:
    train = {"held_out": HeldOutConfig(samples=2) if held_out else None}
    cfg = tokenizer_config(shards, tmp_path / "run", keep_best=BestConfig(metric=metric, order="higher"), **train)
    with pytest.raises(UserError, match=message) if message else nullcontext():
        complete_tokenizer(cfg)


def test_a_validation_folder_that_cannot_be_written_is_refused(
    codes: str, tokenizer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write everywhere
    validation = GeneratorValidation(folder=str(tmp_path / "shared"))
    with pytest.raises(UserError, match=rf"{tmp_path} cannot be written"):
        GeneratorValidator(validation, str(tmp_path / "run"), tokenizer, here=True)


@pytest.mark.parametrize(
    ("left", "refusals"),
    [
        ((), {True: "nothing to resume"}),
        (("attempts/0001.json",), {False: "already holds a run", True: "nothing to resume"}),  # ended before it began
        (("config.yaml", "attempts/0001.json"), {False: "already holds a run"}),
        (("photo.jpg",), {False: "already holds a run", True: "nothing to resume", "auto": "already holds a run"}),
    ],
)
def test_which_folders_a_run_may_begin_or_go_on_in(
    left: Sequence[str], refusals: dict[object, str], tmp_path: Path
) -> None:
    for name in left:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(dump_yaml(tokenizer_config("data", tmp_path)) if name == "config.yaml" else "")
    for resume in (False, True, "auto"):
        run = tokenizer_config("data", tmp_path, resume=resume)
        with pytest.raises(UserError, match=refusals[resume]) if resume in refusals else nullcontext():
            check_run_dir(run)


@pytest.mark.parametrize(("key", "value"), [("ema_decay", 0.5), ("global_batch", 32)])
def test_a_run_is_not_resumed_with_other_settings(
    key: str, value: float, no_ray: None, shards: str, tmp_path: Path
) -> None:
    begun = tokenizer_config(shards, tmp_path / "run")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(dump_yaml(begun))
    old = getattr(begun.train, key)
    with pytest.raises(UserError, match=rf"cannot resume with train\.{key} = {value}, the run was started with {old}"):
        run_tokenizer(tokenizer_config(shards, tmp_path / "run", **{"resume": True, key: value}))
    other = tokenizer_config(shards, tmp_path / "run", resume=True).model_copy(
        update={"model": TINY_BIT.model_copy(update={"encoder_layers": 3})}
    )
    with pytest.raises(UserError, match=r"cannot resume with model\.encoder_layers = 3"):
        run_tokenizer(other)
    assert (tmp_path / "run" / "config.yaml").read_text() == dump_yaml(begun)


def test_bad_input_that_is_met_in_training_is_one_line_too(
    workers: WorkersConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    members = [
        (f"{i}.{kind}", data) for i in range(4) for kind, data in (("jpg", image_bytes()[:-300]), ("txt", b"cut off"))
    ]
    (tmp_path / "cut.tar").write_bytes(tar_bytes(members))
    cfg = tokenizer_config(str(tmp_path / "cut.tar"), tmp_path / "run", workers=workers)
    with pytest.raises(UserError, match=r"cut\.tar: sample \d: undecodable; curate the shards first") as found:
        run_tokenizer(cfg)
    errors = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert errors == [f"training failed on rank 0: {found.value}"]
