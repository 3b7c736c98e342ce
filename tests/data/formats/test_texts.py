"""Texts and metadata from outside: what counts as a caption, a prompt, a number, and what is refused by its type."""

from __future__ import annotations

import datetime
import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from instella_ray.data.formats.metadata import column_name, json_object, json_value, number, score
from instella_ray.data.formats.texts import TextError, both_captions, clean_text, one_line, text_of, trimmed


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("a  dog\n", "a dog"),
        (b"\xef\xbb\xbfa dog", "a dog"),
        (b"caf\xe9", "caf\ufffd"),
        ("a\0dog", "a dog"),
        ("half \ud83d", "half ?"),
        (None, ""),
        (math.nan, ""),
        ("  ", ""),
        ([], ""),
        (["", "a dog", "a brown dog"], "a dog"),
        ([None, b"a dog"], "a dog"),
    ],
)
def test_texts(value: Any, expected: str) -> None:
    assert text_of(value) == expected


@pytest.mark.parametrize(
    ("value", "kind"),
    [(True, "boolean"), (7, "number"), (0.5, "number"), ({"en": "a"}, "object"), ([["a"]], "list"), ([1], "list")],
)
def test_what_is_no_text_is_refused_by_its_type(value: Any, kind: str) -> None:
    with pytest.raises(TextError, match=f"^{kind}, expected text$"):
        text_of(value)


@given(st.text())
def test_a_clean_text_is_one_line_that_any_file_holds_and_stays_as_it_is(text: str) -> None:
    clean = one_line(text)
    assert clean.splitlines() in ([], [clean]) and one_line(clean) == clean
    assert clean_text(clean.encode()) == clean


def test_prompts_keep_what_is_inside_them() -> None:
    assert text_of(" a\u2028 b ", trimmed) == "a\u2028 b"


def test_one_caption_stands_in_for_two() -> None:
    assert both_captions("c", {"caption_long": "l", "caption_short": 3}) == {"caption_long": "l", "caption_short": "c"}


@pytest.mark.parametrize(
    ("value", "expected"),
    [(1, 1.0), (0.5, 0.5), ("0.5", 0.5), ("1e400", None), ("nan", None), (math.inf, None), (True, None), (None, None)],
)
def test_numbers(value: Any, expected: float | None) -> None:
    assert number(value) == expected


def test_the_scores_of_laion_are_found_in_both_spellings() -> None:
    assert score({"punsafe": 0.5}, "punsafe") == score({"PUNSAFE": "0.5"}, "punsafe") == 0.5
    assert score({}, "punsafe") is None
    assert [column_name(name) for name in ("PUNSAFE", "Licence")] == ["punsafe", "Licence"]


def test_values_of_columns_are_what_json_holds() -> None:
    day = datetime.date(2024, 2, 1)
    assert [json_value(v) for v in (b"a", day, math.nan, 3, "x")] == ["a", "2024-02-01", None, 3, "x"]


@pytest.mark.parametrize("text", ["[1]", "", "{", '{"a": "\\ud83d"}', "[" * 100_000])
def test_metadata_is_an_object_or_nothing(text: str) -> None:
    assert json_object(text) is None and json_object(json.dumps({"a": 1})) == {"a": 1}
