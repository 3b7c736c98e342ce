"""The report: every number, nothing from outside, text that stays text, and no stand-in beside a published number."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from html import unescape
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from instella_ray import storage
from instella_ray.data.formats.shards import write_tar
from instella_ray.data.prompts import Prompt, read_prompts
from instella_ray.data.scenes import scene_rows
from instella_ray.evaluation.citation import add_citations
from instella_ray.evaluation.evaluate import EvaluateConfig, run_evaluate
from instella_ray.evaluation.metrics.presets import PRESETS, PROTOCOLS, TABLE3, UNSTATED
from instella_ray.evaluation.report import best, metric_rows, write_report
from instella_ray.evaluation.select import ShowConfig
from instella_ray.evaluation.statistics import JACKKNIFE
from instella_ray.models.checkpoint import weight_hash
from instella_ray.models.sampling import SamplingConfig
from instella_ray.rendering import digits, svg_curves, table, thumbnail

from ..kit.evaluation import ABOUT, CARD, FID
from ..kit.models import write_tokenizer
from ..kit.sample_sets import noise, write_samples, write_sweep

PROMPTS = read_prompts("scenes", count=12)
SWEEP = {
    f"guidance-{g}-{sampler}": SamplingConfig(guidance_scale=g, sampler=sampler)  # type: ignore[arg-type]
    for g in (1.5, 3.0, 6.0)
    for sampler in ("posterior", "simplified")
}


def figures(results: Any) -> Iterator[float]:
    """Every value, end of an interval, count and score."""
    for setting in results["settings"]:
        yield setting["measured"]
        for result in setting["metrics"].values():
            for row in (result, *result["parts"]):
                yield from (row[key] for key in ("value", "low", "high", "count") if row[key] is not None)
        for side in ("best", "worst"):
            yield from (s["score"] for column in setting["shown"][side].values() for s in column)


def report(output: Path, **more: Any) -> tuple[str, Any]:
    run_evaluate(EvaluateConfig(output=str(output), local=True, **more))
    return (output / "report.html").read_text(), storage.read_json(str(output / "results.json"))


def test_a_sweeps_report_holds_every_number_and_nothing_from_outside(tmp_path: Path) -> None:
    tokenizer = write_tokenizer(tmp_path / "bit")
    sweep = write_sweep(tmp_path / "s", SWEEP, PROMPTS, tokenizer=tokenizer, codes=lambda n: noise(12, 2, n))
    page, results = report(tmp_path / "o", samples=sweep, tokenizer=tokenizer, preset="paper-table3")
    text = set(re.findall(r"-?\d[\d.,]*(?:e-?\d+)?", re.sub(r"data:image/[^\"]*", "", page)))
    assert {digits(x, significant=4) for x in figures(results)} - text == set()
    assert len(results["settings"]) == 6 and all(name in page for name in SWEEP)
    assert re.search(r"https?://|<link|@import|url\(", page) is None and page.count("<script") == 1
    assert set(re.findall(r'(?:src|href)="([^#].{9})', page)) == {"data:image"}
    # A chart a metric over guidance, with a line a sampler; the published numbers stay away, as none was measured.
    assert page.count("<svg viewBox") == 3 and page.count("<polyline") == 6 and page.count("sampler posterior") >= 3
    assert "Published, but not measured here: fid." in " ".join(page.split()) and "16.33" not in page
    assert "guidance 1.5, the paper&#39;s 4.0" in page and "images of 32 px, the paper&#39;s 1024" in page
    assert all(note in unescape(page) for note in TABLE3.notes)


def test_text_stays_text(tmp_path: Path) -> None:
    nasty = [
        "<script>alert(1)</script>",
        '"><img src=http://evil.example/x.png>',
        "{{ 7919 * 7907 }} {% raw %}",
        "&lt;b&gt; '\"",
    ]
    prompts = [Prompt(f"<i>{i}</i>", text, category=f"<u>{i}</u>") for i, text in enumerate(nasty)]
    tokenizer = write_tokenizer(tmp_path / "bit")
    samples = write_samples(tmp_path / "s", prompts, noise(4, 2), tokenizer, model="<b>model</b>")
    page, _ = report(tmp_path / "o", samples=samples, tokenizer=tokenizer)
    assert page.count("<script") == 1 and not re.search(r"<img src=http|<b>model|<i>|<u>", page)
    assert str(7919 * 7907) not in page  # evaluated
    captions = re.findall(r"<figcaption>(.*?)</figcaption>", page, re.S)
    assert {unescape(caption) for caption in captions} == set(nasty)


def test_reconstructions_stand_beside_their_originals_with_best_and_worst(tmp_path: Path) -> None:
    tokenizer = write_tokenizer(tmp_path / "bit")
    write_tar(str(tmp_path / "t" / "0.tar"), scene_rows(20, 1, 48))
    show = ShowConfig(prompts=6, extremes=3)
    given = {"images": str(tmp_path / "t"), "tokenizer": tokenizer, "preset": "paper-table2-coco", "show": show}
    page, results = report(tmp_path / "o", **given)
    (setting,) = results["settings"]
    assert len(setting["shown"]["grid"]) == 6
    assert page.count('alt="original"') == page.count("<figure") == 6 + 3 + 2 * 2 * 3  # no scene is right, 3 are wrong
    worst = setting["shown"]["worst"]
    assert [s["score"] for s in worst["psnr"]] == sorted(s["score"] for s in worst["psnr"])
    assert all(s["reason"] for s in worst["scene_score"]) and worst["scene_score"][0]["reason"] in page
    assert "images of 32 px, the paper&#39;s 512" in page and "21.59" not in page
    # As if they had been of the paper's size.
    results["card"]["size"] = 512
    storage.write_json(str(tmp_path / "o" / "results.json"), results)
    row = re.search(r"<td>psnr</td>.*?</tr>", Path(write_report(str(tmp_path / "o"))).read_text(), re.S)
    assert row and "≥ 21.59" in row[0] and "✗ missed" in row[0]  # of an untrained tokenizer


def test_a_sweep_of_many_settings_shows_no_more_images_than_asked_for(tmp_path: Path) -> None:
    tokenizer = write_tokenizer(tmp_path / "bit")
    sweep = write_sweep(tmp_path / "s", SWEEP, PROMPTS, tokenizer=tokenizer, codes=lambda n: noise(12, 2, n))
    page, _ = report(tmp_path / "o", samples=sweep, tokenizer=tokenizer, show=ShowConfig(most=60))
    assert 0 < page.count("<figure") <= 60


def rows_of(**changes: Any) -> dict[str, Any]:
    """Rows of Table 3 for the paper's protocol with changes, by dotted name with ``__``."""
    whole: dict[str, Any] = json.loads(json.dumps({"fid": FID, "about": ABOUT, "card": CARD}))
    for name, value in changes.items():
        *places, last = name.split("__")
        inner = whole
        for place in places:
            inner = inner[place]
        inner[last] = value
    setting = {"name": "", "about": whole["about"], "measured": 30_000, "metrics": {"fid": whole["fid"]}}
    return {row["name"]: row for row in metric_rows(setting, TABLE3, whole["card"])}


def test_a_published_number_stands_beside_its_own_protocol() -> None:
    row = rows_of()["fid"]
    assert row["published"].value == 16.33 and row["goal"].met and row["withheld"] == []


@pytest.mark.parametrize(
    ("name", "value", "why"),
    [
        ("card__size", 512, ""),
        ("card__measured_inputs", "reconstructions", ""),
        ("about__kind", "ar", ""),
        ("about__quantization", "fp8", ""),
        ("about__sampling__num_inference_steps", 50, ""),
        ("about__sampling__rho", 2.0, ""),
        ("about__images_per_prompt", 2, "fid over 15000 prompts x 2, the paper's 30000 x 1"),
        ("fid__weights_hash", "12" * 32, "weights of fid inception.pth, not the published file (sha256 6726825d...)"),
        ("fid__settings__images__size", None, "images.size of fid none, the paper's 256"),
        ("fid__settings__images__filter", "bicubic", "images.filter of fid bicubic, the paper's lanczos"),
        ("fid__settings__images__format", "jpeg", "images.format of fid jpeg, the paper's pixels"),
        ("fid__settings__network_input", "299 px, TF", "network_input of fid 299 px, TF, the paper's clean-fid"),
    ],
)
def test_a_published_number_stands_nowhere_else(name: str, value: Any, why: str) -> None:
    row = rows_of(**{name: value})["fid"]
    assert row["published"] is None and row["goal"] is None
    assert row["withheld"] == ([why] if why else [])


def test_a_stand_in_is_never_put_beside_a_published_number() -> None:
    rows = rows_of(fid__name="frechet_efficientnet_lite0")
    assert rows["frechet_efficientnet_lite0"]["published"] is None
    assert rows["fid"]["value"] is None and rows["fid"]["published"].value == 16.33


def test_every_published_metric_has_a_protocol() -> None:
    published = {entry.metric.partition("/")[0] for table in PRESETS.values() for entry in table.published}
    assert published == set(PROTOCOLS) | set(UNSTATED)


def test_a_line_cites_a_number_with_its_protocol() -> None:
    setting = {"name": "", "about": ABOUT, "measured": 30_000, "metrics": {"fid": dict(FID)}}
    add_citations([setting], CARD)
    assert setting["citations"]["fid"] == (
        "fid 12 [11, 13]: 30,000 samples, 20 steps simplified, guidance 4, temperature 0.6, seed 0, "
        "prompts val2014.json (sha256 01010101), model gen (sha256 efefefef) in bf16, text encoder OLMo, "
        "tokenizer bit (sha256 23232323), 1024 px; x, inception.pth (sha256 6726825d), "
        "256 px lanczos, no JPEG, network_input 299 px, clean-fid; "
        f"reference coco-val2014 (40,504 images, sha256 cdcdcdcd); interval: 95 %, {JACKKNIFE}; instella-ray 1.2, torch 2.9"
    )


def test_the_protocol_of_every_number_is_open_and_every_line_is_in_the_results(tmp_path: Path) -> None:
    tokenizer = write_tokenizer(tmp_path / "bit")
    write_tar(str(tmp_path / "t" / "0.tar"), scene_rows(4, 1, 32))
    metrics = {"psnr": {"images": {"format": "jpeg"}}, "lpips": {"net": "alex"}}
    page, results = report(tmp_path / "o", images=str(tmp_path / "t"), tokenizer=tokenizer, metrics=metrics)
    measured, lines = results["settings"][0]["metrics"], results["settings"][0]["citations"]
    shown = unescape(re.sub(r"<details.*?</details>", "", page, flags=re.S))
    assert lines.keys() == measured.keys() and all(f">{line}</code>" in shown for line in lines.values())
    for text in ("no resize, JPEG quality 95", weight_hash(tokenizer)[:8], measured["lpips"]["weights_hash"][:8]):
        assert text in shown and any(text in line for line in lines.values())
    assert f"4 reconstructions of {tmp_path}/t" in lines["psnr"]
    assert f"lpips {version('lpips')}" in shown and results["card"]["versions"]["torchvision"] == version("torchvision")


def test_the_best_setting_is_told_where_a_metric_has_a_better_end() -> None:
    def setting(name: str, **values: float) -> Any:
        return {"name": name, "metrics": {key: {"name": key, "value": value} for key, value in values.items()}}

    settings = [setting("a", fid=3.0, psnr=20.0, ssim=0.5, bit_usage=1.0), setting("b", fid=2.0, psnr=19.0, ssim=0.5)]
    assert best(settings) == {"fid": ["b"], "psnr": ["a"]}


def test_curves_stay_in_their_frame_and_name_their_lines() -> None:
    chart = svg_curves({"<a>": [(2.0, 1.0), (4.0, 3.0)], "b": [(3.0, 2.0)]}, spans={"b": [(3.0, 0.0, 5.0)]}, axis="<x>")
    assert "<a>" not in chart and "&lt;a&gt;" in chart and "&lt;x&gt; 4" in chart and "nan" not in chart
    places = [float(x) for pair in re.findall(r'points="([^"]*)"', chart) for x in re.split("[ ,]", pair)]
    assert min(places) >= 0 and max(places) <= 460
    assert "nothing was logged" in svg_curves({})


def test_tables_and_thumbnails() -> None:
    assert table([{"a": 1, "b": 0.123456}, {"a": 22}]).splitlines()[2] == "| 1  | 0.123 |"
    pixels = np.zeros((300, 200, 3), np.uint8)
    assert thumbnail(pixels, 256).startswith(b"\xff\xd8") and thumbnail(pixels, 64).startswith(b"\x89PNG")
