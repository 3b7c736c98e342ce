"""Names from outside: patterns, image files, links."""

from __future__ import annotations

from pathlib import Path

import pytest
from yarl import URL

from instella_ray.data.formats.names import (
    absolute_pattern,
    find_image_files,
    image_extension,
    names_shards,
    split_pattern,
    web_url,
)
from instella_ray.errors import UserError


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


def test_image_files_of_a_folder_and_below_it(tmp_path: Path) -> None:
    for name in ("b.PNG", "a.jpeg", "below/c.webp", "notes.txt", "d.png.tmp", "png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert find_image_files(str(tmp_path)) == ["a.jpeg", "b.PNG", "below/c.webp"]
    assert image_extension("x/y.JPG") == "jpg" and image_extension("y.txt") is None
    with pytest.raises(
        UserError, match="no images found; expected tars, parquet files, or a folder of jpg, jpeg, png, webp"
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
