"""Comparisons: planted differences are found, equal runs are equal, what was not measured alike is refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from instella_ray import cli
from instella_ray.data.formats.shards import write_tar
from instella_ray.data.prompts import Prompt, read_prompts
from instella_ray.data.scenes import scene_rows
from instella_ray.errors import UserError
from instella_ray.evaluation.compare import compare
from instella_ray.evaluation.differences import Row
from instella_ray.evaluation.evaluate import EvaluateConfig, run_evaluate
from instella_ray.evaluation.metric_settings import MetricsConfig
from instella_ray.models.sampling import SamplingConfig

from ..kit.models import write_tokenizer
from ..kit.sample_sets import noise, write_samples, write_sweep

PROMPTS = read_prompts("scenes", count=24)


def evaluated(output: Path, **more: Any) -> str:
    run_evaluate(EvaluateConfig(output=str(output), local=True, **more))
    return str(output)


def rows_of(a: str, b: str, **more: Any) -> dict[str, Row]:
    (comparison,) = compare(a, b, **more)
    (other,) = comparison.others
    return {row.name: row for row in other.rows}


@pytest.fixture
def tokenizer(tmp_path: Path) -> str:
    return write_tokenizer(tmp_path / "bit")


def test_equal_runs_are_equal(tmp_path: Path, tokenizer: str) -> None:
    samples = write_samples(tmp_path / "s", PROMPTS, noise(24, 2), tokenizer)
    a, b = (evaluated(tmp_path / name, samples=samples, tokenizer=tokenizer) for name in "ab")
    rows = rows_of(a, b)
    assert {"scene_score", "bit_usage", "diversity_bits", "scene_score/counting"} <= set(rows)
    assert {row.verdict for row in rows.values()} == {"equal"}
    assert rows["scene_score"].p_value == 1 and rows["scene_score"].how == "paired over 48 samples"
    assert rows["diversity_bits"].how == "paired over 24 prompts"
    assert rows["bit_usage"].p_value is None and rows["bit_usage"].how == "unpaired"


def test_a_planted_difference_is_found(tmp_path: Path, tokenizer: str) -> None:
    codes = noise(24, 4)
    alike = codes.copy()
    alike[3::4] = alike[2::4]  # every second pair of a prompt is one image
    a = evaluated(tmp_path / "a", samples=write_samples(tmp_path / "s", PROMPTS, codes))
    b = evaluated(tmp_path / "b", samples=write_samples(tmp_path / "t", PROMPTS, alike, seed=4))
    row = rows_of(a, b)["diversity_bits"]
    assert row.difference < 0 and row.high is not None and row.high < 0
    assert row.p_value is not None and row.p_value < 0.01 and row.verdict == "A higher"
    other = evaluated(tmp_path / "c", samples=write_samples(tmp_path / "u", PROMPTS, noise(24, 4, 9), seed=5))
    assert rows_of(a, other)["diversity_bits"].verdict == "within the interval"


def test_the_better_image_quality_is_told_with_its_page(
    tmp_path: Path, tokenizer: str, capsys: pytest.CaptureFixture[str]
) -> None:
    scenes = list(scene_rows(24, 1, 32))
    write_tar(str(tmp_path / "t" / "0.tar"), scenes)
    other = write_tokenizer(tmp_path / "other", seed=5)
    outputs = [
        evaluated(tmp_path / name, images=str(tmp_path / "t"), tokenizer=folder)
        for name, folder in (("a", tokenizer), ("b", other))
    ]
    assert cli.main(["compare", *outputs, "--output", str(tmp_path / "page.html")]) == 0
    out, page = capsys.readouterr().out, (tmp_path / "page.html").read_text()
    row = rows_of(*outputs)["psnr"]
    scores = np.array([row.a["value"], row.b["value"]])
    assert row.difference == pytest.approx(scores[1] - scores[0]) and row.how == "paired over 24 samples"
    better = "B better" if row.difference > 0 else "A better"
    assert row.verdict == better and row.p_value is not None and row.p_value < 0.01
    assert "\npsnr\n" in out and better in out and "psnr" in page and better in page
    assert (
        page.count('src="data:image/') == 48 and "http" not in page.replace("http-equiv", "") and scenes[0][2] in page
    )


def test_other_metrics_and_other_settings_are_refused_by_name(tmp_path: Path, tokenizer: str) -> None:
    write_tar(str(tmp_path / "t" / "0.tar"), scene_rows(8, 1, 32))

    def output(name: str, **metrics: Any) -> str:
        given = {"images": str(tmp_path / "t"), "tokenizer": tokenizer}
        return evaluated(tmp_path / name, **given, metrics=MetricsConfig.model_validate(metrics))

    plain = output("a", psnr={}, lpips={"net": "alex"})
    jpeg = output("b", psnr={"images": {"format": "jpeg"}}, ssim={})
    with pytest.raises(
        UserError, match=r"nothing to compare \(.*psnr: settings\.images\.format is pixels in A, jpeg in B"
    ):
        compare(plain, jpeg)
    more = output("c", psnr={}, lpips={"net": "vgg"}, ssim={})
    (comparison,) = compare(plain, more)
    (other,) = comparison.others
    assert [row.name for row in other.rows] == ["psnr"]
    assert other.refused == {
        "lpips": "A measured lpips_alex_random_trunk, B lpips_vgg_random_trunk: other metrics",
        "ssim": "measured in B alone",
    }
    assert "B, not compared: ssim: measured in B alone" in comparison.text()
    with pytest.raises(UserError, match="images of 32 px in A, 64 px in B"):
        given = {"images": str(tmp_path / "t"), "tokenizer": tokenizer, "size": 64}
        compare(plain, evaluated(tmp_path / "d", **given, metrics=MetricsConfig.model_validate({"psnr": {}})))


def test_samples_of_other_prompts_are_not_paired(tmp_path: Path) -> None:
    other = [Prompt(p.id, f"{p.text} again") for p in PROMPTS]
    a = evaluated(tmp_path / "a", samples=write_samples(tmp_path / "s", PROMPTS, noise(24, 2)))
    b = evaluated(tmp_path / "b", samples=write_samples(tmp_path / "t", other, noise(24, 2, 1)))
    row = rows_of(a, b)["diversity_bits"]
    assert row.p_value is None and row.how.startswith("unpaired")


def test_other_images_of_the_same_names_are_not_paired(tmp_path: Path, tokenizer: str) -> None:
    outputs = []
    for seed, name in ((1, "a"), (2, "b")):
        rows = [(f"{i}", image, "an image", {}) for i, (_, image, _, _) in enumerate(scene_rows(8, seed, 32))]
        write_tar(str(tmp_path / f"t{name}" / "0.tar"), rows)
        outputs.append(evaluated(tmp_path / name, images=str(tmp_path / f"t{name}"), tokenizer=tokenizer))
    row = rows_of(*outputs)["psnr"]
    assert row.p_value is None and row.how.startswith("unpaired")


def test_settings_of_sweeps_are_compared_by_name(tmp_path: Path) -> None:
    settings = {f"g{g}": SamplingConfig(guidance_scale=g) for g in (1.0, 2.0)}
    outputs = []
    for name in "ab":
        sweep = write_sweep(tmp_path / f"s{name}", settings, PROMPTS, codes=lambda n: noise(24, 2, n))
        outputs.append(evaluated(tmp_path / name, samples=sweep))
    assert [c.setting for c in compare(*outputs)] == ["g1.0", "g2.0"]
    (one,) = compare(f"{outputs[0]}#g1.0", f"{outputs[0]}#g2.0")
    assert ("sampling.guidance_scale", {"A": "1", "B": "2"}) in one.differs
    with pytest.raises(UserError, match=r"no such setting, expected one of g1\.0, g2\.0"):
        compare(f"{outputs[0]}#g3", outputs[1])
    with pytest.raises(UserError, match="not a finished evaluation"):
        compare(str(tmp_path / "nothing"), outputs[0])
