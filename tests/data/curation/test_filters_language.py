"""The language filter on real captions: English passes, other languages do not, what tells no language has no score."""

from __future__ import annotations

import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from instella_ray.data.curation.filters.base import Sample
from instella_ray.data.curation.filters.language import Language
from instella_ray.errors import UserError

pytest.importorskip("py3langid", reason="the extra 'curate' is not installed")

ENGLISH = [
    "The quick brown fox jumps over the lazy dog",
    "A 3D emoji of hippopotamus on a sand background, animal, hippo.",
    "a woman in a red coat waiting at a bus stop in the rain",
    "FREE SHIPPING ON ALL ORDERS OVER FIFTY DOLLARS",
]
OTHERS = {
    "de": "Ein Hund läuft über die grüne Wiese und bellt laut",
    "fr": "un chat noir dort sur un vieux canapé rouge",
    "es": "una foto de un perro que corre por la playa",
    "zh": "一只猫坐在窗边的垫子上看着外面的雨",
    "ru": "Кошка сидит на ковре и смотрит в окно",
}


def verdict(text: str, **given: object) -> str | None:
    language = Language(**given)
    return language.reason(language.measure(Sample((512, 512), text, {})))


@pytest.mark.parametrize("text", ENGLISH)
def test_english_captions_pass(text: str) -> None:
    assert verdict(text) is None


@pytest.mark.parametrize("code", OTHERS)
def test_captions_in_another_language_are_dropped_unless_it_is_asked_for(code: str) -> None:
    assert verdict(OTHERS[code]) == "language"
    assert verdict(OTHERS[code], languages=("en", code)) is None


@pytest.mark.parametrize("text", ["", "cat", "猫", "12345 67890 12345 67890 12345", "... --- !!!", "IKEA Billy"])
def test_what_tells_no_language_has_no_score(text: str) -> None:
    assert Language().measure(Sample((512, 512), text, {})) == {}


@settings(max_examples=50)
@given(st.text(max_size=200))
def test_any_caption_has_a_probability_or_none(text: str) -> None:
    for value in Language(languages=("en", "de", "en")).measure(Sample((1, 1), text, {})).values():
        assert 0 <= value <= 1 + 1e-6


def test_a_very_long_caption_is_judged_by_its_beginning() -> None:
    begun = " ".join(ENGLISH * 20)
    measured = [Language().measure(Sample((1, 1), begun[:2000] + more, {})) for more in ("", OTHERS["ru"] * 3000)]
    assert measured[0] == measured[1]


def test_an_unknown_language_and_a_missing_package_are_named_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    Language().check()
    with pytest.raises(UserError, match=r"^filters.language.languages english: expected codes out of .* de .* en .*"):
        Language(languages=("en", "english")).check()
    monkeypatch.setitem(sys.modules, "py3langid", None)
    with pytest.raises(UserError, match=r"^filters.language: .*py3langid.*instella-ray\[curate\]"):
        Language().check()


def test_real_captions_are_english(emoji_shards: str) -> None:
    from instella_ray.data.formats.names import find_shards
    from instella_ray.data.formats.tar_source import read_samples

    with open(next(iter(find_shards(emoji_shards))), "rb") as stream:
        captions = [row["caption"] for row in read_samples(stream, "")][:100]
    assert [text for text in captions if verdict(text)] == []
