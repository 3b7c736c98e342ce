"""Scenes: exact captions, images that are a function of (seed, index), and a scorer that can be trusted."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from scipy import ndimage

from instella_ray.data.scene_score import detect, score, score_table
from instella_ray.data.scenes import (
    CATEGORIES,
    Scene,
    parse_caption,
    render,
    sample_expectation,
    sample_scene,
    scene_at,
    scene_prompts,
    scene_rows,
)
from instella_ray.errors import UserError

SEEDS = st.integers(0, 2**32 - 1)
SCENES = [scene_at(11, i) for i in range(360)]


@given(SEEDS)
def test_captions_and_metadata_say_what_the_scene_is(seed: int) -> None:
    scene = sample_scene(np.random.default_rng(seed))
    assert parse_caption(scene.caption) == scene.expect
    assert Scene.from_json(scene.to_json()) == scene


@given(SEEDS)
def test_objects_never_touch_each_other_or_the_edge(seed: int) -> None:
    objects = sample_scene(np.random.default_rng(seed)).objects
    for i, a in enumerate(objects):
        assert all(a.radius < place < 1 - a.radius for place in (a.x, a.y))
        for b in objects[:i]:
            assert max(abs(a.x - b.x), abs(a.y - b.y)) > a.radius + b.radius


def test_a_row_depends_on_seed_and_index_alone() -> None:
    rows = list(scene_rows(12, 5, 32))
    assert list(scene_rows(12, 5, 32)) == rows
    assert scene_at(5, 7).caption == rows[7][2]
    assert len({row[0] for row in rows}) == 12


@pytest.mark.parametrize("category", CATEGORIES)
def test_images_agree_across_sizes(category: str) -> None:
    scene = sample_scene(np.random.default_rng(3), category)
    large = Image.fromarray(render(scene, 256)).resize((64, 64), Image.Resampling.BOX)
    assert np.abs(np.asarray(large).astype(int) - render(scene, 64)).mean() < 1.5


@pytest.mark.parametrize("size", [64, 128])
def test_true_images_score_at_least_99_percent_in_every_category(size: int) -> None:
    table = score_table((s.expect.category, score(render(s, size), s.expect).correct) for s in SCENES)
    assert min(table.values()) >= 0.99, table


def test_the_scorer_survives_the_blur_and_noise_of_a_25_db_reconstruction() -> None:
    verdicts = []
    for i, scene in enumerate(SCENES):
        blurred = ndimage.gaussian_filter(render(scene, 64).astype(float), (1.0, 1.0, 0))
        noisy = (blurred + np.random.default_rng(i).normal(0, 11, blurred.shape)).clip(0, 255).astype(np.uint8)
        verdicts.append((scene.expect.category, score(noisy, scene.expect).correct))
    assert score_table(verdicts)["overall"] >= 0.95


def test_wrong_captions_are_refused() -> None:
    accepted = []
    for i, scene in enumerate(SCENES):
        other = sample_expectation(np.random.default_rng(i), scene.expect.category)
        # Two objects in the other order, or a colour that happens to be there, are no wrong captions.
        if other != scene.expect and scene.expect.category in (
            "single_object",
            "counting",
            "colors",
            "color_attribution",
        ):
            accepted.append(score(render(scene, 64), other).correct)
    assert np.mean(accepted) <= 0.02


@pytest.mark.parametrize(
    ("caption", "wrong"),
    [
        ("a photo of a circle left of a square", "a photo of a circle right of a square"),
        ("a photo of a circle above a square", "a photo of a square above a circle"),
        ("a photo of three crosses", "a photo of two crosses"),
        ("a photo of a red circle and a blue square", "a photo of a blue circle and a red square"),
    ],
)
def test_each_kind_of_claim_is_checked(caption: str, wrong: str) -> None:
    claim, seed = parse_caption(caption), 0
    while True:
        scene = sample_scene(np.random.default_rng(seed), claim.category)
        if scene.expect == claim:
            break
        seed += 1
    image = render(scene, 64)
    assert score(image, claim).correct
    assert not score(image, parse_caption(wrong)).correct


def test_noise_and_plain_images_hold_nothing() -> None:
    assert detect(np.full((64, 64, 3), 235, np.uint8)) == []
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    verdicts = [score(noise, e).correct for e in scene_prompts(5, 0) if e.category != "single_object"]
    assert np.mean(verdicts) <= 0.1


def test_prompts_cover_the_categories_evenly() -> None:
    prompts = scene_prompts(10, seed=1)
    assert [p.category for p in prompts] == [c for c in CATEGORIES for _ in range(10)]
    assert len({p.caption for p in prompts if p.category == "color_attribution"}) == 10


@pytest.mark.parametrize("text", ["", "a dog", "a photo of a pink circle", "a photo of two circle"])
def test_other_captions_are_named(text: str) -> None:
    with pytest.raises(UserError, match="not a scenes caption"):
        parse_caption(text)
