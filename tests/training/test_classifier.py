"""A classifier learns what is plain to see, states its accuracy, and is loaded only as it was written."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from instella_ray.data.formats.shards import write_tar
from instella_ray.data.loading.labelled import read_labelled
from instella_ray.errors import UserError
from instella_ray.evaluation.metrics.labels import rank
from instella_ray.models.checkpoint import CONFIG
from instella_ray.models.classifier import ClassifierConfig, load_classifier, new_classifier
from instella_ray.training.classifier import (
    OWN,
    ClassifierRunConfig,
    FeatureSums,
    accuracy_rows,
    augmented,
    run_classifier,
)

from ..kit.labelled import labelled_rows, write_labelled

LITE = "the extra 'eval' is not installed"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a classifier over random features, and the images that it was trained and measured on."""
    pytest.importorskip("efficientnet_lite_pytorch", reason=LITE)
    folder = tmp_path_factory.mktemp("classifier")
    write_labelled(folder / "train", 6, concepts=("cherry", "leaf", "sea"))
    write_labelled(folder / "new", 2, "new", seed=1)
    cfg = ClassifierRunConfig(
        data=str(folder / "train"),
        output=str(folder / "model"),
        accuracy_of={"new": str(folder / "new")},
        size=32,
        weights="random",
        views=1,
        held_out_share=0.2,
        threads=1,
    )
    run_classifier(cfg)
    return folder


def test_it_finds_what_is_plain_to_see_and_counts_unknown_values_apart(trained: Path) -> None:
    measured = load_classifier(trained / "model")[1]["accuracy"]
    assert set(measured) == {OWN, "new"}
    style, concept = measured["new"]["style"], measured["new"]["concept"]
    assert (style["count"], style["unknown"], concept["count"], concept["unknown"]) == (16, 0, 12, 4)
    assert style["top1"]["value"] > 0.8 and concept["top1"]["value"] > 0.6 and concept["top5"]["value"] == 1
    assert style["top1"]["low"] < style["top1"]["value"] <= style["top1"]["high"]
    rows = accuracy_rows({"new": {"concept": {"count": 0, "unknown": 4}}})
    assert rows == [{"images": "new", "label": "concept", "top 1": "–", "top 5": "–", "count": 0, "unknown": 4}]


def test_it_is_loaded_with_the_labels_and_data_that_it_was_written_with(trained: Path, tmp_path: Path) -> None:
    model, config = load_classifier(trained / "model")
    assert model.cfg.labels == {"style": ("framed", "plain"), "concept": ("cherry", "leaf", "sea")}
    assert config["data"]["sha256"] == read_labelled(str(trained / "train"), ("style", "concept"), 32).sha256
    for name in (CONFIG, "model.safetensors"):
        (tmp_path / name).write_bytes((trained / "model" / name).read_bytes())
    text = (tmp_path / CONFIG).read_text()
    (tmp_path / CONFIG).write_text(text.replace("- framed\n    - plain", "- plain\n    - framed"))
    with pytest.raises(UserError, match=r"config\.yaml is not the one that model\.safetensors was written with"):
        load_classifier(tmp_path)


def test_making_and_loading_it_draw_nothing_from_the_generator(trained: Path) -> None:
    before, cfg = torch.get_rng_state(), ClassifierConfig(labels={"style": ("a", "b")})
    new_classifier(cfg, "random", 1)
    load_classifier(trained / "model")
    assert torch.equal(torch.get_rng_state(), before)


def test_random_weights_are_those_of_the_seed() -> None:
    pytest.importorskip("efficientnet_lite_pytorch", reason=LITE)
    cfg = ClassifierConfig(labels={"style": ("a", "b")})
    one, same, other = (new_classifier(cfg, "random", seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(value, same[name]) for name, value in one.items())
    for name in ("trunk.network._conv_stem.weight", "heads.style.weight"):
        assert not torch.equal(one[name], other[name])


def test_a_finished_output_is_not_overwritten(trained: Path) -> None:
    with pytest.raises(UserError, match=r"model: exists; choose another folder"):
        run_classifier(ClassifierRunConfig(data=str(trained / "train"), output=str(trained / "model")))


def test_a_part_has_the_hash_of_its_own_rows(tmp_path: Path) -> None:
    images = read_labelled(write_labelled(tmp_path, 1), ("style",), 32)
    one, other = images.part(np.array([0])), images.part(np.array([1]))
    assert len({images.sha256, one.sha256, other.sha256}) == 3
    assert images.part(np.arange(len(images))).sha256 == images.sha256


def test_samples_without_a_label_are_named(tmp_path: Path) -> None:
    rows = [(key, image, text, meta if key[-1] == "0" else {}) for key, image, text, meta in labelled_rows(2)]
    write_tar(str(tmp_path / "a.tar"), rows)
    with pytest.raises(UserError, match=r"sample .*plain-cherry-1: no text 'style' in its metadata"):
        read_labelled(str(tmp_path), ("style", "concept"), 32)


def test_images_that_cannot_be_read_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = list(labelled_rows(1))
    rows[0] = (rows[0][0], b"\x89PNG\r\n\x1a\nno", *rows[0][2:])
    write_tar(str(tmp_path / "a.tar"), rows)
    assert len(read_labelled(str(tmp_path), ("style",), 32)) == 7 and "1 undecodable" in caplog.text


def test_discriminants_are_those_of_normal_distributions_of_one_covariance() -> None:
    rng = np.random.default_rng(0)
    classes = rng.integers(0, 3, 200)
    x = rng.normal(size=(3, 5))[classes] * 2 + rng.normal(size=(200, 5)) @ rng.normal(size=(5, 5))
    sums = FeatureSums(5, {"a": 3})
    for rows in (slice(0, 70), slice(70, 200)):
        sums.add(torch.from_numpy(x[rows]), {"a": torch.from_numpy(classes[rows])})
    mean, scale = (found.numpy() for found in sums.scaling())
    weights, bias = (found.numpy() for found in sums.discriminant("a", 1e-9))
    z = (x - mean) * scale
    centres = np.stack([z[classes == c].mean(0) for c in range(3)])
    covariance = (z - centres[classes]).T @ (z - centres[classes]) / len(z)
    apart = z[:, None] - centres
    nearness = -np.einsum("ncd,de,nce->nc", apart, np.linalg.inv(covariance), apart) / 2
    logits = z @ weights.T + bias
    np.testing.assert_allclose(logits - logits[:, :1], nearness - nearness[:, :1], atol=1e-5)


@given(st.lists(st.integers(0, 4), min_size=1, max_size=12), st.data())
def test_ranks_are_those_of_a_stable_sort(scores: list[int], data: st.DataObject) -> None:
    place = data.draw(st.integers(0, len(scores) - 1))
    order = sorted(range(len(scores)), key=lambda i: -scores[i])
    assert rank(np.array(scores), place) == order.index(place)


def test_views_are_drawn_by_the_seed_and_stay_images() -> None:
    images = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    one, same, other = (augmented(images, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert one.shape == images.shape and one.abs().max() <= 1 and torch.equal(one, same) and not torch.equal(one, other)
    white = augmented(torch.ones(2, 3, 32, 32), torch.Generator().manual_seed(0))
    assert torch.allclose(white, torch.ones(()), atol=1e-5), "a white ground stays white"
