"""The text filter with the real PP-OCRv4, on text that the tests draw: none, dense, small, large, and upwards."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from instella_ray.data.curation.filters.base import Scorer, bounded
from instella_ray.data.curation.filters.text import Text
from instella_ray.data.scenes import render, scene_at

from ...kit.shards import IMAGE_SIZES

pytest.importorskip("rapidocr_onnxruntime", reason="the extra 'curate' is not installed")
LINE = "seven wizards quietly brew a green potion"


@pytest.fixture(scope="module")
def score() -> Scorer:
    return Text().load("cpu")


def page(lines: int, letters: int, size: tuple[int, int] = (512, 512), text: str = LINE) -> Image.Image:
    """Black lines of text on a white image; ``letters`` is the font's size (px)."""
    image = Image.new("RGB", size, "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(letters)
    for line in range(lines):
        draw.text((8, 8 + line * 1.6 * letters), text, font=font, fill="black")
    return image


def test_images_without_text_have_no_text_size_and_pass(score: Scorer) -> None:
    images = [Image.new("RGB", (300, 200), "white"), Image.fromarray(render(scene_at(0, 1), 256))]
    for found in score(images):
        assert found == {"text_density": 0.0} and Text().reason(found) is None


def test_a_page_of_small_text_is_dense_and_a_few_small_lines_are_small(score: Scorer) -> None:
    dense, small, title = score([page(20, 14, (400, 480)), page(3, 12), page(1, 64, text="potion")])
    assert dense["text_density"] > 0.25 and Text().reason(dense) == "dense_text"
    assert small["text_size"] < 0.04 and Text().reason(small) == "small_text"
    assert Text(ignored_density=0.2).reason(small) is None
    assert title["text_size"] > 0.1 and Text().reason(title) is None


def test_density_is_the_area_of_the_lines_and_size_is_their_height(score: Scorer) -> None:
    image = page(1, 40, (600, 300), "green potion")
    left, top, right, bottom = ImageDraw.Draw(image).textbbox((8, 8), "green potion", ImageFont.load_default(40))
    (found,) = score([image])
    assert found["text_density"] == pytest.approx((right - left) * (bottom - top) / (600 * 300), rel=0.5)
    assert found["text_size"] == pytest.approx((bottom - top) / 300, rel=0.4)


def test_size_of_the_image_and_direction_of_the_text_make_little_difference(score: Scorer) -> None:
    image = page(2, 40, (512, 256), "green potion")
    plain, large, turned = score([image, image.resize((1536, 768)), image.rotate(90, expand=True)])
    for other in (large, turned):
        assert other["text_density"] == pytest.approx(plain["text_density"], rel=0.3)
        assert other["text_size"] == pytest.approx(plain["text_size"], rel=0.3)


@pytest.mark.process
def test_any_image_is_taken_and_scores_the_same_alone_and_in_a_batch(score: Scorer) -> None:
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)) for width, height in IMAGE_SIZES]
    images.append(page(1, 20, (2000, 40)))
    together = score(images)
    assert together[-1:] == score(images[-1:])
    assert all(0 <= value <= 1 for found in together for value in found.values())
    assert together[-1]["text_density"] > 0.05


@pytest.mark.parametrize(
    ("scores", "reason"),
    [
        ({"text_density": 0.26, "text_size": 0.5}, "dense_text"),
        ({"text_density": 0.25, "text_size": 0.04}, None),
        ({"text_density": 0.021, "text_size": 0.039}, "small_text"),
        ({"text_density": 0.02, "text_size": 0.039}, None),
        ({}, None),
    ],
)
def test_limits(scores: dict[str, float], reason: str | None) -> None:
    assert Text().reason(scores) == reason


@pytest.mark.parametrize(
    ("size", "expected"),
    [((100, 80), (100, 80)), ((200, 150), (133, 100)), ((50, 900), (22, 400)), ((1, 9000), (1, 400))],
)
def test_bounded_images_keep_their_shape_where_they_can(size: tuple[int, int], expected: tuple[int, int]) -> None:
    assert bounded(Image.new("RGB", size), 100).size == expected
