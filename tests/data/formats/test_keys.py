"""Keys: names of members and ids of rows, as every reader of tars gives them back."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from instella_ray.data.formats.keys import Keys, is_unsafe, member_name, readable, safe_extension, safe_key

from ...kit.hostile import NAMES

SEGMENT = st.text(st.characters(exclude_characters="./", exclude_categories=["Cs"]), min_size=1, max_size=8)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a.jpg", ("a", "jpg")),
        ("./a.JPG", ("a", "jpg")),
        ("folder/a.json", ("folder/a", "json")),
        ("folder.v1/a.txt", ("folder.v1/a", "txt")),
        ("a.seg.png", ("a", "seg.png")),
        ("a.Seg.PNG", ("a", "Seg.png")),
        ("two\nlines/a.png", ("two\nlines/a", "png")),
        ("a", None),
        (".hidden", None),
        ("folder/.jpg", None),
        ("folder/", None),
    ],
)
def test_members_of_a_tar(name: str, expected: tuple[str, str] | None) -> None:
    assert member_name(name) == expected


@given(st.lists(SEGMENT, min_size=1, max_size=3), SEGMENT)
def test_a_member_of_any_folder_gives_back_key_and_extension(folders: list[str], extension: str) -> None:
    assert member_name("/".join(folders) + "." + extension) == ("/".join(folders), extension.lower())


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("000000012", "000000012"),
        ("a/b c/d", "a/b c/d"),
        ("v1.5/a", "v1.5/a"),
        ("x.y", "x%2Ey"),
        ("http://site.com/page/", "http:%2F%2Fsite.com/page%2F"),
        ("/m/01g317", "%2Fm/01g317"),
        ("../x", "%2E%2E/x"),
        ("a/./b", "a/%2E/b"),
        ("a.b//", "a%2Eb%2F%2F"),
        ("tab\there", "tab%09here"),
        ("caf\udce9", "caf%E9"),
        ("__meta__/a", "%5F_meta__/a"),
        ("100%", "100%"),
    ],
)
def test_keys_lose_what_readers_cut_at_or_cannot_hold(name: str, key: str) -> None:
    assert safe_key(name) == key


@given(NAMES)
def test_a_key_stays_what_it_is_and_fits_file_systems(name: str) -> None:
    key = safe_key(name)
    assert safe_key(key) == key
    assert all(len(part.encode()) <= 200 for part in key.split("/")) and len(key.encode()) <= 1000
    assert member_name(f"{key}.jpg") == (key, "jpg") and not is_unsafe(key)


@given(st.lists(NAMES, unique=True))
def test_distinct_names_have_distinct_keys(names: list[str]) -> None:
    keys = Keys()
    assigned = [keys.assign(name) for name in names]
    assert len({key for key, _ in assigned}) == len(names) and all(new for _, new in assigned)
    assert [keys.assign(name) for name in names] == [(key, False) for key, _ in assigned]


def test_a_name_that_looks_like_the_key_of_another_gets_one_of_its_own() -> None:
    keys = Keys()
    first, second = keys.assign("a.b")[0], keys.assign("a%2Eb")[0]
    assert first == "a%2Eb" and second.startswith("a%2Eb%_") and safe_key(second) == second


def test_members_that_lead_out_of_a_folder_are_unsafe() -> None:
    assert [is_unsafe(name) for name in ("a", "b/c..d", "/etc/x", "b/../../x", "..")] == [
        False,
        False,
        True,
        True,
        True,
    ]


def test_names_that_are_not_utf8_are_readable() -> None:
    assert readable("caf\udce9 \u00e9") == "caf\\xe9 \u00e9"


def test_extensions_of_further_members_keep_their_dots() -> None:
    assert [safe_extension(e) for e in ("seg.png", "n\npy", "\udcff")] == ["seg.png", "n%0Apy", "%FF"]
    assert len(safe_extension("x" * 300)) == 50
