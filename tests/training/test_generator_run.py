"""Generator training: what is logged and saved, and that a stopped run goes on."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from instella_ray.config import dump_yaml, load_config
from instella_ray.data.formats.codes import write_codes_file
from instella_ray.errors import UserError
from instella_ray.models.card import GeneratorCard
from instella_ray.models.checkpoint import load_model, read_checkpoint_config
from instella_ray.models.generator import ARGenerator, DiffusionGenerator
from instella_ray.models.text_encoder import TextEncoder, TextEncoderConfig, resolve_name
from instella_ray.pipeline import InstellaPipeline
from instella_ray.training import generator as module
from instella_ray.training.generator import GeneratorRunConfig, GeneratorTask, complete_config
from instella_ray.training.logged import DIFFUSION, GENERATOR, logged_metrics
from instella_ray.training.previews import decode_preview
from instella_ray.training.run_dir import read_metrics

from ..kit.training import generator_config, stop_a_generator_run

KINDS: dict[Literal["diffusion", "ar"], type] = {"diffusion": DiffusionGenerator, "ar": ARGenerator}


@pytest.mark.parametrize("kind", ["diffusion", "ar"])
def test_a_stopped_run_goes_on_and_its_figures_images_and_model_are_all_there(
    kind: Literal["diffusion", "ar"],
    no_ray: None,
    codes: str,
    tokenizer: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if importlib.util.find_spec("tensorboard"):
        from tensorboard.summary.writer import event_file_writer

        # Event files of one second and process are read in the order of their numbers' text: 10 before 9.
        monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(0))
    stop_a_generator_run(generator_config(kind, codes, tokenizer, tmp_path / "run"))

    going_on = generator_config(kind, codes, tokenizer, tmp_path / "run", resume=True)
    folder = module.run_generator(going_on)
    metrics = read_metrics(tmp_path / "run")
    assert [row["step"] for row in metrics] == [1, 2, 3, 4, 5, 6]
    assert all(0 < row["loss"] < 2 and 0 <= row["bit_accuracy"] <= 1 for row in metrics)
    assert all(row["flops_per_second"] > 0 and row["memory_gb"] > 0 and "mfu" not in row for row in metrics)
    own = DIFFUSION if kind == "diffusion" else GENERATOR
    assert set().union(*metrics) == {"step", *logged_metrics(going_on.train, own)}
    by_time = {name for row in metrics for name in row if name.startswith("bit_accuracy_t")}
    assert len(by_time) == 5 if kind == "diffusion" else not by_time
    if importlib.util.find_spec("tensorboard"):
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
        assert [(e.step, pytest.approx(e.value)) for e in events.Scalars("loss")] == [
            (row["step"], row["loss"]) for row in metrics
        ]
        assert [image.step for image in events.Images("preview")] == [3, 6]
        # One row, and after the second preview two.
        first, second = events.Images("preview_over_time")
        assert (first.width, second.step) == (second.width, 6) and second.height > first.height + 128
    model = load_model(folder)
    assert isinstance(model, KINDS[kind]) and (model.cfg.num_tokens, model.cfg.layers) == (4, 2)
    config = read_checkpoint_config(folder)
    assert config["text_encoder"] == going_on.text_encoder.model_dump(mode="json")
    card = GeneratorCard.of(config, folder)
    assert card == going_on.card and card.prompts == ("image number 1",)
    previews = sorted(path.name for path in (tmp_path / "run" / "previews").iterdir())
    assert previews == ["step-0000003.png", "step-0000006.png"]
    # The images of the same prompts that the checkpoint gives anywhere else, with the same settings unless others are given.
    prompts = going_on.preview.prompts
    pipe = InstellaPipeline.from_pretrained(folder, device="cpu")
    images = pipe(prompts, seed=range(len(prompts)), output_type="np").images
    preview = decode_preview((tmp_path / "run" / "previews" / previews[-1]).read_bytes())
    assert preview is not None and preview.labels == prompts and list(preview.rows) == ["EMA", "raw weights"]
    assert np.array_equal(preview.rows["EMA"], np.stack(images))
    # What the run directory says is the run: all settings, and sizes as they were filled in.
    assert load_config(GeneratorRunConfig, str(tmp_path / "run" / "config.yaml")) == complete_config(going_on)


def test_sources_are_mixed_by_weight_and_stand_in_the_runs_settings(codes: str, tokenizer: str, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(codes, other)
    rows = pq.read_table(other / "0.parquet").to_pylist()
    write_codes_file(str(other / "0.parquet"), [{**row, "key": f"other{row['key']}"} for row in rows])
    cfg = generator_config("ar", codes, tokenizer, tmp_path).model_dump(exclude_unset=True)
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
    cfg = generator_config("ar", codes, tokenizer, tmp_path)
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
    cfg = complete_config(generator_config("diffusion", codes, tokenizer, tmp_path))
    asked: dict[str, Any] = {}
    encoder = TextEncoder.from_config(cfg.text_encoder)
    monkeypatch.setattr(TextEncoder, "from_config", lambda cfg, **options: asked.update(options) or encoder)
    gpu = SimpleNamespace(total_memory=10**11)  # which decides on gradient checkpointing
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    train = cfg.train.model_copy(update={"precision": precision})
    GeneratorTask(cfg.model_copy(update={"train": train}), torch.device(device))
    assert asked == {"device": torch.device(device), "dtype": dtype}
