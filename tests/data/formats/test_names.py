"""Names from outside: patterns, members of tars, ids of rows, image files, links."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from yarl import URL

from instella_ray.data.formats.names import (
    Keys,
    absolute_pattern,
    find_image_files,
    image_extension,
    member_name,
    names_shards,
    row_key,
    split_pattern,
    web_url,
)
from instella_ray.errors import UserError

SEGMENT = st.text(st.characters(exclude_characters="./\0,\n"), min_size=1, max_size=8)


def test_a_pattern_has_parts_and_means_the_same_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert split_pattern("a/*.tar, gs://b/c.tar,/d") == ["a/*.tar", "gs://b/c.tar", "/d"]
    assert absolute_pattern("a/*.tar, gs://b/c.tar,/d") == f"{tmp_path}/a/*.tar,gs://b/c.tar,/d"


def test_shards_are_named_by_their_ending_or_by_their_folder(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "0.tar").touch()
    (tmp_path / "empty").mkdir()
    assert names_shards("x/*.tar", ".tar") and names_shards(str(tmp_path / "full"), ".tar")
    assert not names_shards(str(tmp_path / "empty"), ".tar") and not names_shards("x/*.parquet", ".tar")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a.jpg", ("a", "jpg")),
        ("./a.JPG", ("a", "jpg")),
        ("folder/a.json", ("folder/a", "json")),
        ("folder.v1/a.txt", ("folder.v1/a", "txt")),
        ("a.seg.png", ("a", "seg.png")),
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


def test_ids_of_rows_lose_the_dots_that_would_end_a_key() -> None:
    assert [row_key(value) for value in ("a.b/c.d", "../x", 7, None)] == ["a_b/c_d", "../x", "7", ""]


def test_keys_that_lead_out_of_a_folder_or_come_twice_are_problems() -> None:
    keys = Keys()
    names = ("a", "b/c", "a", "/etc/x", "b/../../x", "..")
    assert [keys.problem(name) for name in names] == [None, None, "duplicate_key", *["unsafe_name"] * 3]


def test_image_files_of_a_folder_and_below_it(tmp_path: Path) -> None:
    for name in ("b.PNG", "a.jpeg", "below/c.webp", "notes.txt", "d.png.tmp", "png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert find_image_files(str(tmp_path)) == ["a.jpeg", "b.PNG", "below/c.webp"]
    assert image_extension("x/y.JPG") == "jpg" and image_extension("y.txt") is None
    with pytest.raises(
        UserError, match="no images found; expected tars, parquet files, or a folder of jpg, jpeg, png, webp, "
    ):
        find_image_files(str(tmp_path / "none"))


@pytest.mark.parametrize(
    ("link", "expected"),
    [
        (" http://a.org/b.jpg ", "http://a.org/b.jpg"),
        ("https://user:secret@a.org/b#part", "https://a.org/b"),
        ("ftp://a.org/b.jpg", None),
        ("file:///etc/passwd", None),
        ("http:///b.jpg", None),
        ("b.jpg", None),
        ("http://a.org:99999/b.jpg", None),
        ("", None),
    ],
)
def test_links(link: str, expected: str | None) -> None:
    assert web_url(link) == (URL(expected) if expected else None)


def test_a_link_may_be_relative_to_where_it_stands() -> None:
    assert web_url("../c.jpg", URL("http://a.org/x/y/b")) == URL("http://a.org/x/c.jpg")
