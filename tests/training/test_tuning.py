"""Tuning a trunk tells classes apart by its features, is drawn by the seed alone, and changes nothing else."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from instella_ray.data.formats.images import to_tensor
from instella_ray.data.loading.labelled import LabelledImages, read_labelled
from instella_ray.models.classifier import Classifier, ClassifierConfig, load_classifier, new_classifier
from instella_ray.training.classifier import ClassifierRunConfig, augmented, run_classifier
from instella_ray.training.tuning import FIRST, TuningConfig, factor, tune

from ..kit.labelled import COLORS, STYLES, write_labelled

pytest.importorskip("efficientnet_lite_pytorch", reason="the extra 'eval' is not installed")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> LabelledImages:
    """Images in light of various brightness, which is most of what differs between them."""
    folder = write_labelled(tmp_path_factory.mktemp("tuning"), 4)
    found = read_labelled(folder, ("style", "concept"), 32)
    light = np.random.default_rng(0).uniform(0.2, 1, (len(found), 1, 1, 1))
    return replace(found, images=(found.images * light).astype(np.uint8))


def classes(images: LabelledImages) -> dict[str, Tensor]:
    return {
        "style": torch.tensor([STYLES.index(value) for value in images.labels["style"]]),
        "concept": torch.tensor([list(COLORS).index(value) for value in images.labels["concept"]]),
    }


def untuned() -> Classifier:
    cfg = ClassifierConfig(size=32, labels={"style": STYLES, "concept": tuple(COLORS)})
    return new_classifier(cfg, "random")


def tuned(images: LabelledImages, seed: int = 0, **options: float) -> Classifier:
    model = untuned()
    tune(model, images, classes(images), TuningConfig(**options), 8, seed, augmented)
    return model


def separation(model: Classifier, images: LabelledImages) -> float:
    """Share of the variance of the network's features that is between the pairs of style and concept."""
    with torch.inference_mode():
        x = model.embed(model.trunk(to_tensor(images.images))).double()
    pairs = classes(images)["style"] * len(COLORS) + classes(images)["concept"]
    centres = torch.stack([x[pairs == pair].mean(0) for pair in pairs])
    return float((centres - x.mean(0)).square().sum() / (x - x.mean(0)).square().sum())


def test_features_of_classes_are_further_apart_than_those_of_random_weights(images: LabelledImages) -> None:
    model, cfg = untuned(), TuningConfig(epochs=20, dropout=0, label_smoothing=0)
    before = separation(model, images)
    tune(model, images, classes(images), cfg, 8, 0, lambda views, _: views)
    after = separation(model, images)
    assert after > before + 0.1, (before, after)


@pytest.mark.parametrize("steps", (1, 2, 9, 10, 11, 200))
def test_the_learning_rate_rises_for_a_tenth_of_the_steps_and_falls_towards_zero(steps: int) -> None:
    factors = [factor(step, steps) for step in range(steps + 1)]
    assert min(factors[:-1]) > 0 and max(factors) <= 1 and factors[-1] == pytest.approx(0)
    highest = factors.index(max(factors))
    assert highest == max(1, steps // 10) - 1 and sorted(factors[highest:], reverse=True) == factors[highest:]


def test_the_seed_decides_and_only_what_is_tuned_changes(images: LabelledImages) -> None:
    drawn = torch.get_rng_state()
    before, one, same, other = (m.state_dict() for m in (untuned(), *(tuned(images, s, epochs=1) for s in (1, 1, 2))))
    assert torch.equal(torch.get_rng_state(), drawn), "the process's own generator is not drawn from"
    assert all(torch.equal(value, same[name]) for name, value in one.items())
    last = "trunk.network._blocks.15._project_conv.weight"
    assert not torch.equal(one[last], other[last]) and not torch.equal(one[last], before[last])
    early = [name for name in before if name.startswith(tuple(f"trunk.network._blocks.{n}." for n in range(FIRST)))]
    for name in (*early, "trunk.network._conv_stem.weight", "heads.style.weight", "heads.concept.weight"):
        assert torch.equal(one[name], before[name]), name


def test_a_tuned_model_is_as_fixed_as_any_other(images: LabelledImages) -> None:
    model = tuned(images, epochs=1)
    assert not any(module.training for module in model.modules())
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_the_settings_of_a_run_are_those_of_its_tuning(tmp_path: Path) -> None:
    data = write_labelled(tmp_path / "train", 4)
    common = {"data": data, "size": 32, "weights": "random", "views": 1, "held_out_share": 0.2, "threads": 1}
    states = []
    for number, rate in enumerate((None, 1e-3, 2e-3)):
        tuning = None if rate is None else TuningConfig(epochs=1, learning_rate=rate)
        output = tmp_path / f"model{number}"
        run_classifier(ClassifierRunConfig(output=str(output), tuning=tuning, **common))
        states.append(load_classifier(output)[0].state_dict()["trunk.network._conv_head.weight"])
    assert not torch.equal(states[0], states[1]) and not torch.equal(states[1], states[2])
