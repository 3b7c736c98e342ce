"""Previews: labelled strips whose images can be read back, and a grid of all steps so far."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import ImageFont

from instella_ray import storage
from instella_ray.rendering import encode_png
from instella_ray.sheet import MARGIN, TILE, draw_sheet, wrap
from instella_ray.training.previews import (
    AVERAGED,
    ORIGINALS,
    RAW,
    SHOWN_STEPS,
    TrainingPreview,
    alike,
    decode_preview,
    draw_grid,
    draw_strip,
    encode_preview,
    preview_file,
    read_previews,
    spread,
)


def preview(
    size: int = 32, labels: tuple[str, ...] = ("a red circle", ""), names: tuple[str, ...] = (AVERAGED, RAW)
) -> TrainingPreview:
    rng = np.random.default_rng(len(labels))
    return TrainingPreview(
        {name: rng.integers(0, 256, (len(labels), size, size, 3), np.uint8) for name in names}, labels
    )


@pytest.mark.parametrize("size", [32, 200])
@pytest.mark.parametrize("names", [(AVERAGED, RAW), (ORIGINALS, AVERAGED, RAW)])
def test_a_strip_holds_its_images_unchanged(size: int, names: tuple[str, ...]) -> None:
    made = preview(size, ("a red circle", "猫" * 9000, ""), names)
    strip = draw_strip(made)
    read = decode_preview(encode_preview(made, strip))
    assert read is not None and list(read.rows) == list(names)
    assert all(np.array_equal(read.rows[name], images) for name, images in made.rows.items())
    assert (read.labels[0], read.labels[2]) == ("a red circle", "") and made.labels[1].startswith(read.labels[1])
    assert decode_preview(encode_png(strip)) is None


def test_each_text_stands_under_its_image_and_within_its_width() -> None:
    sheet = draw_strip(preview(32, ("first words of a long prompt", "", "x" * 200)))
    width, height = 3 * (TILE + MARGIN) + MARGIN, sheet.shape[0]
    assert sheet.shape[1] == width
    bottom = sheet[sheet.shape[0] - 60 :]
    assert height > 2 * TILE
    for column in range(3):
        left = MARGIN + column * (TILE + MARGIN)
        assert (bottom[:, left : left + TILE] < 128).any()  # ink, under the empty prompt too
        assert (bottom[:, left + TILE + 1 : left + TILE + MARGIN] == 255).all()


@given(st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=80), st.integers(30, 300))
def test_lines_fit_and_say_what_they_can(text: str, width: int) -> None:
    font = ImageFont.load_default(13)
    lines = wrap(text, font, width, lines=3)
    assert len(lines) <= 3
    assert all(font.getlength(line) <= width or len(line.rstrip("…")) <= 1 for line in lines)
    words = "".join(text.split())
    said = "".join("".join(lines).split())
    assert said == words or (said.endswith("…") and words.startswith(said[:-1]) and len(lines) == 3)


def test_a_grid_grows_with_the_steps_and_shows_those_of_the_same_prompts() -> None:
    previews = {100: preview(64), 200: preview(64)}
    two = draw_grid(previews)
    three = draw_grid({**previews, 300: preview(64)})
    assert two.shape[1] == three.shape[1] and three.shape[0] >= two.shape[0] + TILE
    changed = {**previews, 300: preview(64, ("another prompt", "and a second one"))}
    assert alike(changed) == [300] and alike({**changed, 400: preview(64)}) == [100, 200, 400]


@given(st.sets(st.integers(1, 10**6), min_size=1), st.integers(2, 40))
def test_of_many_steps_an_even_selection_is_shown(steps: set[int], count: int) -> None:
    chosen = spread(sorted(steps), count)
    assert chosen == sorted(set(chosen)) and set(chosen) <= steps and len(chosen) <= count
    assert {min(steps), max(steps)} <= set(chosen) and (len(steps) > count or len(chosen) == len(steps))


def test_a_resumed_run_reads_the_previews_up_to_its_checkpoint_reduced(tmp_path: Path) -> None:
    for step in range(10, 10 * (SHOWN_STEPS + 9), 10):
        made = preview(160)
        storage.write_bytes(preview_file(str(tmp_path), step), encode_preview(made, draw_strip(made)))
    storage.write_bytes(
        preview_file(str(tmp_path), 5), encode_png(np.zeros((8, 8, 3), np.uint8))
    )  # of an older version
    found = read_previews(str(tmp_path), 40)
    assert list(found) == [10, 20, 30, 40] and found[10].rows[AVERAGED].shape == (2, TILE, TILE, 3)
    assert list(found[10].rows) == [AVERAGED] and len(read_previews(str(tmp_path), 10**6)) <= SHOWN_STEPS


def test_a_sheet_has_rows_of_images_each_above_its_label() -> None:
    images = np.random.default_rng(0).integers(0, 200, (5, TILE, TILE, 3), np.uint8)
    drawn = draw_sheet(images, [f"image {number}" for number in range(5)], columns=3)
    assert drawn.shape[1] == 3 * (TILE + MARGIN) + MARGIN
    tops = [MARGIN, drawn.shape[0] // 2 + MARGIN // 2]
    for number, image in enumerate(images):
        top, left = tops[number // 3], MARGIN + number % 3 * (TILE + MARGIN)
        assert np.array_equal(drawn[top : top + TILE, left : left + TILE], image)
        assert (drawn[top + TILE : top + TILE + 20, left : left + TILE] < 128).any()
    assert (drawn[tops[1] :, MARGIN + 2 * (TILE + MARGIN) :] == 255).all()
    assert draw_sheet(images[:2], "ab", columns=6).shape[1] == 2 * (TILE + MARGIN) + MARGIN
