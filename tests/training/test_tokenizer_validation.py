"""Validation beside a tokenizer's training: what is measured of a checkpoint, what is refused, and a chain's stages."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from instella_ray import storage
from instella_ray.data.formats.shards import write_webdataset
from instella_ray.data.loading.image_data import ImageData
from instella_ray.data.scenes import scene_rows
from instella_ray.errors import UserError
from instella_ray.models.bit import BIT
from instella_ray.models.checkpoint import load_expected
from instella_ray.training.stages import TokenizerStagesConfig, run_stages
from instella_ray.training.tokenizer import TokenizerConfig, complete_tokenizer, evaluate_tokenizer, to_tensor
from instella_ray.training.tokenizer_validation import (
    TokenizerValidation,
    measure_restorations,
)

from ..kit.training import tokenizer_config


def stage(shards: str, run_dir: Path, **validation: Any) -> TokenizerConfig:
    plain = tokenizer_config(shards, run_dir, steps=4, checkpoint_every=2).model_dump(exclude_unset=True)
    return TokenizerConfig.model_validate({**plain, "validation": {"data": shards, **validation}})


def test_images_are_restored_at_every_size_and_a_metric_is_over_all(shards: str, tokenizer: str) -> None:
    cfg = TokenizerValidation(data=shards, count=11, sizes=(32, 48), batch_size=4, shown=6)
    numbers, image = measure_restorations(tokenizer, cfg)
    assert set(numbers) == {f"{name}{size}" for name in ("psnr", "ssim") for size in ("", "_32", "_48")}
    each = [numbers[f"psnr_{size}"]["value"] for size in (32, 48)]
    assert numbers["psnr"]["value"] == pytest.approx(np.mean(each))
    assert numbers["psnr"]["low"] < numbers["psnr"]["value"] < numbers["psnr"]["high"]
    # Whole pixel values make little difference to the measure of training.
    images = to_tensor(ImageData(shards, (32,), 0).batch(0, np.arange(11)).pixels[32])
    bit = load_expected(tokenizer, BIT)
    assert each[0] == pytest.approx(evaluate_tokenizer(bit, images, title="all").psnr, abs=0.1)
    assert image.shape == (2 * 48, 6 * 48, 3) and image.dtype == np.uint8
    # Again, in other batches: the same images at the same crops. One size alone needs no number in its names.
    again, _ = measure_restorations(tokenizer, cfg.model_copy(update={"batch_size": 16}))
    assert again["ssim_48"]["value"] == pytest.approx(numbers["ssim_48"]["value"])
    alone, _ = measure_restorations(tokenizer, cfg.model_copy(update={"sizes": (32,), "count": 2}))
    assert set(alone) == {"psnr", "ssim"}


def test_a_stage_is_validated_at_the_sizes_that_it_trains(shards: str, tmp_path: Path) -> None:
    trained = stage(shards, tmp_path).model_copy(update={"output_sizes": (32, 40)})
    completed = complete_tokenizer(trained).validation
    assert completed is not None and completed.sizes == (32, 40)
    assert complete_tokenizer(tokenizer_config(shards, tmp_path)).validation is None


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"sizes": (32, 36)}, r"validation\.sizes 36: not a multiple of 8"),
        ({"data": "nowhere.tar"}, "nowhere.tar"),
        ({"best_by": "rfid"}, "best_by rfid: expected a measured metric with a better direction: psnr, ssim"),
        ({"metrics": {"bit_usage": {}}}, r"metrics\.bit_usage: expected metrics that compare"),
    ],
)
def test_a_validation_that_cannot_be_made_is_refused_before_training(
    asked: dict[str, Any], message: str, shards: str, tmp_path: Path
) -> None:
    with pytest.raises((UserError, ValueError), match=message):
        complete_tokenizer(stage(shards, tmp_path, **asked))


def test_each_stage_of_a_chain_has_its_own_checkpoints_measured_while_it_trains(
    no_ray: None, shards: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    list(write_webdataset(scene_rows(6, 1, 32), str(tmp_path / "held_out"), 6))
    asked = {"data": f"{tmp_path}/held_out/*.tar", "every_steps": 2}
    shared = stage(shards, tmp_path / "run", **asked).model_dump(exclude_unset=True)
    second = {"output_sizes": [32, 40], "validation": {"every_steps": 4}}
    caplog.set_level(logging.INFO, "instella_ray")
    final = run_stages(TokenizerStagesConfig.model_validate({**shared, "stages": {"first": {}, "second": second}}))
    assert Path(final).parent.parent == tmp_path / "run" / "second"
    for name, measured in (("first", {"psnr", "ssim"}), ("second", {"psnr", "psnr_32", "psnr_40"})):
        folder = tmp_path / "run" / name / "validation"
        rows = storage.read_json(str(folder / "validation.json"))
        assert rows[-1]["step"] == 4 and measured <= set(rows[0]["metrics"])
        assert all((folder / f"step-{row['step']:07d}" / "restorations.png").exists() for row in rows)
        best = storage.read_json(str(folder / "best.json"))
        assert load_expected(best["model"], BIT).cfg.image_size == 32
        assert best["metrics"]["psnr"]["value"] == max(row["metrics"]["psnr"]["value"] for row in rows)
    assert caplog.text.count("best by psnr: step ") == 2
