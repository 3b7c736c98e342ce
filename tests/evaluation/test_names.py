"""A published metric's name is given to its published weights alone: in results, reports, comparisons and citations."""

from __future__ import annotations

import json
import re
import shutil
from functools import partial
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from instella_ray.data.formats.shards import write_tar
from instella_ray.data.scenes import scene_rows
from instella_ray.evaluation import feature_settings
from instella_ray.evaluation.compare import compare
from instella_ray.evaluation.evaluate import EvaluateConfig, run_evaluate
from instella_ray.evaluation.metric_settings import MetricsConfig
from instella_ray.evaluation.metrics import clip_score, features
from instella_ray.evaluation.metrics.base import Info, better
from instella_ray.evaluation.metrics.features import inception
from instella_ray.evaluation.metrics.fid import frechet
from instella_ray.evaluation.metrics.names import STANDARDS, Standard, earned_name, file_label
from instella_ray.evaluation.metrics.presets import TABLE3
from instella_ray.evaluation.report import curves, metric_rows, write_report
from instella_ray.evaluation.results import Evaluation
from instella_ray.models.clip import load_clip
from instella_ray.training.validation_report import write_report as write_validation_report

from ..kit.evaluation import ABOUT, CARD, FID, numbers, random_inception

OTHER = "12" * 32
"""Hash of no published file."""
PUBLISHED_NAME = re.compile(r"\br?fid\b|\bkid\b|\bprecision\b|\brecall\b", re.I)
ELSEWHERE = re.compile(r"or measure kid, which has none|clean-fid")
"""A caution that recommends a metric, and a package."""
LAYER = "64"
"""Early features, as these are as many as a test has images for."""


def published(standard: Standard) -> dict[str, Any]:
    """Weights, their hash and settings that a name stands for."""
    named = standard.releases[0] if standard.releases else "weights.pth"
    digest = standard.hashes[0].ljust(64, "0") if standard.hashes else OTHER
    return {"weights": named, "weights_hash": digest, "settings": dict(standard.settings)}


@pytest.mark.parametrize("name", STANDARDS)
def test_a_name_is_earned_by_its_published_weights_alone(name: str) -> None:
    right = published(STANDARDS[name])
    assert Info(name, "test", **right).name == name
    assert earned_name(f"{name}/part", **right) == f"{name}/part"
    wrong = [{**right, "weights": "weights.pth", "weights_hash": digest} for digest in (OTHER, None)]
    wrong += [{**right, "settings": {}}] if right["settings"] else []
    for made_with in wrong:
        found = Info(name, "test", **made_with).name
        assert found.endswith("_unverified") and found not in STANDARDS and better(found) == better(name)
        assert Info.from_json(json.dumps({"name": name, "implementation": "test", **made_with})).name == found
        assert earned_name(f"{name}/part", **made_with) == f"{found}/part"


def test_a_local_file_never_has_the_name_of_a_release(tmp_path: Path) -> None:
    assert file_label(str(tmp_path / "inception.pth")) == "inception.pth"
    for standard in STANDARDS.values():
        for release in standard.releases:
            assert file_label(str(tmp_path / release.rpartition(", ")[2])) not in release


def test_the_published_hash_gives_fid_and_any_other_does_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = random_inception(tmp_path / "weights-inception-2015-12-05-6726825d.pth")
    assert frechet(inception(weights)).info.name == "frechet_inception_unverified"
    monkeypatch.setattr(features, "file_sha256", lambda path: "6726825d".ljust(64, "0"))
    network = inception(weights)
    assert [frechet(network, reconstruction=reconstruction).info.name for reconstruction in (False, True)] == [
        "fid",
        "rfid",
    ]


def test_the_papers_clip_model_with_a_file_of_ones_own_is_no_clip_score(
    tiny_clip: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clip_score, "PAPER_MODEL", tiny_clip[0])
    clip = load_clip(*tiny_clip, asker="metric clip_score", extra="eval")
    assert clip_score.metric_name(clip) == "clip_score"
    assert clip_score.clip_score(clip).info.name == "clip_score_vit_bigg_14_unverified"


@pytest.fixture
def evaluated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An evaluation with FID's network, but random weights."""
    weights = random_inception(tmp_path / "random.pth")
    monkeypatch.setattr(feature_settings, "inception", partial(inception, layer=LAYER))
    for name, seed in (("a", 1), ("b", 2)):
        write_tar(str(tmp_path / name / "0.tar"), scene_rows(8, seed, 32))
    options = {"weights": weights, "reference": str(tmp_path / "b"), "images": {"size": 32}}
    metrics = MetricsConfig.model_validate(dict.fromkeys(("fid", "kid", "precision_recall"), options))
    output = tmp_path / "out"
    run_evaluate(EvaluateConfig(images=str(tmp_path / "a"), size=32, output=str(output), local=True, metrics=metrics))
    return output


def as_recorded_before(folder: Path) -> None:
    """Rewrite an evaluation as one of a time when any weights gave the names."""
    renamed = {"frechet_inception_unverified": "fid", "kernel_inception_unverified": "kid"}
    renamed["precision_inception_unverified"] = "precision"

    def rename(text: str) -> str:
        for name, before in renamed.items():
            text = text.replace(name, before)
        return text

    path = folder / "results.json"
    path.write_text(rename(path.read_text()))
    for file in folder.glob("states/single/*/*.npz"):
        with np.load(file) as archive:
            state = {name: archive[name] for name in archive.files}
        np.savez(file, **{**state, "info": np.array(rename(str(state["info"])))})


def shown(page: str) -> list[str]:
    """Published names in a page's text."""
    text = unescape(re.sub(r"<(style|script).*?</\1>|data:image/[^\"]*|<[^>]*>", " ", page, flags=re.S))
    return PUBLISHED_NAME.findall(ELSEWHERE.sub("", text))


def test_random_weights_never_show_a_published_name(evaluated: Path, tmp_path: Path) -> None:
    found = numbers(evaluated)[""]
    assert found["fid"]["name"] == "frechet_inception_unverified"
    assert found["kid"]["name"] == "kernel_inception_unverified"
    names = {row["name"] for result in found.values() for row in (result, *result["parts"])}
    assert not names & STANDARDS.keys() and len(names) == 5
    assert shown((evaluated / "report.html").read_text()) == []
    (setting,) = json.loads((evaluated / "results.json").read_text())["settings"]
    assert all(line.startswith(found[key]["name"]) for key, line in setting["citations"].items())

    # The same evaluation as it was recorded when any weights gave the name.
    recorded = json.loads(json.dumps(found))
    before = tmp_path / "before"
    shutil.copytree(evaluated, before)
    as_recorded_before(before)
    assert numbers(before)[""]["fid"]["name"] == "fid" and recorded == found
    read = Evaluation(str(before))
    assert read.settings[""]["metrics"] == found and read.settings[""]["citations"] == setting["citations"]
    assert read.metric("", "fid").info.name == "frechet_inception_unverified"
    write_report(str(before))
    assert shown((before / "report.html").read_text()) == []
    (comparison,) = compare(str(evaluated), str(before), output=str(tmp_path / "compare.html"))
    assert comparison.others[0].refused == {} and {row.name for row in comparison.others[0].rows} == names
    assert PUBLISHED_NAME.findall(ELSEWHERE.sub("", comparison.text().replace(str(tmp_path), ""))) == []
    page = (tmp_path / "compare.html").read_text()
    assert shown(page.replace(str(tmp_path), "")) == []


@pytest.mark.parametrize(("digits", "name"), [("6726825d", "fid"), ("12121212", "frechet_inception_unverified")])
def test_a_recorded_number_stands_beside_the_papers_by_the_hash_of_its_weights(
    tmp_path: Path, digits: str, name: str
) -> None:
    result = {**FID, "name": "fid", "weights_hash": digits.ljust(64, "0")}
    setting = {"name": "", "about": ABOUT, "measured": 30_000, "metrics": {"fid": result}, "units": [], "shown": {}}
    (tmp_path / "results.json").write_text(json.dumps({"card": CARD, "settings": [setting]}))
    (read,) = Evaluation(str(tmp_path)).settings.values()
    row = next(row for row in metric_rows(read, TABLE3, CARD) if row["value"] is not None)
    assert row["name"] == name and (row["published"] is not None) == (row["goal"] is not None) == (name == "fid")


def test_curves_and_tables_of_a_sweep_name_the_stand_in() -> None:
    def setting(guidance: float, value: float) -> dict[str, Any]:
        result = {"name": "frechet_inception_unverified", "value": value, "low": None, "high": None}
        return {"name": str(guidance), "about": {"sampling": {"guidance_scale": guidance}}, "metrics": {"fid": result}}

    ((title, _),) = curves([setting(1.0, 3.0), setting(2.0, 2.0)])
    assert title == "frechet_inception_unverified over guidance_scale"


def test_validated_checkpoints_are_reported_under_the_name_of_the_stand_in(tmp_path: Path) -> None:
    result = {"name": "frechet_inception_unverified", "value": 3.0, "low": 2.0, "high": 4.0}
    rows = [{"step": step, "metrics": {"fid": result}} for step in (1, 2)]
    write_validation_report(tmp_path, "run", rows, best=1, best_by="fid")
    page = (tmp_path / "report.html").read_text()
    assert shown(page) == [] and "best by frechet_inception_unverified" in page
