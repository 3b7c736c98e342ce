"""Labels travel from prompts and from image files to the metric, which counts what a classifier finds by group."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from instella_ray.data.prompts import Prompt
from instella_ray.errors import UserError
from instella_ray.evaluation import metric_settings
from instella_ray.evaluation.evaluate import run_evaluate
from instella_ray.evaluation.inputs import EvaluateConfig
from instella_ray.evaluation.metric_settings import MetricsConfig
from instella_ray.evaluation.metrics.base import Batch, better
from instella_ray.evaluation.metrics.images import ImageSettings
from instella_ray.evaluation.metrics.labels import LabelScorer, label_accuracy
from instella_ray.evaluation.metrics.rates import RateMetric

from ..kit.evaluation import numbers
from ..kit.labelled import COLORS, write_labelled
from ..kit.models import make_tokenizer
from ..kit.sample_sets import noise, write_samples

CONCEPTS = tuple(COLORS)


def by_color(images: np.ndarray) -> dict[str, np.ndarray]:
    """Scores by the colour of the middle: what the images of the kit are labelled by."""
    middle = images[:, images.shape[1] // 2, images.shape[2] // 2].astype(float)
    apart = np.linalg.norm(middle[:, None] - np.array([COLORS[name] for name in CONCEPTS]), axis=2)
    return {"concept": -apart}


def scorer(compute: Any = by_color) -> LabelScorer:
    return LabelScorer({"concept": CONCEPTS}, "colours", "ab" * 32, compute)


def batch(*rows: tuple[str, str, str]) -> Batch:
    """Images of a colour that are to show a concept in a group."""
    images = np.stack([np.full((4, 4, 3), COLORS[color], np.uint8) for color, _, _ in rows])
    meta = [{"concept": concept, "split": split} for _, concept, split in rows]
    return Batch([f"{i}" for i in range(len(rows))], images=images, meta=meta)


def test_rates_are_told_by_group_with_what_was_found_instead() -> None:
    metric = label_accuracy(scorer(), "concept", by="split")
    metric.update(
        batch(("sea", "sea", "seen"), ("sun", "sea", "seen"), ("leaf", "leaf", "new"), ("sea", "leaf", "new"))
    )
    result = metric.result()
    assert (result.name, result.value, better(result.name)) == ("concept_accuracy", 0.5, "higher")
    assert {part.name: part.value for part in result.parts} == {
        "concept_accuracy/new": 0.5,
        "concept_accuracy/seen": 0.5,
    }
    assert all(part.low < 0.5 < part.high and part.count == 2 for part in result.parts)
    assert {name: v.reason for name, v in metric.verdicts().items()} == {
        **{"0": "", "1": "sun, not sea", "2": "", "3": "sea, not leaf"}
    }
    assert "not_counted" not in result.settings


def test_values_that_the_classifier_does_not_know_are_counted_apart() -> None:
    rows = (("sea", "sea", "seen"), ("sun", "rose", "seen"), ("sun", "rose", "new"), ("sea", "moon", "new"))
    metric = label_accuracy(scorer(), "concept", by="split")
    metric.update(batch(*rows))
    for found in (metric, RateMetric.from_state(metric.state())):
        result = found.result()
        assert (result.value, result.count, [part.name for part in result.parts]) == (1, 1, ["concept_accuracy/seen"])
        assert result.settings["not_counted"] == {"new": 2, "seen": 1} and result.settings["groups"] == 1
        assert set(found.scores()) == set(found.groups()) == set(found.verdicts()) == {"0"}


def test_an_accuracy_of_unknown_values_alone_is_not_a_number() -> None:
    metric = label_accuracy(scorer(), "concept")
    metric.update(batch(("sea", "rose", "new")))
    result = metric.result()
    assert result.to_json()["value"] is None and result.count == 0 and result.settings["not_counted"] == {"all": 1}


def test_states_of_verdicts_without_unknown_values_are_read() -> None:
    metric = label_accuracy(scorer(), "concept")
    metric.update(batch(("sea", "sea", "a"), ("sun", "sea", "a")))
    state = metric.state()
    restored = RateMetric.from_state({**state, "correct": state["correct"].astype(bool)})
    assert restored.verdicts() == metric.verdicts()


def test_the_label_may_be_among_the_likeliest() -> None:
    def compute(images: np.ndarray) -> Mapping[str, np.ndarray]:
        return {"concept": np.tile(np.array([4.0, 3.0, 2.0, 1.0]), (len(images), 1))}

    rows = [("sea", concept, "a") for concept in CONCEPTS]
    found = {}
    for top in (1, 2, 4):
        metric = label_accuracy(scorer(compute), "concept", top=top)
        metric.update(batch(*rows))
        found[metric.result().name] = metric.result().value
    assert found == {"concept_accuracy": 0.25, "concept_top2": 0.5, "concept_top4": 1.0}
    assert better("concept_top2/a") == "higher" and better("topology") is None


def test_what_lacks_a_label_is_named() -> None:
    with pytest.raises(UserError, match="classifier colours: no label 'mood', expected one of concept"):
        label_accuracy(scorer(), "mood")
    with pytest.raises(UserError, match="sample 0: no text 'source' in its metadata"):
        label_accuracy(scorer(), "concept", by="source").update(batch(("sea", "sea", "a")))


def test_a_batch_is_classified_once_for_all_metrics() -> None:
    calls: list[int] = []

    def compute(images: np.ndarray) -> Mapping[str, np.ndarray]:
        calls.append(len(images))
        return by_color(images)

    shared, rows = scorer(compute), batch(("sea", "sea", "a"), ("sun", "sun", "a"))
    for images in (ImageSettings(), ImageSettings(), ImageSettings(size=2)):
        label_accuracy(shared, "concept", images=images).update(rows)
    assert calls == [2, 2]


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Options of an evaluation by colours."""
    monkeypatch.setattr(metric_settings, "load_scorer", lambda folder, device: scorer())
    label = {"classifier": "colours", "label": "concept", "by": "split"}
    labels = {"concept_accuracy": label, "concept_top2": {**label, "top": 2}}
    return {"local": True, "metrics": MetricsConfig.model_validate({"labels": labels})}


def test_labels_of_image_files_are_read_with_them(tmp_path: Path, measured: dict[str, Any]) -> None:
    write_labelled(tmp_path / "a", 2, "held-out", size=32)
    run_evaluate(EvaluateConfig(images=str(tmp_path / "a"), output=str(tmp_path / "out"), size=32, **measured))
    found = numbers(tmp_path / "out")[""]
    assert found["concept_accuracy"]["value"] == found["concept_top2"]["value"] == 1
    assert found["concept_accuracy"]["parts"][0]["name"] == "concept_accuracy/held-out"
    assert found["concept_accuracy"]["count"] == 16


def test_labels_of_prompts_reach_the_metric_through_samples(tmp_path: Path, measured: dict[str, Any]) -> None:
    make_tokenizer(tmp_path / "bit")
    tokenizer = str(tmp_path / "bit")
    prompts = [
        Prompt(f"p{i}", f"a {name}", "seen", {"concept": name, "split": "seen" if i else "new"})
        for i, name in enumerate(CONCEPTS)
    ]
    samples = write_samples(tmp_path / "samples", prompts, noise(4, 2), tokenizer)
    run_evaluate(EvaluateConfig(samples=samples, tokenizer=tokenizer, output=str(tmp_path / "out"), **measured))
    found = numbers(tmp_path / "out")[""]["concept_accuracy"]
    assert {part["name"]: part["count"] for part in found["parts"]} == {
        **{"concept_accuracy/new": 2, "concept_accuracy/seen": 6}
    }
    report = (tmp_path / "out" / "report.html").read_text()
    assert "concept_accuracy" in report and "concept_top2" in report


def test_names_of_other_metrics_are_refused() -> None:
    with pytest.raises(ValueError, match=r"labels\.psnr: the name of another metric"):
        MetricsConfig.model_validate({"labels": {"psnr": {"classifier": "a", "label": "style"}}})
