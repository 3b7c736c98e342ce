"""Stages one after another: what a file of stages says, and that a chain goes on where it was stopped."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from instella_ray.config import dump_yaml, load_config
from instella_ray.data.formats.images import normalized, to_tensor
from instella_ray.data.loading.image_data import ImageData
from instella_ray.errors import UserError
from instella_ray.models import rng
from instella_ray.models.bit import BIT
from instella_ray.models.checkpoint import load_expected, save_model
from instella_ray.models.folders import latest_checkpoint
from instella_ray.training import tokenizer as module
from instella_ray.training.checkpoints import Checkpoint, save_checkpoint
from instella_ray.training.learner import Learner
from instella_ray.training.run_dir import read_metrics
from instella_ray.training.settings import OptimizerConfig, WorkersConfig
from instella_ray.training.stages import TokenizerStagesConfig, run_stages
from instella_ray.training.tokenizer import TokenizerTask, complete_tokenizer, evaluate_tokenizer, psnr

from ..kit.models import TINY_BIT
from ..kit.project import ROOT
from ..kit.training import ADVERSARIAL, CPU, tokenizer_config, untimed

FIRST: dict[str, Any] = {"train": {"steps": 4}}
THIRD: dict[str, Any] = {
    "train": {"steps": 8},
    "output_sizes": [32, 40],
    "freeze_encoder": True,
    "adversarial": ADVERSARIAL.model_dump(),
}


def chain(shards: str, run_dir: Path, **changes: Any) -> TokenizerStagesConfig:
    shared = tokenizer_config(shards, run_dir, checkpoint_every=4, **changes).model_dump(exclude_unset=True)
    return TokenizerStagesConfig.model_validate({**shared, "stages": {"first": FIRST, "third": THIRD}})


def finish_first(cfg: TokenizerStagesConfig) -> None:
    """The first stage's run directory as its last step leaves it."""
    stage = complete_tokenizer(cfg.each()["first"])
    folder = Path(stage.train.run_dir, "checkpoints", "step-0000004")
    folder.mkdir(parents=True)
    torch.manual_seed(5)
    bit = BIT(TINY_BIT)
    optimizer_state = Learner(bit, bit, stage.train.optimizer, CPU).optimizer_state()
    save_checkpoint(folder, bit.cfg, Checkpoint(4, bit.state_dict(), bit.state_dict(), optimizer_state, None), {})
    Path(stage.train.run_dir, "config.yaml").write_text(dump_yaml(stage))


def test_the_papers_stages_are_what_the_paper_says() -> None:
    cfg = load_config(TokenizerStagesConfig, str(ROOT / "configs/paper/05-tokenizer.yaml"))
    first, second, third = cfg.each().values()
    assert [stage.train.steps for stage in (first, second, third)] == [50_000, 10_000, 200_000]
    assert [stage.train.global_batch for stage in (first, second, third)] == [1024, 1024, 800]
    assert [stage.sizes for stage in (first, second)] == [(512,), (512, 768, 1024)]
    assert {first.temperature, first.late_temperature} == {0.5}
    assert {second.temperature, second.late_temperature} == {0.1}
    assert third.freeze_encoder and third.adversarial and not (first.adversarial or second.freeze_encoder)
    for stage in (first, second, third):
        asked = stage.train.optimizer
        assert (asked.name, asked.lr, asked.warmup_steps, asked.clip) == ("adamw", 1e-4, 1000, 1.0)
        assert stage.train.precision == "bf16" and stage.loss.reconstruction == "smooth_l1"
        look = stage.loss.perceptual
        assert (look.network, look.weights, look.size, look.crop) == ("vgg", "published", 448, 224)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stages.stage2.temprature=1", "stages.stage2: unknown key 'temprature', did you mean 'temperature'"),
        ("stages.stage2.data=a", "stages.stage2: data is shared by all stages"),
        ("stages.stage2.train.run_dir=a", "stages.stage2: train.run_dir cannot be set, it is train.run_dir/stage2"),
        ("stages.stage3.train.steps=0", "stages.stage3: 'train.steps' = 0"),
    ],
)
def test_a_stage_that_does_not_fit_is_named(override: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_config(TokenizerStagesConfig, str(ROOT / "configs/tokenizer/tiny.yaml"), [override])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"output_sizes": (32, 36)}, "output_sizes 36: not a multiple of 8"),
        ({"loss": {"perceptual": {"weights": "random"}}}, "crop 224: images are decoded to 32 px"),
        ({"loss": {"perceptual": {"weights": "gone.pth", "crop": 16}}}, r"weights gone\.pth: expected published"),
        ({"adversarial": {"discriminator": {"weights": "gone.pth"}}}, r"weights gone\.pth: expected published"),
        ({"start_from": "nowhere"}, "nowhere: not a model folder"),
    ],
)
def test_a_stage_that_cannot_be_trained_is_refused(
    changes: dict[str, Any], message: str, shards: str, tmp_path: Path
) -> None:
    plain = tokenizer_config(shards, tmp_path / "run").model_dump(exclude_unset=True)
    with pytest.raises(UserError, match=message):
        complete_tokenizer(module.TokenizerConfig.model_validate({**plain, **changes}))


def test_weights_of_another_model_are_not_trained_on(shards: str, tmp_path: Path) -> None:
    save_model(tmp_path, BIT(TINY_BIT.model_copy(update={"num_tokens": 8})))
    with pytest.raises(UserError, match=r"its model\.num_tokens is 8, this run's is 4"):
        complete_tokenizer(tokenizer_config(shards, tmp_path / "run").model_copy(update={"start_from": str(tmp_path)}))


def test_every_step_has_one_output_size_and_all_sizes_come_up(shards: str, tmp_path: Path) -> None:
    cfg = tokenizer_config(shards, tmp_path, steps=40).model_copy(update={"output_sizes": (32, 40, 48)})
    tasks = [TokenizerTask(cfg) for _ in range(2)]  # of two ranks, or before and after a restart
    whole = tasks[0].data.batch(0, np.arange(2))
    seen = set()
    for step in range(40):
        for task in tasks:
            task.before_step(step)
        assert tasks[0].size == tasks[1].size
        batch = tasks[0].batch(step, 0, np.arange(2))
        assert set(batch.pixels) == {32, tasks[0].size}, "no other size is made"
        assert all(np.array_equal(batch.pixels[size], whole.pixels[size]) for size in batch.pixels)
        (inputs,) = tasks[0].micro_batches(batch, 2, torch.arange(2))
        assert inputs["images"].dtype == inputs["targets"].dtype == torch.uint8
        assert inputs["images"].shape[-2:] == (32, 32) and inputs["targets"].shape[-2:] == (tasks[0].size,) * 2
        seen.add(tasks[0].size)
        if step < 3:
            loss, parts = tasks[0].step_module(**inputs)
            assert torch.isfinite(loss) and parts["reconstruction"] > 0
    assert seen == {32, 40, 48}
    codes = tasks[0].bit.eval().encode(inputs["images"])
    assert [tasks[0].bit.decode(codes, size, size).shape[-1] for size in (32, 40, 48)] == [32, 40, 48]


def test_pixels_become_floats_in_the_step_and_nothing_else_does(shards: str, tmp_path: Path) -> None:
    task = TokenizerTask(tokenizer_config(shards, tmp_path))
    batch = task.batch(0, 0, np.arange(4))
    (inputs,) = task.micro_batches(batch, 4, torch.arange(4))
    pixels = torch.from_numpy(batch.pixels[32])
    assert inputs["images"].data_ptr() == inputs["targets"].data_ptr() == pixels.data_ptr(), "no copy on the host"
    floats = to_tensor(pixels)
    given = task.step_module(**inputs)
    expected = task.step_module(**{**inputs, "images": floats, "targets": floats})
    assert torch.equal(given[0], expected[0]) and floats.min() >= -1 and floats.max() <= 1


def test_images_are_decoded_in_as_many_threads_as_a_worker_has_cpus(shards: str, tmp_path: Path) -> None:
    for count, cpus, threads in ((1, 0.5, 1), (1, 1, 1), (2, 7.5, 8), (0, 3, len(os.sched_getaffinity(0)))):
        workers = WorkersConfig(count=count, cpus=cpus)
        task = TokenizerTask(tokenizer_config(shards, tmp_path, workers=workers))
        assert workers.decoders == task.data._threads._max_workers == threads


@pytest.mark.process
def test_a_handful_of_images_is_learned_by_heart_to_30_db(shards: str, tmp_path: Path) -> None:
    cfg = tokenizer_config(
        shards, tmp_path, steps=OVERFIT, optimizer=OptimizerConfig(name="muon", lr=3e-3, decay_fraction=0.5)
    )
    model = TINY_BIT.model_copy(update={"bits_per_token": 16, "encoder_width": 64, "decoder_width": 64})
    model = model.model_copy(update={"encoder_heads": 2, "decoder_heads": 2})
    task = TokenizerTask(cfg.model_copy(update={"model": model, "late_temperature": 0.0}))
    learner = Learner(task.step_module, task.model, cfg.train.optimizer, CPU)
    batch = task.data.batch(0, np.arange(4))
    task.begin(batch)
    for step in range(OVERFIT):
        task.before_step(step)
        (inputs,) = task.micro_batches(batch, 4, rng.sample_seeds(0, step, torch.arange(4)))
        learner.backward(inputs, 1, True)
        learner.update(step, OVERFIT)
    images = normalized(task.micro_batches(batch, 4, torch.arange(4))[0]["images"])
    assert evaluate_tokenizer(task.bit.eval(), images, title="overfitted").psnr >= 30


OVERFIT = 400


def test_a_chain_goes_on_where_it_was_stopped_as_if_it_never_had(
    shards: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    finish_first(chain(shards, whole))
    shutil.copytree(whole, stopped)
    with pytest.raises(UserError, match="already holds a run"):
        run_stages(chain(shards, whole))
    final = run_stages(chain(shards, whole, resume=True))
    assert final == latest_checkpoint(whole / "third")

    # The same again, stopped in step 6, after the checkpoint of step 4.
    class Failing(TokenizerTask):
        def before_step(self, step: int) -> None:
            super().before_step(step)
            if step == 6:
                raise RuntimeError("stopped on purpose")

    with monkeypatch.context() as patch:
        patch.setattr(module, "TokenizerTask", Failing)
        with pytest.raises(RuntimeError, match="stopped on purpose"):
            run_stages(chain(shards, stopped, resume="auto"))
    again = run_stages(chain(shards, stopped, resume="auto"))
    assert not list(tmp_path.glob("*/first/metrics.jsonl"))  # what was finished was not trained again
    one, other = ({row["step"]: row for row in read_metrics(folder / "third")} for folder in (whole, stopped))
    assert set(one) == set(other) == set(range(1, 9))
    assert untimed(list(one.values())) == untimed(list(other.values()))
    assert {"discriminator", "adversarial", "adversarial_weight", "output_size", "dead_bits"} <= set(one[8])
    for name in ("model", "ema", "discriminator", "discriminator_optimizer"):
        assert Path(final, f"{name}.safetensors").read_bytes() == Path(again, f"{name}.safetensors").read_bytes(), name
    # It began with the first stage's weights, and its encoder is still theirs.
    first = load_expected(latest_checkpoint(whole / "first"), BIT)
    for ema in (True, False):
        third = load_expected(final, BIT, ema=ema)
        for name, value in first.encoder.state_dict().items():
            assert torch.equal(third.encoder.state_dict()[name], value), name
        assert any(not torch.equal(value, third.state_dict()[name]) for name, value in first.state_dict().items())
    assert json.loads(Path(final, "state.json").read_text())["step"] == 8


def test_a_stage_that_another_has_started_from_is_not_extended(shards: str, tmp_path: Path) -> None:
    cfg = chain(shards, tmp_path)
    finish_first(cfg)
    third = complete_tokenizer(cfg.each()["third"])
    Path(third.train.run_dir).mkdir()
    Path(third.train.run_dir, "config.yaml").write_text(dump_yaml(third))
    longer = chain(shards, tmp_path, resume=True)
    longer = longer.model_copy(update={"stages": {**longer.stages, "first": {"train": {"steps": 9}}}})
    with pytest.raises(UserError, match=r"stages\.first: no checkpoint of step 9, but stage third has started from it"):
        run_stages(longer)


@pytest.mark.process
@pytest.mark.nightly
def test_held_out_emoji_are_restored_6_db_better_than_their_mean_colour(shared_dir: Path, tmp_path: Path) -> None:
    cfg = load_config(TokenizerStagesConfig, str(ROOT / "configs/tokenizer/tiny.yaml"), EMOJI)
    folder = shared_dir / "data" / "emoji3d"
    shards = ",".join(str(folder / f"{number:05d}.tar") for number in (0, 1, 2))
    stage = cfg.each()["stage1"]
    train = stage.train.model_copy(update={"run_dir": str(tmp_path / "run")})
    bit = load_expected(module.run_tokenizer(stage.model_copy(update={"data": shards, "train": train})), BIT)
    data = ImageData(str(folder / "00003.tar"), (32,), 0)
    images = module.to_tensor(data.batch(0, np.arange(len(data))).pixels[32])
    colour = images.mean((0, 2, 3), keepdim=True).expand_as(images)
    restored = evaluate_tokenizer(bit, images, title="held out").psnr
    assert restored >= float(psnr(colour, images).mean()) + 6


EMOJI = [
    *("model.num_tokens=24", "model.encoder_width=64", "model.decoder_width=64"),
    *("model.encoder_heads=2", "model.decoder_heads=2"),
    *("train.optimizer.lr=0.003", "train.optimizer.warmup_steps=20", "train.optimizer.decay_fraction=0.5"),
    *("stages.stage1.train.steps=600", "stages.stage1.late_temperature=0.1", "stages.stage1.late_fraction=0.5"),
    *("train.checkpoint_every=600", "train.preview_every=600", "train.log_every=50"),
    "train.workers.count=0",
]
