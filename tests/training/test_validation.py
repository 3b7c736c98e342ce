"""Validation beside training: which checkpoints are measured, which is the best, and that a real run's are."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from instella_ray import storage
from instella_ray.data.scenes import scene_prompts
from instella_ray.errors import UserError
from instella_ray.models.checkpoint import load_model
from instella_ray.models.folders import find_model
from instella_ray.training.generator import GeneratorRunConfig, run_generator
from instella_ray.training.generator_validation import (
    GeneratorValidation,
    GeneratorValidator,
)
from instella_ray.training.validation import Numbers, ValidationSchedule, Validator, validating

from ..kit.processes import wait_until
from ..kit.training import generator_config


def checkpoint(run_dir: Path, step: int) -> str:
    folder = run_dir / "checkpoints" / f"step-{step:07d}"
    folder.mkdir(parents=True)
    (folder / "state.json").write_text("{}")
    return str(folder)


def row(step: int, value: float | None) -> dict[str, object]:
    return {"step": step, "metrics": {"scene_score": {"name": "scene_score", "value": value, "low": 0, "high": 1}}}


def test_checkpoints_are_due_every_so_many_steps_and_at_the_end(tmp_path: Path) -> None:
    validator = GeneratorValidator(GeneratorValidation(every_steps=100), str(tmp_path), "bit", here=True)
    assert validator.due(False) == []
    folders = {step: checkpoint(tmp_path, step) for step in (50, 100, 150, 200, 210)}
    (tmp_path / "checkpoints" / "step-0000300").mkdir()
    (tmp_path / "checkpoints" / "step-0000300" / "model.safetensors").touch()  # not finished
    assert validator.due(False) == [folders[100], folders[200]]
    assert validator.due(True) == [folders[100], folders[200], folders[210]]
    validator.add(row(200, 0.5))
    assert validator.due(False) == [] and validator.due(True) == [folders[210]]


class NamedValidator(Validator):
    """Measures nothing but how long the weights are."""

    def measure(self, model: str, folder: Path) -> Numbers:
        found = {path.name: path.stat().st_size for path in Path(model).iterdir()}
        assert set(found) == {"config.yaml", "model.safetensors", "ema.safetensors"}
        return {"scene_score": {"name": "scene_score", "value": found["model.safetensors"], "low": 0, "high": 9}}


def test_checkpoints_of_a_run_directory_that_is_a_url_are_measured_in_a_folder_of_ones_own(tmp_path: Path) -> None:
    run_dir = f"memory://{tmp_path.name}/runs/bit"
    for step, size in ((100, 3), (200, 5)):
        for name in ("config.yaml", "model.safetensors", "ema.safetensors", "metrics.json", "state.json"):
            storage.write_bytes(storage.join(run_dir, "checkpoints", f"step-{step:07d}", name), b"x" * size)
    with pytest.raises(UserError, match="all nodes share as validation"):
        NamedValidator(ValidationSchedule(best_by="scene_score"), run_dir)
    shared = ValidationSchedule(every_steps=100, best_by="scene_score", folder=str(tmp_path / "measured"))
    with validating(validator := NamedValidator(shared, run_dir)):
        assert wait_until(lambda: len(validator.rows()) == 2, 30)
    best = storage.read_json(str(tmp_path / "measured" / "bit" / "best.json"))
    assert best["step"] == 200 and Path(best["model"], "model.safetensors").read_bytes() == b"x" * 5
    with pytest.raises(UserError, match="memory://out: validation during training"):
        NamedValidator(ValidationSchedule(best_by="scene_score", folder="memory://out"), run_dir)


def test_the_best_is_marked_and_its_model_alone_is_kept(tmp_path: Path) -> None:
    validator = GeneratorValidator(GeneratorValidation(), str(tmp_path), "bit", here=True)
    for step, value, best in ((1, None, 1), (2, 0.4, 2), (3, 0.7, 3), (4, 0.7, 3), (5, 0.2, 3)):
        (validator.folder / f"step-{step:07d}" / "model").mkdir(parents=True)
        validator.add(row(step, value))
        marked = storage.read_json(str(validator.folder / "best.json"))
        assert marked["step"] == best
        assert [str(path) for path in validator.folder.glob("step-*/model")] == [marked["model"]]
    assert [r["step"] for r in validator.rows()] == [1, 2, 3, 4, 5]


def test_a_best_that_cannot_be_told_is_refused() -> None:
    with pytest.raises(ValueError, match="best_by scene_score: expected a measured metric"):
        GeneratorValidation(prompts="own.txt")
    with pytest.raises(ValueError, match=r"best_by bit_usage: expected a measured metric .* direction: scene_score"):
        GeneratorValidation.model_validate({"metrics": {"bit_usage": {}, "scene_score": {}}, "best_by": "bit_usage"})


def test_a_runs_checkpoints_are_sampled_and_measured_while_it_trains(
    no_ray: None, codes: str, tokenizer: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plain = generator_config("diffusion", codes, tokenizer, tmp_path / "run")
    asked = {"every_steps": 3, "count": 12, "sampling": {"num_inference_steps": 2}, "text_length": 24}
    run = GeneratorRunConfig.model_validate({**plain.model_dump(exclude_unset=True), "validation": asked})
    caplog.set_level(logging.INFO, "instella_ray")
    run_generator(run)
    folder = tmp_path / "run" / "validation"
    rows = storage.read_json(str(folder / "validation.json"))
    assert [r["step"] for r in rows] == [3, 6] and set(rows[0]["metrics"]) == {"scene_score", "bit_usage"}
    assert all((folder / f"step-{r['step']:07d}" / "evaluation" / "report.html").exists() for r in rows)
    best = storage.read_json(str(folder / "best.json"))
    assert load_model(best["model"]).cfg.kind == "diffusion" and find_model(f"{tmp_path}/run/best") == best["model"]
    assert f"best by scene_score: step {best['step']}" in caplog.text
    assert scene_prompts(2, 0)[0].caption in (folder / "step-0000003" / "evaluation" / "report.html").read_text()
