"""On the scenes set, true codes score near the ceiling and noise near the floor, on every metric that can tell."""

from __future__ import annotations

import numpy as np
import pytest

from instella_ray.data.scenes import Expectation, render, sample_scene, scene_at
from instella_ray.errors import UserError
from instella_ray.evaluation.metrics import diversity, fid, scene
from instella_ray.evaluation.metrics.base import Batch
from instella_ray.evaluation.metrics.bits import BitUsage
from instella_ray.evaluation.metrics.features import efficientnet_lite0
from instella_ray.evaluation.metrics.images import ImageSettings
from instella_ray.evaluation.metrics.presets import PRESETS, TABLE1, TABLE3, preset
from instella_ray.evaluation.metrics.psnr import CEILING, psnr
from instella_ray.evaluation.metrics.ssim import ssim

N, SIZE = 48, 64
SCENES = [scene_at(11, i) for i in range(N)]
CAPTIONS = [s.caption for s in SCENES]
IDS = [f"{i:03d}" for i in range(N)]


def drawn(expect: Expectation, seed: int) -> np.ndarray:
    """Another image that is true to a caption: what a perfect generator would return."""
    rng = np.random.default_rng([seed, 7])
    return next(render(s, SIZE) for s in iter(lambda: sample_scene(rng, expect.category), None) if s.expect == expect)


TRUE = np.stack([drawn(s.expect, i) for i, s in enumerate(SCENES)])
NOISE = np.random.default_rng(0).integers(0, 256, TRUE.shape, np.uint8)


def test_scene_score_of_true_images_is_1_and_of_noise_about_0() -> None:
    for images, low, high in ((TRUE, 0.99, 1.0), (NOISE, 0.0, 0.05), (np.roll(TRUE, 1, 0), 0.0, 0.3)):
        metric = scene.scene_score()
        metric.update(Batch(IDS, images=images, prompts=CAPTIONS))
        result = metric.result()
        assert low <= result.value <= high and result.low < result.high
        assert {p.name.split("/")[0] for p in result.parts} == {"scene_score"} and len(result.parts) == 6


def test_reconstruction_metrics_of_the_same_image_and_of_noise() -> None:
    for metric, ceiling in ((psnr(), CEILING), (ssim(), 1.0)):
        metric.update(Batch(IDS, images=TRUE, references=TRUE))
        assert metric.result().value == pytest.approx(ceiling)
    for metric, floor in ((psnr(), 9.0), (ssim(), 0.1)):
        metric.update(Batch(IDS, images=NOISE, references=TRUE))
        assert metric.result().value < floor


def test_bits_of_noise_are_all_used_and_of_one_code_none() -> None:
    rng = np.random.default_rng(0)
    ids = [str(i) for i in range(2000)]
    for codes, usage, dead in (
        (rng.integers(0, 2, (2000, 4, 8), np.uint8), 1.0, 0.0),
        (np.ones((2000, 4, 8), np.uint8), 0, 1),
    ):
        metric = BitUsage()
        metric.update(Batch(ids, codes=codes))
        result = metric.result()
        whole, lost = result.parts
        assert result.value == pytest.approx(usage, abs=1e-3) and lost.value == dead
        assert whole.name == "codes_entropy" and whole.value == pytest.approx(32 * usage, abs=0.03)
    with pytest.raises(UserError, match="expected uint8 0/1"):
        BitUsage().update(Batch(["a"], codes=np.full((1, 4, 8), 3, np.uint8)))


def test_entropy_interval_covers_the_truth() -> None:
    rng, hits = np.random.default_rng(1), 0
    share = np.array([[0.2, 0.5, 0.9, 0.3]])
    truth = float(-(share * np.log2(share) + (1 - share) * np.log2(1 - share)).mean())
    for _ in range(120):
        metric = BitUsage()
        metric.update(Batch([str(i) for i in range(400)], codes=(rng.random((400, 1, 4)) < share).astype(np.uint8)))
        result = metric.result()
        hits += result.low <= truth <= result.high
    assert 0.87 <= hits / 120 <= 1.0


def test_diversity_of_one_code_is_0_and_of_random_codes_half() -> None:
    rng = np.random.default_rng(0)
    ids, groups = [f"{i // 4}/{i % 4}" for i in range(80)], [str(i // 4) for i in range(80)]
    for codes, expected in (
        (rng.integers(0, 2, (80, 16, 16), np.uint8), 0.5),
        (np.repeat(rng.integers(0, 2, (20, 16, 16), np.uint8), 4, 0), 0.0),
    ):
        metric = diversity.code_diversity(per_prompt=4)
        metric.update(Batch(ids, codes=codes, groups=groups))
        assert metric.result().value == pytest.approx(expected, abs=0.02)
    pairs = [(codes[i] != codes[j]).mean() for i, j in ((0, 1), (0, 2), (1, 2))]
    assert diversity.bit_distance(codes[:3].reshape(3, -1)) == pytest.approx(np.mean(pairs))


@pytest.mark.process
def test_frechet_distance_over_efficientnet_tells_scenes_from_noise() -> None:
    features = efficientnet_lite0(size=64)
    assert features.name == "efficientnet_lite0" and features.weights_hash is not None
    images, ids = ImageSettings(size=SIZE), IDS[:24]
    scenes = np.stack([render(s, SIZE) for s in SCENES[:24]])
    gather = fid.frechet(features, images=images)
    gather.update(Batch(ids, images=scenes))
    results = {}
    for name, measured in (("true", TRUE), ("noise", NOISE), ("same", scenes)):
        metric = fid.frechet(features, reference=gather.gaussian(), images=images, groups=3)
        metric.update(Batch(ids, images=measured[:24]))
        results[name] = metric.result()
    assert results["same"].name == "frechet_efficientnet_lite0"
    assert results["same"].value < 0.01 * results["true"].value
    assert results["true"].value < 0.4 * results["noise"].value
    assert results["noise"].value - results["true"].value > 5 * results["noise"].settings["standard_error"]
    assert fid.frechet(features, reconstruction=True).info.name == "rfrechet_efficientnet_lite0"


def test_image_settings_crop_resize_and_say_so() -> None:
    wide = np.zeros((1, 20, 40, 3), np.uint8)
    wide[:, :, 10:30] = 200
    got = ImageSettings(size=10, filter="box").prepare(wide)
    assert got.shape == (1, 10, 10, 3) and (got == 200).all()
    assert ImageSettings(size=20).prepare(wide[:, :, :20]).shape == (1, 20, 20, 3)
    assert (ImageSettings(format="png").prepare(TRUE) == TRUE).all()
    lossy = ImageSettings(format="jpeg", jpeg_quality=30)
    assert (lossy.prepare(TRUE) != TRUE).any() and (lossy.prepare_originals(TRUE) == TRUE).all()
    assert lossy.describe()["jpeg_quality"] == 30 and "jpeg_quality" not in ImageSettings().describe()


def test_presets_are_the_papers() -> None:
    assert (TABLE1.sampling, TABLE3.sampling) == (
        type(TABLE1.sampling)("posterior", 7.5, 0.75, 100),  # type: ignore[misc]
        type(TABLE1.sampling)("simplified", 4.0, 0.6, 20),  # type: ignore[misc]
    )
    assert TABLE3.prompts["fid"] == 30_000 and any("3K" in note for note in TABLE3.notes)
    numbers = {p.metric: p.value for p in TABLE1.published}
    tasks = ("single_object", "two_object", "counting", "colors", "color_attr", "position")
    assert numbers["geneval"] == pytest.approx(np.mean([numbers[f"geneval/{t}"] for t in tasks]), abs=0.006)
    assert numbers["clip_score"] == 0.332 and numbers["image_reward"] == 0.9
    assert all(p.source.startswith("Table ") for item in PRESETS.values() for p in item.published)
    with pytest.raises(UserError, match="paper-table3"):
        preset("paper-table9")
