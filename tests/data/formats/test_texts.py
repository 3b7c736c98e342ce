"""Texts and metadata from outside: what counts as a caption, a prompt, a number, and what is refused by its type."""

from __future__ import annotations

import datetime
import json
import math
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from instella_ray.data.formats.metadata import (
    column_name,
    json_object,
    json_text,
    json_value,
    number,
    required_text,
    score,
)
from instella_ray.data.formats.texts import (
    TextError,
    both_captions,
    caption_of,
    caption_text,
    clean_text,
    one_line,
    text_of,
    trimmed,
)
from instella_ray.errors import UserError

from ...kit.shards import image_bytes


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("a  dog\n", "a dog"),
        (b"\xef\xbb\xbfa dog", "a dog"),
        (b"caf\xe9", "caf\u00e9"),
        ("\ufeffa dog".encode("utf-16-le"), "a dog"),
        ("a dog".encode("utf-16"), "a dog"),
        ("\ufeff a dog", "a dog"),
        ("a dog".encode("utf-16-be"), "a dog"),
        ("a dog".encode("utf-32"), "a dog"),
        ("\ufffd?".encode(), "\ufffd?"),
        ("na\u00efve caf\u00e9".encode()[:-1], "na\u00efve caf\ufffd"),
        ("\u0416\u0443\u043a".encode(), "\u0416\u0443\u043a"),
        ("a\0dog", "a dog"),
        ("half \ud83d", "half ?"),
        (None, ""),
        (math.nan, ""),
        ("  ", ""),
        ([], ""),
        (["", "a dog", "a brown dog"], "a dog"),
        ([None, b"a dog"], "a dog"),
        ([math.nan, "a dog"], "a dog"),
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


@pytest.mark.parametrize("data", [image_bytes(), b"\xff", "\u72ac\u304c\u8d70\u308b".encode("shift-jis"), b"caf\x81"])
def test_bytes_that_are_no_text_are_refused(data: bytes) -> None:
    with pytest.raises(TextError, match="bytes in an unknown encoding"):
        text_of(data)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("['a dog', 'a brown dog']", "a dog"),
        ('["", "a dog\'s \\\\ tail"]', "a dog's \\ tail"),
        ("['a dog' 'a brown dog']", "a dog"),  # as NumPy prints it
        ("[None, 'a dog']", "a dog"),
        ("['a dog', 'cut", "['a dog', 'cut"),
        ("[a dog]", "[a dog]"),
        ("[1950s] a dog", "[1950s] a dog"),
        ("nan", ""),
        (b"nan\n", ""),
        ("Nan", "Nan"),
    ],
)
def test_what_writers_have_printed_into_captions_is_undone(value: str | bytes, expected: str) -> None:
    assert caption_text(value) == expected


def test_a_printed_object_is_no_caption() -> None:
    with pytest.raises(TextError, match="object, expected text"):
        caption_text("{'en': 'a dog', 'de': 'ein Hund'}")


def test_captions_are_found_by_name_in_any_case_and_order_of_preference() -> None:
    for names in (("caption",), ("TEXT",), ("text",), ("txt",), ("top_caption",), ("Alt_Text",), ("captions",)):
        assert caption_of(dict.fromkeys(names, "a dog")) == "a dog"
    assert caption_of({"TEXT": "second", "Caption": "first"}) == "first"
    assert caption_of({"caption": " ", "text": "a dog"}) == caption_of({"caption": 7, "text": "a dog"}) == "a dog"
    assert caption_of({"title": "a dog"}) == "" and caption_of({"title": "a dog"}, ("TITLE",)) == "a dog"
    with pytest.raises(TextError, match="object"):
        caption_of({"caption": {"en": "a dog"}, "text": math.nan})


@given(st.text())
def test_a_clean_text_is_one_line_that_any_file_holds_and_stays_as_it_is(text: str) -> None:
    clean = one_line(text)
    assert clean.splitlines() in ([], [clean]) and one_line(clean) == clean
    assert clean_text(clean.encode()) == clean


def test_prompts_keep_what_is_inside_them() -> None:
    assert text_of(" a\u2028 b ", trimmed) == "a\u2028 b"


def test_one_caption_stands_in_for_two() -> None:
    assert both_captions("c", {"caption_long": "l", "caption_short": 3}) == {"caption_long": "l", "caption_short": "c"}
    swapped = {"long_caption": "l", "short_caption": "s"}  # Dalle-1M
    assert both_captions("c", swapped) == {"caption_long": "l", "caption_short": "s"}


@pytest.mark.parametrize(
    ("value", "expected"),
    [(1, 1.0), (0.5, 0.5), ("0.5", 0.5), ("1e400", None), ("nan", None), (math.inf, None), (True, None), (None, None)],
)
def test_numbers(value: Any, expected: float | None) -> None:
    assert number(value) == expected


def test_the_scores_of_laion_are_found_in_both_spellings() -> None:
    assert score({"punsafe": 0.5}, "punsafe") == score({"PUNSAFE": "0.5"}, "punsafe") == 0.5
    assert score({}, "punsafe") is None
    assert score({"PunSafe": 0.5}, "punsafe") == score({"PUNSAFE": 0.9, "punsafe": " 0.5 "}, "punsafe") == 0.5
    assert [column_name(name) for name in ("PUNSAFE", "Licence")] == ["punsafe", "Licence"]


def test_values_of_columns_are_what_json_holds() -> None:
    day = datetime.date(2024, 2, 1)
    assert [json_value(v) for v in (b"a", day, math.nan, 3, "x")] == ["a", "2024-02-01", None, 3, "x"]
    assert json_value(Decimal("0.25")) == 0.25 and json_value({"a": [math.inf, 1.5]}) == {"a": [None, 1.5]}


def test_metadata_has_no_nan_and_names_of_laion_in_lower_case_whatever_comes_in() -> None:
    text = '{"PUNSAFE": NaN, "Hash": 1, "License": "CC", "deep": {"x": [Infinity, 1e999, -0.5]}}'
    expected = {"punsafe": None, "hash": 1, "License": "CC", "deep": {"x": [None, None, -0.5]}}
    assert json_object(text) == expected
    assert json.loads(json_text({"a": math.nan, "b": [math.inf]}), parse_constant=pytest.fail) == {
        "a": None,
        "b": [None],
    }


@pytest.mark.parametrize("text", ["[1]", "", "{", '{"a": "\\ud83d"}', "[" * 100_000])
def test_metadata_is_an_object_or_nothing(text: str) -> None:
    assert json_object(text) is None and json_object(json.dumps({"a": 1})) == {"a": 1}


@pytest.mark.parametrize("value", [None, "", 3, ["flat"]])
def test_a_text_that_metadata_must_have_is_named(value: object) -> None:
    assert required_text({"style": "flat"}, "style", "sample a") == "flat"
    with pytest.raises(UserError, match=r"^sample a: no text 'style' in its metadata, expected it in KEY\.json$"):
        required_text({"style": value}, "style", "sample a")
