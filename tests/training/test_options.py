"""Runs with the options in which paper and release differ, and those of the claims: trained, previewed, saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from instella_ray.errors import UserError
from instella_ray.models.bit import BIT
from instella_ray.models.checkpoint import load_model
from instella_ray.models.folders import latest_checkpoint
from instella_ray.training.generator import run_generator
from instella_ray.training.losses import ReconstructionLoss, TokenizerLossConfig
from instella_ray.training.run_dir import read_metrics
from instella_ray.training.tokenizer import TokenizerConfig, run_tokenizer

from ..kit.training import PLAIN_LOSS, generator_config, tokenizer_config


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (
            "diffusion",
            {"time_layers": 1, "position_place": "block", "text_layers": "last", "target": "x0", "layers": 3},
        ),
        ("ar", {"norm": "layer", "position_place": "block"}),
    ],
)
def test_generators_train_sample_previews_and_are_saved(
    kind: Any, options: dict[str, Any], codes: str, tokenizer: str, tmp_path: Path
) -> None:
    cfg = generator_config(kind, codes, tokenizer, tmp_path / "run", steps=9, loggers=())
    model = type(cfg.model).model_validate({**cfg.model.model_dump(exclude_unset=True), **options})
    run_generator(cfg.model_copy(update={"model": model}))
    rows = read_metrics(tmp_path / "run")
    assert rows[-1]["loss"] < rows[0]["loss"]
    loaded = load_model(latest_checkpoint(tmp_path / "run"))
    assert {name: getattr(loaded.cfg, name) for name in options} == options
    assert list((tmp_path / "run").glob("previews/*.png"))


def test_depth_and_text_may_differ_only_if_all_blocks_read_one_layer(
    codes: str, tokenizer: str, tmp_path: Path
) -> None:
    cfg = generator_config("diffusion", codes, tokenizer, tmp_path / "run")
    model = type(cfg.model)(width=32, heads=1, layers=3)
    with pytest.raises(UserError, match=r"model\.layers = 3: codes and text encoder require 2"):
        run_generator(cfg.model_copy(update={"model": model}))


@pytest.mark.parametrize(
    ("model", "run", "loss"),
    [
        ({"quantizer": "one_hot"}, {}, {}),
        ({}, {"temperature": 0.0, "late_temperature": 0.0}, {"smooth_l1_beta": 0.1}),
    ],
    ids=["one-hot words", "hard bits"],
)
def test_tokenizers_train_and_are_saved(
    model: dict[str, Any], run: dict[str, Any], loss: dict[str, Any], shards: str, tmp_path: Path
) -> None:
    cfg = tokenizer_config(shards, tmp_path / "run", loggers=()).model_dump()
    cfg = {**cfg, **run, "model": {**cfg["model"], **model}, "loss": {**PLAIN_LOSS.model_dump(), **loss}}
    run_tokenizer(TokenizerConfig.model_validate(cfg))
    rows = read_metrics(tmp_path / "run")
    assert rows[-1]["reconstruction"] < 0.9 * rows[0]["reconstruction"]
    assert all(0 <= row["dead_bits"] <= 1 and 0 <= row["bit_entropy"] <= 1 for row in rows)
    loaded = load_model(latest_checkpoint(tmp_path / "run"))
    assert isinstance(loaded, BIT) and loaded.encode(torch.zeros(1, 3, 32, 32)).shape == (1, 4, 6)


def test_smooth_l1_turns_linear_at_beta() -> None:
    images, places = torch.zeros(1, 3, 4, 4), torch.zeros(1, 2)

    def loss(error: float, **options: Any) -> float:
        cfg = TokenizerLossConfig(perceptual=PLAIN_LOSS.perceptual, **options)
        return float(ReconstructionLoss(cfg)(images + error, images, places)[0])

    assert loss(0.05, smooth_l1_beta=0.1) == pytest.approx(0.05**2 / 0.2)
    assert loss(0.5, smooth_l1_beta=0.1) == pytest.approx(0.5 - 0.05)
    assert loss(0.5) == pytest.approx(0.125) and loss(1.5) == pytest.approx(1.0)
    assert loss(0.5, reconstruction="mse") == pytest.approx(0.25)
    # As the pixel loss, so that of the gradients: three of four columns have a neighbour, all errors are the same.
    assert loss(0.5, smooth_l1_beta=0.1, gradient_weight=1.0) == pytest.approx(0.45)


@pytest.mark.parametrize(
    ("given", "key"),
    [
        ({"temperature": -0.1}, "temperature"),
        ({"late_temperature": float("inf")}, "late_temperature"),
        ({"loss": {"smooth_l1_beta": 0}}, "loss.smooth_l1_beta"),
    ],
)
def test_values_without_a_meaning_are_refused(given: dict[str, Any], key: str, tmp_path: Path) -> None:
    cfg = tokenizer_config("a.tar", tmp_path).model_dump()
    with pytest.raises(ValidationError, match=f"{key}\n"):
        TokenizerConfig.model_validate({**cfg, **given})
