"""Captions: articles, and what is measured on the pixels."""

from __future__ import annotations

import numpy as np
import pytest

from instella_ray.data.icons.captions import long_caption, noun_phrase, short_caption


@pytest.mark.parametrize(
    "phrase",
    [
        *(
            "a tomato",
            "an apple",
            "a unicorn",
            "an hourglass done",
            "an umbrella",
            "a euro banknote",
            "a ewe",
            "an X-ray",
        ),
        *("a face with tears of joy", "a person running", "a bus", "an octopus", "a dress", "a man with red hair"),
        *("an ear of corn", "a backhand index pointing right", "a map of Japan", "a UFO"),
    ],
)
def test_singular_nouns_have_their_article(phrase: str) -> None:
    assert noun_phrase(phrase.partition(" ")[2]) == phrase


@pytest.mark.parametrize(
    "phrase", ["grapes", "chopsticks", "cooked rice", "people holding hands", "thumbs up", "Santa Claus"]
)
def test_plurals_and_masses_have_none(phrase: str) -> None:
    assert noun_phrase(phrase) == phrase


def test_names_that_are_no_nouns_become_some() -> None:
    assert noun_phrase("one-thirty") == "a clock at one-thirty"
    assert noun_phrase("no entry") == "a no entry sign"
    assert noun_phrase("Aries") == "the sign Aries"


def painted(*parts: tuple[slice, slice, tuple[int, int, int]]) -> tuple[np.ndarray, np.ndarray]:
    pixels, opacity = np.full((40, 40, 3), 255, np.uint8), np.zeros((40, 40), np.uint8)
    for rows, columns, color in parts:
        pixels[rows, columns], opacity[rows, columns] = color, 255
    return pixels, opacity


RED, GREEN, WHITE = (220, 40, 45), (70, 165, 75), (255, 255, 255)


def test_colours_stand_in_order_of_area_with_their_positions() -> None:
    image = painted((slice(2, 38), slice(2, 38), RED), (slice(2, 10), slice(2, 38), GREEN))
    assert long_caption("tomato", "flat", *image) == "a tomato, flat style, red, with green at the top"


def test_the_background_is_no_colour_but_white_parts_are() -> None:
    image = painted((slice(2, 38), slice(2, 38), RED), (slice(14, 26), slice(14, 26), WHITE))
    assert long_caption("button", "flat", *image) == "a button, flat style, red, with white"


def test_small_areas_are_not_named() -> None:
    image = painted((slice(2, 38), slice(2, 38), RED), (slice(2, 6), slice(2, 6), GREEN))
    assert long_caption("button", "flat", *image) == "a button, flat style, red"


def test_the_shape_is_measured() -> None:
    assert long_caption("pen", "flat", *painted((slice(15, 25), slice(2, 38), RED))) == "a pen, flat style, wide, red"
    assert long_caption("pen", "flat", *painted((slice(2, 38), slice(15, 25), RED))) == "a pen, flat style, tall, red"


def test_what_is_transparent_gets_the_short_caption_alone() -> None:
    assert long_caption("ghost", "flat", *painted()) == short_caption("ghost", "flat") == "a ghost, flat style"
