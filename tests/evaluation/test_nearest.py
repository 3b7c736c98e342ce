"""Each image's nearest training image: the one that brute force finds, with its distance beside those held out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from instella_ray.evaluation.evaluate import run_evaluate
from instella_ray.evaluation.inputs import EvaluateConfig
from instella_ray.evaluation.metric_settings import MetricsConfig
from instella_ray.evaluation.metrics import kernel
from instella_ray.evaluation.metrics.base import Batch, Info
from instella_ray.evaluation.metrics.feature_rows import FeatureSet
from instella_ray.evaluation.metrics.features import PIXELS, Features, small_pixels
from instella_ray.evaluation.metrics.memorisation import Memorisation
from instella_ray.evaluation.metrics.neighbours import nearest_rows
from instella_ray.evaluation.results import Evaluation

from ..kit.evaluation import numbers
from ..kit.labelled import write_labelled


@settings(max_examples=30)
@given(st.integers(0, 1000), st.integers(1, 12), st.integers(1, 12))
def test_nearest_rows_are_those_of_brute_force(seed: int, n: int, m: int) -> None:
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=(n, 4)), rng.normal(size=(m, 4))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel, "BLOCK", 2 * m)  # rows in several blocks
        rows, apart = nearest_rows(x, y)
    among = np.linalg.norm(x[:, None] - y, axis=2)
    np.testing.assert_array_equal(rows, among.argmin(1))
    np.testing.assert_allclose(apart, among.min(1), atol=1e-7)


def measured(rows: np.ndarray, training: np.ndarray, held_out: np.ndarray, distance: str) -> Memorisation:
    """The metric of given features."""
    sets = {"training": training, "held_out": held_out}
    references = {
        role: FeatureSet(part.astype(np.float32), ids=[f"{role}{i}" for i in range(len(part))])
        for role, part in sets.items()
    }
    about = {"images": {}, "distance": distance, **{role: found.describe() for role, found in references.items()}}
    features = Features("given", "test", None, None, lambda images: rows)
    metric = Memorisation(Info("memorisation_given", "test", settings=about), features).attach(**references)
    metric.update(Batch([f"i{i}" for i in range(len(rows))], images=np.zeros((len(rows), 1, 1, 3), np.uint8)))
    return metric


def test_cosine_distances_do_not_depend_on_the_length_of_features() -> None:
    training, held_out = np.array([[1.0, 0], [0, 1]]), np.array([[1.0, 1], [3, 1]])
    metric = measured(np.array([[0.0, 9], [5, 5], [2, 1]]), training, held_out, "cosine")
    first, second, third = metric.nearest()
    assert (first.id, first.training, third.id) == ("i0", "training1", "i1")
    assert first.distance == pytest.approx(0, abs=1e-7) and first.held_out_nearer == 0
    assert (second.id, second.training) == ("i2", "training0")
    assert second.distance == pytest.approx(1 - 2 / 5**0.5) and second.held_out_nearer == 0.5
    distances = metric.result().settings["distances"]
    assert distances["50 %"]["images"] == pytest.approx(second.distance)
    assert distances["0 %"]["held out"] == pytest.approx(1 - 3 / 10**0.5)
    assert measured(np.array([[0.0, 9]]), training, held_out, "euclidean").nearest()[0].distance == pytest.approx(8)


def test_distances_of_small_pixels_are_root_mean_square_errors() -> None:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (2, PIXELS, PIXELS, 3), np.uint8)
    a, b = small_pixels()(images)
    expected = np.sqrt(((images[0].astype(float) - images[1]) ** 2).mean())
    assert np.linalg.norm(a - b) == pytest.approx(expected, rel=1e-5)
    larger = np.stack(
        [np.asarray(Image.fromarray(image).resize((96, 96), Image.Resampling.NEAREST)) for image in images]
    )
    shrunk = small_pixels()(larger)
    assert np.linalg.norm(shrunk[0] - a) < expected / 2, "an enlarged image is shrunk to about what it was"


def test_the_report_shows_each_image_beside_its_nearest_training_image(tmp_path: Path) -> None:
    write_labelled(tmp_path / "train", 3)
    write_labelled(tmp_path / "held-out", 3, "held-out", seed=1)
    write_labelled(tmp_path / "made", 1, "made", concepts=("sea",), seed=2)
    (tmp_path / "made" / "1.tar").write_bytes((tmp_path / "train" / "00000.tar").read_bytes())  # copies
    test = {"images": {"size": 32}, "training": str(tmp_path / "train"), "held_out": str(tmp_path / "held-out")}
    metrics = MetricsConfig.model_validate({"memorisation_pixels": test})
    output = str(tmp_path / "out")
    given = {"images": str(tmp_path / "made"), "size": 32, "local": True, "metrics": metrics, "show": {"extremes": 30}}
    run_evaluate(EvaluateConfig(output=output, **given))
    found = numbers(output)[""]["memorisation_pixels"]
    assert found["name"] == "memorisation_pixels" and found["value"] > 0.8
    results = Evaluation(output)
    nearest = results.settings[""]["shown"]["nearest"]["memorisation_pixels"]
    assert [row["distance"] for row in nearest] == sorted(row["distance"] for row in nearest)
    copies = [row for row in nearest if row["id"].partition("/")[2] == row["training"].partition("/")[2]]
    assert len(copies) == 24 and all(row["distance"] < 1e-3 and row["held_out_nearer"] < 1 for row in copies)
    shown = results.training_images["memorisation_pixels"]
    assert {row["training"] for row in nearest} == set(shown) and all(row["image"] for row in shown.values())
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("% of those held out are nearer") >= len(nearest)
    assert "Distances to the nearest training image" in page
