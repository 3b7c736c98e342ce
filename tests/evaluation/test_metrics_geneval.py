"""The GenEval adapter keeps the official rules, on detections made by hand."""

from __future__ import annotations

from typing import Any

import pytest

from instella_ray.errors import UserError
from instella_ray.evaluation.geneval_actor import PACKAGES, GenEvalConfig, detection, runtime_env
from instella_ray.evaluation.metrics.base import Batch
from instella_ray.evaluation.metrics.geneval import DetectorInfo, colored_classes, geneval
from instella_ray.evaluation.metrics.geneval_rules import Detection, Rules, evaluate, overlap, relations, select
from instella_ray.evaluation.metrics.geneval_worker import CLASSES
from instella_ray.evaluation.metrics.rates import RateMetric

SWIN = ("mask2former_swin_s", "mmdet 2.27.0", "swin.pth")
COLORS = {"color_classifier": "open_clip ViT-L-14 openai, crop on #999"}
OFFICIAL = DetectorInfo(*SWIN, "c9d0c4f2" + "0" * 56, COLORS)


def seen(
    label: str, score: float = 0.95, box: tuple[float, ...] = (10, 10, 50, 50), color: str | None = None
) -> Detection:
    return Detection(label, score, box, color)  # type: ignore[arg-type]


def task(tag: str, *include: dict[str, Any], exclude: tuple[dict[str, Any], ...] = ()) -> dict[str, Any]:
    return {"tag": tag, "include": list(include), "exclude": list(exclude)}


def clause(label: str, count: int = 1, **more: Any) -> dict[str, Any]:
    return {"class": label, "count": count, **more}


# --- thresholds


@pytest.mark.parametrize(("score", "correct"), [(0.3, False), (0.301, True), (0.95, True)])
def test_an_object_counts_above_a_confidence_of_0_3(score: float, correct: bool) -> None:
    assert evaluate([seen("dog", score)], task("single_object", clause("dog")))[0] is correct


@pytest.mark.parametrize(("score", "correct"), [(0.5, False), (0.9, False), (0.901, True)])
def test_in_counting_above_0_9(score: float, correct: bool) -> None:
    images = [seen("dog", 0.99), seen("dog", score)]
    assert evaluate(images, task("counting", clause("dog", 2), exclude=(clause("dog", 3),)))[0] is correct


def test_at_most_16_objects_of_a_class_by_confidence() -> None:
    found = select([seen("dog", 0.4 + i / 100) for i in range(20)], "single_object")["dog"]
    assert [round(d.score, 2) for d in found] == [round(0.59 - i / 100, 2) for i in range(16)]


def test_overlapping_objects_stay_unless_asked_for() -> None:
    two = [seen("dog", 0.9), seen("dog", 0.8, (11, 10, 50, 50))]
    assert len(select(two, "two_object")["dog"]) == 2
    assert len(select(two, "two_object", Rules(max_overlap=0.9))["dog"]) == 1
    assert overlap((0, 0, 9, 9), (0, 0, 9, 9)) == 1 and overlap((0, 0, 9, 9), (0, 0, 9, 4)) == 0.5
    assert overlap((0, 0, 1, 1), (5, 5, 6, 6)) == 0


# --- counts


@pytest.mark.parametrize(("number", "correct"), [(2, False), (3, True), (4, False)])
def test_counting_is_exact(number: int, correct: bool) -> None:
    meta = task("counting", clause("dog", 3), exclude=(clause("dog", 4),))
    got, why = evaluate([seen("dog", box=(i, 0, i + 1, 1)) for i in range(number)], meta)
    assert got is correct
    assert why == {2: "expected dog>=3, found 2", 3: "", 4: "expected dog<4, found 4"}[number]


def test_elsewhere_more_than_asked_for_is_right() -> None:
    assert evaluate([seen("dog")] * 3 + [seen("cat")], task("two_object", clause("dog"), clause("cat")))[0]


def test_two_objects_must_both_be_there() -> None:
    meta = task("two_object", clause("dog"), clause("cat"))
    assert evaluate([seen("dog")], meta) == (False, "expected cat>=1, found 0")
    assert evaluate([], meta) == (False, "expected dog>=1, found 0; expected cat>=1, found 0")


# --- colours


def test_the_most_confident_object_decides_the_colour() -> None:
    meta = task("colors", clause("car", color="red"))
    right, wrong = seen("car", 0.9, color="red"), seen("car", 0.8, color="blue")
    assert evaluate([wrong, right], meta)[0]
    assert evaluate([right, seen("car", 0.95, color="blue")], meta) == (False, "expected red car>=1, found 0 (blue)")


def test_every_counted_object_has_the_colour() -> None:
    meta = task("colors", clause("car", 2, color="red"))
    cars = [seen("car", 0.9 - i / 10, color=c) for i, c in enumerate(("red", "blue", "red"))]
    assert not evaluate(cars, meta)[0]
    assert evaluate([cars[0], cars[2], cars[1]], meta)[0] is False  # order of confidence, not of the list
    assert evaluate([cars[0], cars[2]], meta)[0]


def test_colour_attribution_binds_each_colour_to_its_object() -> None:
    meta = task("color_attr", clause("car", color="red"), clause("dog", color="black"))
    assert evaluate([seen("car", color="red"), seen("dog", color="black")], meta)[0]
    assert not evaluate([seen("car", color="black"), seen("dog", color="red")], meta)[0]
    assert colored_classes(meta) == ["car", "dog"] and colored_classes(task("counting", clause("dog"))) == []


# --- positions


def box_at(x: float, y: float, size: float = 20) -> tuple[float, float, float, float]:
    return (x - size / 2, y - size / 2, x + size / 2, y + size / 2)


@pytest.mark.parametrize(
    ("x", "y", "expected"),
    [
        (0, 50, {"left of"}),
        (100, 50, {"right of"}),
        (50, 0, {"above"}),
        (50, 100, {"below"}),
        (0, 0, {"left of", "above"}),
        (50, 50, set()),
        (53.9, 50, set()),  # the margin: 0.1 x (20 + 20) = 4 pixels
        (57, 50, set()),  # 3 of 7 pixels are left, under a half
        (59, 50, {"right of"}),  # 5 of 9 pixels are left
        (100, 60, {"right of"}),  # 6 of 51 pixels down is not below
    ],
)
def test_relations_have_the_official_margin(x: float, y: float, expected: set[str]) -> None:
    assert relations(seen("a", box=box_at(x, y)), seen("b", box=box_at(50, 50))) == expected


def test_position_is_judged_against_the_clause_it_names() -> None:
    meta = task("position", clause("dog"), clause("cat", position=("left of", 0)))
    dog, left, right = seen("dog", box=box_at(50, 50)), seen("cat", box=box_at(0, 50)), seen("cat", box=box_at(99, 50))
    assert evaluate([dog, left], meta)[0]
    assert evaluate([dog, right], meta) == (False, "expected cat left of target, found right of")
    assert evaluate([left], meta) == (False, "expected dog>=1, found 0; no target for cat to be left of")
    assert evaluate([dog], meta) == (False, "expected cat>=1, found 0")


def test_position_is_judged_on_the_most_confident_pair() -> None:
    meta = task("position", clause("dog"), clause("cat", position=("left of", 0)))
    dog = seen("dog", box=box_at(50, 50))
    cats = [seen("cat", 0.9, box_at(99, 50)), seen("cat", 0.8, box_at(0, 50))]
    assert not evaluate([dog, *cats], meta)[0]


# --- the metric


def measured(detector: DetectorInfo, rules: Rules | None = None) -> RateMetric:
    metric = geneval(detector, rules) if rules else geneval(detector)
    meta = [task("single_object", clause("dog"))] * 4 + [task("two_object", clause("dog"), clause("cat"))] * 4
    found = [[seen("dog")]] * 3 + [[]] + [[seen("dog"), seen("cat")]] + [[seen("dog")]] * 3
    ids = [f"{i // 4}/{i % 4}" for i in range(8)]
    metric.update(Batch(ids, meta=meta, detections=found, groups=[i[0] for i in ids]))
    return metric


def test_the_score_is_the_mean_over_tasks() -> None:
    metric = measured(OFFICIAL)
    result = metric.result()
    assert result.name == "geneval" and result.count == 8 and result.value == pytest.approx(0.5)
    assert {p.name: p.value for p in result.parts} == {"geneval/single_object": 0.75, "geneval/two_object": 0.25}
    assert result.settings["groups"] == 2 and result.settings["groups_with_a_correct_image"] == 2
    assert result.settings["rules"] == {
        "threshold": 0.3,
        "counting_threshold": 0.9,
        "max_objects": 16,
        "max_overlap": 1.0,
        "position_margin": 0.1,
    }
    assert metric.verdicts()["0/3"].reason == "expected dog>=1, found 0"


def test_only_the_official_detector_and_rules_give_geneval() -> None:
    assert measured(DetectorInfo("centernet", "human-models")).result().name == "geneval_rules_centernet"
    unverified = "geneval_rules_mask2former_swin_s_unverified"
    assert measured(DetectorInfo(*SWIN, "ab" * 32, COLORS)).result().name == unverified
    other_colors = {"color_classifier": "open_clip ViT-L-14 file openai (sha256 ab), crop on #999"}
    result = measured(DetectorInfo(*SWIN, OFFICIAL.weights_hash, other_colors)).result()
    assert result.name == unverified and {part.name.partition("/")[0] for part in result.parts} == {unverified}
    assert measured(OFFICIAL, Rules(threshold=0.5)).result().name != "geneval"


def test_foreign_metadata_and_a_missing_detector_are_named() -> None:
    metric = geneval(OFFICIAL)
    with pytest.raises(UserError, match="tag 'other'"):
        metric.update(Batch(["a"], meta=[{"tag": "other"}], detections=[[]]))
    with pytest.raises(UserError, match="no detections"):
        metric.update(Batch(["a"], meta=[task("counting", clause("dog"))]))


def test_classes_are_the_official_prompts() -> None:
    assert len(CLASSES) == len(set(CLASSES)) == 80
    assert CLASSES[0] == "person" and CLASSES[64:67] == ("computer mouse", "tv remote", "computer keyboard")


# --- the official detector's environment


def test_ray_accepts_the_environment() -> None:
    from ray.runtime_env import RuntimeEnv

    wheel = "mmcv_full-1.7.2-cp311-cp311-linux_x86_64.whl"
    cfg = GenEvalConfig(weights="w.pth", mmcv_wheel=f"/wheels/{wheel}")
    found = RuntimeEnv(**runtime_env(cfg))
    assert found["uv"]["packages"] == [f"mmcv-full @ file:///wheels/{wheel}", *PACKAGES]
    assert RuntimeEnv(**runtime_env(GenEvalConfig(weights="w", conda="geneval")))["conda"] == "geneval"
    assert runtime_env(GenEvalConfig(weights="w", image_uri="geneval:1")) == {"image_uri": "geneval:1"}


@pytest.mark.parametrize("given", [{}, {"conda": "a", "image_uri": "b"}])
def test_one_environment_is_asked_for(given: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="one of mmcv_wheel"):
        GenEvalConfig(weights="w", **given)  # type: ignore[arg-type]


def test_plain_data_become_detections() -> None:
    data = {"label": "dog", "score": 0.5, "box": [1.0, 2.0, 3.0, 4.0], "color": "red"}
    assert detection(data) == Detection("dog", 0.5, (1.0, 2.0, 3.0, 4.0), "red")
