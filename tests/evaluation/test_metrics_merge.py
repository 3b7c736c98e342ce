"""Shards in any number, split and order give what one pass gives; states hold no pickles; nothing counts twice."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from instella_ray import storage
from instella_ray.data.scenes import render, scene_at
from instella_ray.errors import UserError
from instella_ray.evaluation import statistics
from instella_ray.evaluation.metrics import diversity, fid, scene
from instella_ray.evaluation.metrics.base import Batch, Info, Metric
from instella_ray.evaluation.metrics.bits import BitUsage
from instella_ray.evaluation.metrics.feature_rows import FeatureRows, FeatureSet
from instella_ray.evaluation.metrics.features import Features
from instella_ray.evaluation.metrics.frechet import Frechet, Gaussian
from instella_ray.evaluation.metrics.images import ImageSettings
from instella_ray.evaluation.metrics.kernel import KernelDistance
from instella_ray.evaluation.metrics.labels import LabelScorer, label_accuracy
from instella_ray.evaluation.metrics.memorisation import Memorisation
from instella_ray.evaluation.metrics.neighbours import Coverage, Precision
from instella_ray.evaluation.metrics.psnr import psnr
from instella_ray.evaluation.metrics.ssim import ssim
from instella_ray.evaluation.metrics.states import load_state, save_state

N, SIZE, PER_PROMPT = 24, 16, 4
RNG = np.random.default_rng(0)
SCENES = [scene_at(3, i) for i in range(N)]
IMAGES = np.stack([render(s, SIZE) for s in SCENES])
ALL = Batch(
    ids=[f"p{i // PER_PROMPT}/{i % PER_PROMPT}" for i in range(N)],
    images=IMAGES,
    references=np.clip(IMAGES.astype(int) + RNG.integers(-20, 20, IMAGES.shape), 0, 255).astype(np.uint8),
    prompts=[s.caption for s in SCENES],
    codes=RNG.integers(0, 2, (N, 4, 8), np.uint8),
    groups=[f"p{i // PER_PROMPT}" for i in range(N)],
    meta=[{"hue": "red" if i % 3 else "blue", "split": f"s{i % 2}"} for i in range(N)],
)


def colors(images: np.ndarray) -> np.ndarray:
    """A small stand-in for a network: mean colour and spread, [B, 6]."""
    flat = images.reshape(len(images), -1, 3).astype(np.float32) / 255
    return np.concatenate((flat.mean(1), flat.std(1)), axis=1)


COLORS = Features("colors", "test", None, None, colors)
TARGET = Gaussian(np.full(6, 0.5), np.eye(6) * 0.02, 100)
RAW = ImageSettings()
SETS = {
    role: FeatureSet(np.random.default_rng(seed).random((20, 6)).astype(np.float32))
    for seed, role in enumerate(("reference", "training", "held_out"))
}


def set_metric(kind: type[FeatureRows], *roles: str, **own: Any) -> FeatureRows:
    """A metric of colours beside those of SETS."""
    settings = {"images": RAW.describe(), **own, **{role: SETS[role].describe() for role in roles}}
    metric = kind(Info(f"{kind.kind}_colors", "test", settings=settings), COLORS)
    return metric.attach(**{role: SETS[role] for role in roles})


HUES = LabelScorer({"hue": ("red", "blue")}, "hues", "ab" * 32, lambda images: {"hue": images.mean((1, 2))[:, ::2]})
METRICS: dict[str, Callable[[], Metric]] = {
    "psnr": psnr,
    "ssim": ssim,
    "scene": scene.scene_score,
    "bits": BitUsage,
    "fid": lambda: fid.frechet(COLORS, reference=TARGET, images=RAW, groups=3),
    "rfid": lambda: fid.frechet(COLORS, reconstruction=True, images=RAW, groups=3),
    "kid": lambda: set_metric(KernelDistance, "reference", kernel="cubic", unbiased=True, scale=1),
    "precision_recall": lambda: set_metric(Precision, "reference", neighbours=3),
    "density_coverage": lambda: set_metric(Coverage, "reference", neighbours=5),
    "memorisation": lambda: set_metric(Memorisation, "training", "held_out"),
    "memorisation_cosine": lambda: set_metric(Memorisation, "training", "held_out", distance="cosine"),
    "labels": lambda: label_accuracy(HUES, "hue", by="split"),
    "diversity_bits": lambda: diversity.code_diversity(per_prompt=PER_PROMPT),
    "diversity_bits_open": diversity.code_diversity,
    "diversity_features": lambda: diversity.feature_diversity(COLORS, images=RAW, per_prompt=PER_PROMPT),
}


def rows(batch: Batch, index: list[int]) -> Batch:
    arrays = {name: getattr(batch, name)[index] for name in ("images", "references", "codes")}
    assert batch.prompts is not None and batch.groups is not None and batch.meta is not None
    return Batch(
        [batch.ids[i] for i in index],
        prompts=[batch.prompts[i] for i in index],
        groups=[batch.groups[i] for i in index],
        meta=[batch.meta[i] for i in index],
        **arrays,
    )


def numbers(metric: Metric) -> list[float]:
    result = metric.result(seed=4)
    return [x for r in (result, *result.parts) for x in (r.value, r.low, r.high, r.count)]


def reattached(metric: Metric) -> Metric:
    if isinstance(metric, Frechet) and "reference" in metric.info.settings:
        metric.attach(TARGET)
    if isinstance(metric, FeatureRows):
        metric.attach(**{role: found for role, found in SETS.items() if role in metric.info.settings})
    return metric


@pytest.mark.parametrize("name", METRICS)
@settings(max_examples=25)
@given(st.data())
def test_merged_shards_equal_one_pass(name: str, data: st.DataObject) -> None:
    make = METRICS[name]
    order = data.draw(st.permutations(range(N)))
    cuts = sorted(data.draw(st.lists(st.integers(0, N), max_size=5)))
    shards = [list(order[a:b]) for a, b in zip([0, *cuts], [*cuts, N], strict=True)]
    kind = type(make())
    merged: Metric | None = None
    for shard in shards:
        metric = make()
        if shard:
            half = len(shard) // 2
            for index in (shard[:half], shard[half:]):
                if index:
                    metric.update(rows(ALL, index))
        stored = kind.from_state(metric.state())  # as another process would see it
        if merged is None:
            merged = stored
        else:
            merged.merge(stored)
    assert merged is not None
    whole = make()
    whole.update(ALL)
    np.testing.assert_allclose(numbers(reattached(merged)), numbers(whole), rtol=1e-9, atol=1e-12)
    if name not in ("fid", "rfid"):  # whose bias and standard error agree to rounding only
        assert merged.result().settings == whole.result().settings


@pytest.mark.parametrize("name", METRICS)
def test_states_are_stored_without_pickles_and_read_back(name: str, tmp_path: Path) -> None:
    metric = METRICS[name]()
    metric.update(ALL)
    path = str(tmp_path / "shard.npz")
    save_state(path, metric)
    with np.load(path, allow_pickle=False) as archive:
        assert all(archive[key].dtype != object for key in archive.files)
    loaded = load_state(path)
    assert type(loaded) is type(metric) and loaded.info == metric.info
    assert numbers(reattached(loaded)) == pytest.approx(numbers(metric), nan_ok=True)
    with pytest.raises(UserError, match=r"counted twice|more than"):
        loaded.merge(metric)


@pytest.mark.parametrize("name", METRICS)
def test_an_empty_shard_changes_nothing(name: str) -> None:
    metric = METRICS[name]()
    metric.update(ALL)
    before = numbers(metric)
    metric.merge(type(metric).from_state(METRICS[name]().state()))
    assert numbers(metric) == pytest.approx(before, nan_ok=True)
    assert METRICS[name]().result().count == 0


@pytest.mark.parametrize("name", METRICS)
def test_results_name_what_they_were_made_with(name: str) -> None:
    metric = METRICS[name]()
    metric.update(ALL)
    result = metric.result()
    assert result.implementation and "interval" in result.settings and result.settings["confidence"] == 0.95
    if "code" not in str(result.settings) and name != "bits":
        assert result.settings["images"]["format"] == "pixels" and "filter" in result.settings["images"]
    assert json.loads(json.dumps(result.to_json()))["value"] == result.value
    assert not result.low > result.value and not result.high < result.value


def refuse(text: str) -> None:
    raise ValueError(f"{text} is no JSON")


DEGENERATE = {
    "none": [],
    "one": [0],
    "two": [0, 1],
    "one group": [0, 1, 2, 3],
    "all the same": [0] * 8,
    "the same in groups": [0, 0, 0, 0, 5, 5, 5, 5],
}


@pytest.mark.parametrize("name", METRICS)
@pytest.mark.parametrize("case", DEGENERATE)
def test_results_of_little_or_equal_data_are_json_without_false_intervals(name: str, case: str, tmp_path: Path) -> None:
    """No NaN, of which jq and JavaScript refuse the whole file, and no interval of zero width."""
    index, metric = DEGENERATE[case], METRICS[name]()
    if index:
        batch = rows(ALL, index)
        groups = [f"p{i}" for i in range(len(index))] if case == "all the same" else batch.groups
        metric.update(replace(batch, ids=[f"{case}{i}" for i in range(len(index))], groups=groups))
    result = metric.result()
    storage.write_json(str(tmp_path / "results.json"), result.to_json())
    stored = json.loads((tmp_path / "results.json").read_text(), parse_constant=refuse)
    assert stored == json.loads(json.dumps(result.to_json()), parse_constant=refuse)
    for each in (stored, *stored["parts"]):
        assert (each["low"] is None) == (each["high"] is None)
        assert each["low"] is None or each["low"] < each["high"]
    if case != "the same in groups":  # two groups at most: rates alone can tell anything of others
        assert stored["low"] is None or stored["settings"]["interval"] == statistics.WILSON


def test_folding_features_into_sums_changes_nothing() -> None:
    """Groups with more samples than dimensions keep sums only: memory is bounded."""
    rng = np.random.default_rng(1)
    few, many = (fid.frechet(COLORS, images=RAW, groups=2) for _ in range(2))
    images = rng.integers(0, 255, (60, 4, 4, 3), np.uint8)
    many.update(Batch([f"a{i}" for i in range(60)], images=images))
    for i in range(60):
        few.update(Batch([f"a{i}"], images=images[i : i + 1]))
    state = many.state()
    assert len(state["samples_rows"]) == 0 and state["samples_folded_outers"].shape == (2, 21)
    np.testing.assert_allclose(few.gaussian().covariance, np.cov(colors(images), rowvar=False), rtol=1e-6)
    np.testing.assert_allclose(many.gaussian().covariance, few.gaussian().covariance, rtol=1e-9)


def test_what_was_measured_otherwise_does_not_merge() -> None:
    with pytest.raises(UserError, match="settings"):
        psnr().merge(psnr(ImageSettings(size=8)))
    with pytest.raises(UserError, match="name"):
        psnr().merge(ssim())
    with pytest.raises(UserError, match="measured against"):
        fid.frechet(COLORS, reference=TARGET).attach(Gaussian(np.zeros(6), np.eye(6), 7))


def test_a_metric_from_a_state_has_no_network() -> None:
    for name in ("psnr", "scene", "fid", "diversity_features"):
        metric = METRICS[name]()
        with pytest.raises(RuntimeError, match="made from a state"):
            type(metric).from_state(metric.state()).update(ALL)


def test_files_that_are_no_states_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.npz").write_bytes(b"nonsense")
    np.savez(tmp_path / "b.npz", kind=np.array("other"))
    np.savez(tmp_path / "c.npz", kind=np.array([{"a": 1}], dtype=object))
    for name in "abc":
        with pytest.raises(UserError, match=f"{name}.npz: not the state"):
            load_state(str(tmp_path / f"{name}.npz"))


def test_missing_columns_and_bad_scores_are_named() -> None:
    with pytest.raises(UserError, match="needs 'references'"):
        psnr().update(Batch(["a"], images=IMAGES[:1]))
    with pytest.raises(UserError, match="2 images for 1 samples"):
        psnr().update(Batch(["a"], images=IMAGES[:2], references=IMAGES[:2]))
    with pytest.raises(UserError, match="a counted twice"):
        psnr().update(Batch(["a", "a"], images=IMAGES[:2], references=IMAGES[:2]))
    with pytest.raises(UserError, match="uint8"):
        psnr().update(Batch(["a"], images=IMAGES[:1] / 255.0, references=IMAGES[:1]))
    with pytest.raises(UserError, match="more than 4 images"):
        metric = METRICS["diversity_bits"]()
        metric.update(ALL)
        metric.update(Batch(["p0/9"], codes=ALL.codes[:1], groups=["p0"]))  # type: ignore[index]
