"""Comparisons: planted differences are found, equal runs are equal, what was not measured alike is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from instella_ray import cli, storage
from instella_ray.data.formats.shards import write_tar
from instella_ray.data.prompts import Prompt, read_prompts
from instella_ray.data.scenes import scene_rows
from instella_ray.errors import UserError
from instella_ray.evaluation.compare import compare
from instella_ray.evaluation.differences import Row, holm, unpaired_interval, verdict
from instella_ray.evaluation.evaluate import EvaluateConfig, run_evaluate
from instella_ray.evaluation.metric_settings import MetricsConfig
from instella_ray.evaluation.statistics import JACKKNIFE, WILSON, wilson
from instella_ray.models.sampling import SamplingConfig

from ..kit.browser import chromium
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
        "lpips_alex_random_trunk": "A measured lpips_alex_random_trunk, B lpips_vgg_random_trunk: other metrics",
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
    assert (
        row.p_value is None and row.how == "unpaired" and row.low is not None and row.verdict == "within the interval"
    )


def test_samples_of_other_seeds_are_paired_by_prompt_and_the_seeds_are_named(tmp_path: Path) -> None:
    """Whatever the order of a prompt's samples is: as blocks."""
    codes = noise(24, 2)
    a = evaluated(tmp_path / "a", samples=write_samples(tmp_path / "s", PROMPTS, codes))
    other = codes.reshape(24, 2, *codes.shape[1:])[:, ::-1].reshape(codes.shape)
    b = evaluated(tmp_path / "b", samples=write_samples(tmp_path / "t", PROMPTS, other, seed=9))
    row = rows_of(a, b)["diversity_bits"]
    assert row.how == "paired over 24 prompts, other seeds" and row.verdict == "equal"


def test_other_images_of_the_same_names_are_not_paired(tmp_path: Path, tokenizer: str) -> None:
    outputs = []
    for seed, name in ((1, "a"), (2, "b")):
        rows = [(f"{i}", image, "an image", {}) for i, (_, image, _, _) in enumerate(scene_rows(8, seed, 32))]
        write_tar(str(tmp_path / f"t{name}" / "0.tar"), rows)
        outputs.append(evaluated(tmp_path / name, images=str(tmp_path / f"t{name}"), tokenizer=tokenizer))
    row = rows_of(*outputs)["psnr"]
    assert row.p_value is None and row.how.startswith("unpaired")


def test_images_of_other_models_on_the_same_prompts_stand_side_by_side(tmp_path: Path, tokenizer: str) -> None:
    """Under names of their own, which nothing else is paired by."""
    samples = write_samples(tmp_path / "s", PROMPTS, noise(24, 1), tokenizer)
    a = evaluated(tmp_path / "a", samples=samples, tokenizer=tokenizer)
    rows = list(scene_rows(24, 1, 32))
    other = [
        (f"x{i}", row[1], prompt.text, {}) for i, (row, prompt) in enumerate(zip(rows, PROMPTS[::-1], strict=True))
    ]
    write_tar(str(tmp_path / "t" / "0.tar"), other)
    images = {"size": 32, "metrics": MetricsConfig.model_validate({"scene_score": {}})}
    b = evaluated(tmp_path / "b", images=str(tmp_path / "t"), **images)
    (comparison,) = compare(a, b)
    assert len(comparison.images) > 4
    assert all(shown["A"]["prompt"] == shown["B"]["prompt"] for shown in comparison.images)
    assert all(row.how.startswith("unpaired") for row in comparison.others[0].rows)


def test_settings_of_sweeps_are_compared_by_name(tmp_path: Path) -> None:
    settings = {f"g{g}": SamplingConfig(guidance_scale=g) for g in (1.0, 2.0)}
    outputs = []
    for name in "ab":
        sweep = write_sweep(tmp_path / f"s{name}", settings, PROMPTS, codes=lambda n: noise(24, 2, n))
        outputs.append(evaluated(tmp_path / name, samples=sweep))
    assert [c.setting for c in compare(*outputs)] == ["g1.0", "g2.0"]
    (one,) = compare(f"{outputs[0]}#g1.0", f"{outputs[0]}#g2.0")
    assert ("sampling.guidance_scale", {"A": "1", "B": "2"}) in one.differs
    (each,) = compare(outputs[0])
    assert each.runs == {"A": f"{outputs[0]}#g1.0", "B": f"{outputs[0]}#g2.0"} and each.others == one.others
    with pytest.raises(UserError, match=r"g1\.0: 1 to compare, expected 2 to 26"):
        compare(f"{outputs[0]}#g1.0")
    with pytest.raises(UserError, match=r"no such setting, expected one of g1\.0, g2\.0"):
        compare(f"{outputs[0]}#g3", outputs[1])
    with pytest.raises(UserError, match="not a finished evaluation"):
        compare(str(tmp_path / "nothing"), outputs[0])


def test_several_runs_stand_beside_the_first_with_all_that_differs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    codes, outputs = noise(24, 4), []
    alike = codes.copy()
    alike[1::4], alike[3::4] = alike[0::4], alike[2::4]
    given: dict[str, dict[str, Any]] = {"b": {"text_encoder": {"name": "T5"}}, "c": {"kind": "ar"}}
    for name, of in (("a", codes), ("b", alike), ("c", codes)):
        samples = write_samples(tmp_path / f"s{name}", PROMPTS, of, **given.get(name, {}))
        outputs.append(evaluated(tmp_path / name, samples=samples, seed=7 if name == "c" else 0))
    (found,) = compare(*outputs)
    assert found.runs == dict(zip("ABC", outputs, strict=True)) and [other.label for other in found.others] == [
        "B",
        "C",
    ]
    verdicts = {(name, label): row.verdict for name, _, rows in found.metrics for label, row in rows.items()}
    assert verdicts["diversity_bits", "B"] == "A higher" and verdicts["diversity_bits", "C"] == "equal"
    differs = dict(found.differs)
    # Each side's own keys, and the evaluations' settings.
    assert differs["text_encoder.name"] == {"A": "not recorded", "B": "T5", "C": "not recorded"}
    assert differs["kind"] == {"A": "diffusion", "B": "diffusion", "C": "ar"}
    assert differs["card.bootstrap_seed"] == {"A": "0", "B": "0", "C": "7"}
    assert "seconds_per_image" not in differs and "card.actor_seconds" not in differs
    results = storage.read_json(f"{outputs[2]}/results.json")
    results["settings"][0]["metrics"]["bit_usage"]["cautions"] = ["few images"]
    storage.write_json(f"{outputs[2]}/results.json", results)
    assert cli.main(["compare", *outputs, "--output", f"{tmp_path}/page.html"]) == 0
    out = capsys.readouterr().out
    assert (
        "Caution: C, bit_usage: few images" in out
        and "A higher" in out
        and "text_encoder.name: A not recorded; B T5" in out
    )
    assert max(map(len, out.split("95 % intervals")[0].replace(str(tmp_path), "").splitlines())) <= 110
    page = (tmp_path / "page.html").read_text()
    assert "<th>C − A</th>" in page and "text_encoder.name" in page and page.count("A higher") == 1
    assert cli.main(["compare", *outputs, "--json"]) == 0
    found_in_json = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    rows = {row["name"]: row for row in found_in_json["comparisons"][0]["others"][0]["rows"]}
    assert rows["diversity_bits"]["verdict"] == "A higher" and rows["dead_bits"]["low"] is None


ODD = "run #1? 50%41 a:b [ä] \udce9"
"""With a byte that is not UTF-8."""


def test_folders_of_any_name_are_compared_into_a_folder_and_linked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluated(tmp_path / ODD, samples=write_samples(tmp_path / "s", PROMPTS, noise(24, 2)))
    settings = {f"g{g}": SamplingConfig(guidance_scale=g) for g in (1.0, 2.0)}
    sweep = write_sweep(tmp_path / "sweep", settings, PROMPTS, codes=lambda n: noise(24, 2, n))
    evaluated(tmp_path / f"a:{ODD}", samples=sweep)
    (tmp_path / "reports").mkdir()
    monkeypatch.chdir(tmp_path)
    assert cli.main(["compare", ODD, f"a:{ODD}#g1.0", "--output", "reports"]) == 0
    out = capsys.readouterr().out
    told = ODD.replace("\udce9", "?")
    assert "page: reports/compare.html" in out and f"A  {told}\n" in out and f"B  a:{told}#g1.0\n" in out
    assert [path.name for path in (tmp_path / "reports").rglob("*")] == ["compare.html"]
    # A folder of the whole name comes before the setting of another.
    assert cli.main(["compare", ODD, f"a:{ODD}#g1.0", "--output", "reports/page.html/"]) == 0
    assert (tmp_path / "reports" / "page.html" / "compare.html").exists()
    assert cli.main(["compare", ODD, ODD, "--output", "s/manifest.json/x"]) == 2
    assert "manifest.json is not a folder" in capsys.readouterr().err


@pytest.mark.process
def test_links_to_folders_of_any_name_lead_to_their_reports(tmp_path: Path) -> None:
    """In a Chromium of its own."""
    outputs = [str(tmp_path / name) for name in (ODD, "a:b")]
    for number, output in enumerate(outputs):
        evaluated(Path(output), samples=write_samples(tmp_path / f"s{number}", PROMPTS[:1], noise(1, 2, number)))
    compare(*outputs, output=str(tmp_path / "p#1.html"))
    with chromium(tmp_path) as browser, browser.page() as page:
        page.goto(f"file://{tmp_path}/p%231.html")
        links = page.js("[...document.querySelectorAll('nav[aria-label=\"Other pages\"] a')].map(a => a.href)")
        assert len(links) == 2
        for number, link in enumerate(links):
            page.goto(link)
            assert page.js("document.title") == f"Evaluation of {tmp_path}/s{number}"


def test_holms_correction_is_the_published_procedure() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1, 1] and holm([]) == []


def side(value: float, low: float | None, high: float | None, interval: str = WILSON) -> dict[str, Any]:
    return {"value": value, "low": low, "high": high, "settings": {"interval": interval}}


def test_the_interval_of_an_unpaired_difference_is_the_published_one() -> None:
    """Newcombe 1998, method 10, example (a): 56 of 70 against 48 of 80 is 0.0524 to 0.3339, from Wilson's intervals."""
    a, b = side(0.6, 0.490455, 0.700382), side(0.8, 0.691834, 0.876953)
    assert unpaired_interval(a, b) == pytest.approx((0.0524, 0.3339), abs=5e-5)
    # What a jackknife's interval was cut off at zero is put back.
    cut, whole = side(1, 0, 4, JACKKNIFE), side(9, 5, 13, JACKKNIFE)
    assert unpaired_interval(cut, whole) == pytest.approx((3, 13))
    assert unpaired_interval(side(1, None, None), whole) is None


@pytest.mark.parametrize(
    ("share", "other", "sizes"), [(0.5, 0.5, (20, 40)), (0.05, 0.2, (30, 30)), (0, 0.1, (25, 100))]
)
def test_intervals_of_unpaired_rates_hold_the_truth(share: float, other: float, sizes: tuple[int, int]) -> None:
    rng = np.random.default_rng(1)
    held = 0
    for first, second in zip(rng.binomial(sizes[0], share, 500), rng.binomial(sizes[1], other, 500), strict=True):
        a, b = (side(k / n, *wilson(k / n, n)) for k, n in zip((first, second), sizes, strict=True))
        found = unpaired_interval(a, b)
        assert found is not None
        held += found.low <= other - share <= found.high
    assert held >= 0.93 * 500


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("psnr", {"low": 0.1, "high": 2.0, "p_value": 0.001, "adjusted": 0.01}, "C better"),
        ("fid", {"low": 0.1, "high": 2.0}, "A better"),
        ("bit_usage", {"low": 0.1, "high": 2.0}, "C higher"),
        ("psnr", {"low": 0.1, "high": 2.0, "p_value": 0.03, "adjusted": 0.2}, "C better before Holm"),
        ("psnr", {"low": 0.1, "high": 2.0, "p_value": 0.2, "adjusted": 0.2}, "not significant"),
        ("psnr", {"low": -0.1, "high": 2.0, "p_value": 0.04}, "within the interval"),
        ("psnr", {"p_value": 1.0}, "no interval"),
        ("psnr", {"difference": 0.0, "low": 0.0, "high": 0.0, "p_value": 1.0}, "equal"),
        ("psnr", {"difference": None}, "not measured"),
    ],
)
def test_verdicts(name: str, changes: dict[str, Any], said: str) -> None:
    assert verdict(Row(**{"name": name, "a": {}, "b": {}, "difference": 1.0, **changes}), ("A", "C")) == said
