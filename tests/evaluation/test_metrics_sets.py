"""Metrics that compare sets of features: right values, their limits, what they refuse, and what they gather once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from instella_ray.data.formats.shards import write_tar
from instella_ray.data.scenes import scene_rows
from instella_ray.errors import UserError
from instella_ray.evaluation import feature_settings
from instella_ray.evaluation.evaluate import EvaluateConfig, run_evaluate
from instella_ray.evaluation.metric_settings import MetricsConfig
from instella_ray.evaluation.metrics.base import Batch, Info
from instella_ray.evaluation.metrics.feature_rows import FeatureRows, FeatureSet
from instella_ray.evaluation.metrics.features import Features
from instella_ray.evaluation.metrics.kernel import KernelDistance
from instella_ray.evaluation.metrics.memorisation import Memorisation
from instella_ray.evaluation.metrics.neighbours import Coverage, Precision

from ..kit.evaluation import numbers

KID = {"kernel": "cubic", "unbiased": True, "scale": 1}
CMMD = {"kernel": "gaussian, sigma 10", "unbiased": False, "scale": 1000}


def measured(kind: type[FeatureRows], rows: np.ndarray, own: dict[str, Any], **references: np.ndarray) -> Any:
    """The result of images whose features are ``rows``; every image of its own prompt."""
    sets = {role: FeatureSet(found.astype(np.float32)) for role, found in references.items()}
    described = {role: found.describe() for role, found in sets.items()}
    features = Features("given", "test", None, None, lambda images: rows)
    metric = kind(Info("precision_given", "test", settings={**own, **described}), features)
    metric.update(Batch([f"{i}" for i in range(len(rows))], images=np.zeros((len(rows), 4, 4, 3), np.uint8)))
    return kind.from_state(metric.state()).attach(**sets).result()


def two_sets(seed: int, n: int, m: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    x, y = rng.normal(0.3, 1.2, (n, width)), rng.normal(0, 1, (m, width))
    return x.astype(np.float32).astype(np.float64), y.astype(np.float32).astype(np.float64)


@settings(max_examples=15)
@given(st.integers(0, 1000), st.integers(2, 30), st.integers(1, 16))
def test_kid_is_torch_fidelitys_and_clean_fids_of_all_images(seed: int, count: int, width: int) -> None:
    from torch_fidelity.metric_kid import kid_features_to_metric

    x, y = two_sets(seed, count, count, width)
    theirs = kid_features_to_metric(
        torch.from_numpy(x), torch.from_numpy(y), kid_subsets=1, kid_subset_size=count, verbose=False
    )
    ours = measured(KernelDistance, x, KID, reference=y).value
    assert ours == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-6, abs=1e-9)
    clean = pytest.importorskip("cleanfid.fid", reason="clean-fid is not installed: pip install clean-fid")
    assert ours == pytest.approx(clean.kernel_distance(x, y, num_subsets=1), rel=1e-6, abs=1e-9)


def test_cmmd_is_its_authors_formula() -> None:
    x, y = two_sets(1, 9, 14, 6)

    def mean(a: np.ndarray, b: np.ndarray) -> float:
        return float(np.mean([[np.exp(-((p - q) ** 2).sum() / 200) for q in b] for p in a]))

    expected = 1000 * (mean(x, x) + mean(y, y) - 2 * mean(x, y))
    assert measured(KernelDistance, x, CMMD, reference=y).value == pytest.approx(expected)
    assert measured(KernelDistance, x, CMMD, reference=x).value == pytest.approx(0, abs=1e-9)


@settings(max_examples=15)
@given(st.integers(0, 1000), st.integers(4, 30), st.integers(4, 30), st.integers(1, 3))
def test_precision_and_recall_are_torch_fidelitys(seed: int, n: int, m: int, k: int) -> None:
    from torch_fidelity.metric_prc import prc_features_to_metric

    x, y = two_sets(seed, n, m, 3)
    theirs = prc_features_to_metric(
        torch.from_numpy(x),
        torch.from_numpy(y),
        prc_neighborhood=k,
        prc_batch_size=100,
        save_cpu_ram=False,
        verbose=False,
    )
    ours = measured(Precision, x, {"neighbours": k}, reference=y)
    recall, f_score = ours.parts
    assert (recall.name, f_score.name) == ("recall_given", "f_score_given")
    for result, name in ((ours, "precision"), (recall, "recall"), (f_score, "f_score")):
        assert result.value == pytest.approx(theirs[name], abs=1e-6)


@settings(max_examples=15)
@given(st.integers(0, 1000), st.integers(1, 20), st.integers(6, 20))
def test_density_and_coverage_are_their_authors_formulas(seed: int, n: int, m: int) -> None:
    x, y = two_sets(seed, n, m, 3)
    apart, among = (np.linalg.norm(y[:, None] - other, axis=2) for other in (x, y))
    reach = np.sort(among, axis=1)[:, 5]  # its own distance is the first
    ours = measured(Coverage, x, {"neighbours": 5}, reference=y)
    assert ours.value == pytest.approx((apart.min(1) < reach).mean())
    assert ours.parts[0].value == pytest.approx((apart < reach[:, None]).sum(0).mean() / 5)


def test_memorisation_of_copies_is_1_and_of_new_images_half() -> None:
    rng = np.random.default_rng(0)
    training, held_out, new = (rng.normal(size=(count, 8)) for count in (300, 200, 200))
    references = {"training": training, "held_out": held_out}
    copies = measured(Memorisation, training[:50] + 1e-3, {}, **references)
    assert copies.value == 1 and copies.parts[0].value == 1 and copies.low > 0.8
    fresh = measured(Memorisation, new, {}, **references)
    assert fresh.low < 0.5 < fresh.high and fresh.value == pytest.approx(0.5, abs=0.08)
    assert fresh.parts[0].value == pytest.approx(0.01, abs=0.03)
    mixed = measured(Memorisation, np.concatenate((new[:150], training[:50])), {}, **references)
    assert mixed.parts[0].value == pytest.approx(0.25, abs=0.04) and mixed.low > 0.5


def test_of_images_against_themselves_all_are_within() -> None:
    x, _ = two_sets(3, 40, 2, 5)
    both = measured(Precision, x, {"neighbours": 3}, reference=x)
    assert both.value == both.parts[0].value == both.parts[1].value == 1
    assert measured(Coverage, x, {"neighbours": 5}, reference=x).value == 1


def test_too_few_images_have_no_value_and_say_so() -> None:
    x, y = two_sets(0, 3, 10, 4)
    for kind, own, count in ((KernelDistance, KID, 1), (Precision, {"neighbours": 3}, 3)):
        result = measured(kind, x[:count], own, reference=y)
        assert np.isnan(result.value) and "too few images" in result.cautions[0]


# --- as metrics of an evaluation


def brightness(images: np.ndarray) -> np.ndarray:
    """A quick stand-in for a network: mean colour of the four quarters, ``[B, 12]``."""
    half = images.shape[1] // 2
    quarters = [images[:, a : a + half, b : b + half].mean((1, 2)) for a in (0, half) for b in (0, half)]
    return np.concatenate(quarters, axis=1) / 255


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of images of each pass through the network."""
    seen: list[int] = []

    def compute(images: np.ndarray) -> np.ndarray:
        seen.append(len(images))
        return brightness(images)

    def network(weights: str | None, *, device: str) -> Features:
        return Features("quarters", "test", None, None, compute)

    monkeypatch.setattr(feature_settings, "efficientnet_lite0", network)
    return seen


def test_metrics_over_the_same_features_share_one_pass(tmp_path: Path, calls: list[int]) -> None:
    for name, seed in (("a", 1), ("b", 2), ("c", 3)):
        write_tar(str(tmp_path / name / "0.tar"), scene_rows(24, seed, 32))
    common = {"network": "efficientnet_lite0", "images": {"size": 32}}
    against = {**common, "reference": str(tmp_path / "b")}
    named = dict.fromkeys(("fid", "kid", "precision_recall", "density_coverage"), against)
    test = {**common, "training": str(tmp_path / "b"), "held_out": str(tmp_path / "c")}
    metrics = MetricsConfig.model_validate({**named, "memorisation": test})
    output = tmp_path / "out"
    given = {"images": str(tmp_path / "a"), "size": 32, "local": True, "batch_size": 8, "metrics": metrics}
    run_evaluate(EvaluateConfig(output=str(output), **given))
    assert sum(calls) == 24 * 3  # images, reference and training images, held-out images
    found = numbers(output)[""]
    assert {result["name"] for result in found.values()} == {
        *("frechet_quarters", "kernel_quarters", "precision_quarters", "coverage_quarters", "memorisation_quarters")
    }
    for result in found.values():
        assert result["count"] == 24 and result["value"] is not None
    for name in ("fid", "kid", "precision_recall", "memorisation"):
        assert found[name]["low"] <= found[name]["value"] <= found[name]["high"]
    assert found["memorisation"]["settings"]["held_out"]["source"] == str(tmp_path / "c")
    assert found["kid"]["settings"]["reference"]["count"] == 24
    alone = MetricsConfig.model_validate({"fid": against})
    run_evaluate(EvaluateConfig(output=str(tmp_path / "alone"), **{**given, "metrics": alone}))
    assert numbers(tmp_path / "alone")[""]["fid"]["value"] == pytest.approx(found["fid"]["value"], abs=1e-9)


def test_sets_need_images_for_a_reference(tmp_path: Path) -> None:
    np.savez(tmp_path / "stats.npz", mu=np.zeros(1280), sigma=np.eye(1280))
    write_tar(str(tmp_path / "a" / "0.tar"), scene_rows(4, 1, 32))
    options = {"network": "efficientnet_lite0", "reference": str(tmp_path / "stats.npz")}
    given = {"images": str(tmp_path / "a"), "local": True, "metrics": MetricsConfig.model_validate({"kid": options})}
    with pytest.raises(UserError, match=r"metrics\.kid\.reference: .*stats\.npz: statistics; expected images"):
        run_evaluate(EvaluateConfig(output=str(tmp_path / "out"), **given))
    assert not (tmp_path / "out").exists()


def test_cmmd_names_its_network(tmp_path: Path, tiny_clip: tuple[str, str]) -> None:
    for name, seed in (("a", 1), ("b", 2)):
        write_tar(str(tmp_path / name / "0.tar"), scene_rows(6, seed, 32))
    model, weights = tiny_clip
    options = {"reference": str(tmp_path / "b"), "model": model, "weights": weights, "images": {"size": 48}}
    metrics = MetricsConfig.model_validate({"cmmd": options})
    given = {"images": str(tmp_path / "a"), "size": 32, "local": True, "metrics": metrics}
    run_evaluate(EvaluateConfig(output=str(tmp_path / "out"), **given))
    found = numbers(tmp_path / "out")[""]["cmmd"]
    assert found["name"] == "cmmd_tiny_test" and found["value"] > 0 and found["weights"] == "tiny-test, tiny.pt"
