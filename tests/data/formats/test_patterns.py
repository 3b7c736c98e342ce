"""What a pattern names: one table for paths, one for web servers; and the labels of shards."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
from hypothesis import given
from hypothesis import strategies as st

from instella_ray import storage
from instella_ray.data.formats.names import find_files, find_shards
from instella_ray.data.formats.patterns import Pattern, absolute_pattern, shard_label, split_pattern
from instella_ray.data.formats.sources import find_inputs, read_rows
from instella_ray.errors import UserError

from ...kit.shards import sample, tar_bytes

FILES = [
    *("in/0.tar", "in/1.tar", "in/below/2.tar", "in/x-00000.tar", "in/x-00001.tar", "in/x-00002.tar"),
    *("photos [2024]/0.tar", "a,b/0.tar", "a,b/1.tar", "set {x,y}/0.tar", "50%25 off/0.tar", " blank /0.tar"),
    *("star*/0.tar", "why?.tar", "x::y/0.tar", "me/0.tar", "dots/../in/3.tar", "**.tar/0.tar", "a#b.tar", "ü/0.tar"),
]


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Files with names that patterns might misread, in the working directory; ``me`` is the home directory."""
    for name in FILES:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(tar_bytes(sample("x")))
    (tmp_path / "in" / "folder.tar").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "me"))
    return tmp_path


def found(pattern: Pattern, root: Path) -> list[str]:
    return [str(Path(entry.url).relative_to(root)) for entry in find_files(pattern)]


IN = ["in/0.tar", "in/1.tar", "in/3.tar", "in/x-00000.tar", "in/x-00001.tar", "in/x-00002.tar"]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("in", IN),
        ("in/", IN),
        ("./in/../in", IN),
        ("in/?.tar", IN[:3]),
        ("in/[01].tar", IN[:2]),
        ("in/*/*.tar", ["in/below/2.tar"]),
        ("in/**/*.tar", [*IN[:3], "in/below/2.tar", *IN[3:]]),
        ("in/**.tar", [*IN[:3], "in/below/2.tar", *IN[3:]]),
        ("in/x-{00000..00001}.tar", IN[3:5]),
        ("in/{0,x-00002}.tar", ["in/0.tar", "in/x-00002.tar"]),
        ("{in/below,me}/*.tar", ["in/below/2.tar", "me/0.tar"]),
        ("in/0.tar,in/below", ["in/0.tar", "in/below/2.tar"]),
        (" in/0.tar , in/1.tar ", IN[:2]),
        (("in/0.tar", "in/1.tar"), IN[:2]),
        ("photos [2024]", ["photos [2024]/0.tar"]),
        ("photos [2024]/0.tar", ["photos [2024]/0.tar"]),
        ("photos [2024]/*.tar", ["photos [2024]/0.tar"]),
        ("photos [2024]/{0..0}.tar", ["photos [2024]/0.tar"]),
        ("a,b", ["a,b/0.tar", "a,b/1.tar"]),
        ("a,b/*.tar", ["a,b/0.tar", "a,b/1.tar"]),
        (("a,b/0.tar", "in/0.tar"), ["a,b/0.tar", "in/0.tar"]),
        ("set {x,y}/*.tar", ["set {x,y}/0.tar"]),
        ("50%25 off", ["50%25 off/0.tar"]),
        (" blank ", [" blank /0.tar"]),
        ("star*/0.tar", ["star*/0.tar"]),
        ("**.tar", ["**.tar/0.tar"]),
        ("why?.tar", ["why?.tar"]),
        ("x::y/*.tar", ["x::y/0.tar"]),
        ("a#b.tar", ["a#b.tar"]),
        ("ü", ["ü/0.tar"]),
        ("~", ["me/0.tar"]),
        ("~/0.tar", ["me/0.tar"]),
        ("file://{root}/photos [2024]", ["photos [2024]/0.tar"]),
        ("file://{root}/50%25 off/0.tar", ["50%25 off/0.tar"]),
    ],
)
def test_paths(tree: Path, pattern: Pattern, expected: list[str]) -> None:
    if isinstance(pattern, str):
        pattern = pattern.replace("{root}", str(tree))
    assert found(pattern, tree) == expected
    assert found(absolute_pattern(pattern), tree) == expected


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("in/7.tar", r"^in/7\.tar: no shard found; expected WebDataset tars, for example 'data/\*\.tar'$"),
        ("in/x-{00001..00003}.tar", r"^in/x-{00001\.\.00003}\.tar: no shard found for /.*/in/x-00003\.tar;"),
        ("in/0.tar,,in/1.tar", "in/0.tar,,in/1.tar: no shard found"),
        ("in/folder.tar", r"in/folder\.tar: no shard found"),
        ("in/{0.tar", r"in/{0\.tar: no shard found"),
        ("50% off", "50% off: no shard found"),
        ("nothing::in/0.tar", r"nothing::in/0\.tar: no shard found"),
        ("gone://x/0.tar", "Protocol not known: gone"),
    ],
)
def test_what_names_nothing_is_one_line(tree: Path, pattern: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        find_files(pattern)
    assert "\n" not in str(error.value)


def test_folders_behind_links_are_read(tree: Path) -> None:
    (tree / "link").symlink_to(tree / "in")
    (tree / "all").mkdir()
    (tree / "all" / "in").symlink_to(tree / "in")
    assert found("link/x-*.tar", tree) == [f"link/x-0000{i}.tar" for i in range(3)]
    assert found("all/*/0.tar", tree) == ["all/in/0.tar"]


def test_a_folder_without_permission_is_not_an_empty_one(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: str) -> Iterator[str]:
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(storage.os, "scandir", refuse)
    with pytest.raises(PermissionError, match="/in'"):
        find_files("in")


def test_commas_separate_parts_but_not_within_braces_or_names(tree: Path) -> None:
    assert split_pattern("a/*.tar, gs://b/c.tar,/d") == ["a/*.tar", "gs://b/c.tar", "/d"]
    assert split_pattern("{a,b}/c.tar,d") == ["{a,b}/c.tar", "d"]
    assert split_pattern("a,b") == ["a,b"]
    assert split_pattern(("a, b", "c")) == ["a, b", "c"]
    assert absolute_pattern("a/*.tar, gs://b/c.tar,/d") == (f"{tree}/a/*.tar", "gs://b/c.tar", "/d")
    assert absolute_pattern("in/0.tar") == f"{tree}/in/0.tar"


@pytest.mark.parametrize("root", ["memory://box [2]", "memory://box"])
def test_stores_are_read_like_paths(root: str) -> None:
    urls = [f"{root}/a/{i}.tar" for i in range(2)]
    for url in urls:
        storage.write_bytes(url, tar_bytes(sample("x")))
    for pattern in (f"{root}/a", f"{root}/a/*.tar", f"{root}/**/*.tar", f"{root}/**.tar", f"{root}/a/{{0..1}}.tar"):
        assert [entry.url for entry in find_files(pattern)] == urls
    storage.remove_tree(root)
    assert storage.is_empty(root)


# --- web servers


@pytest.fixture
def server(tree: Path) -> Iterator[str]:
    """The address of a server of these files, whose folders are pages of links."""
    made = ThreadingHTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=str(tree)))
    Thread(target=made.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{made.server_port}"
    made.shutdown()
    made.server_close()


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("{server}/in/0.tar", ["{server}/in/0.tar"]),
        ("{server}/in/0.tar?version=2", ["{server}/in/0.tar?version=2"]),
        ("{server}/in/*.tar", ["{server}/" + name for name in IN]),
        ("{server}/me/", ["{server}/me/0.tar"]),
        ("{server}/me", ["{server}/me/0.tar"]),
        ("{server}/in/x-{00000..00001}.tar", ["{server}/in/x-00000.tar", "{server}/in/x-00001.tar"]),
        ("{server}/me/0.tar,in/0.tar", ["{tree}/in/0.tar", "{server}/me/0.tar"]),
        ("{server}/50%2525%20off/0.tar", ["{server}/50%2525%20off/0.tar"]),
        ("{server}/photos [2024]/0.tar", ["{server}/photos%20[2024]/0.tar"]),
        ("{server}/photos%20%5B2024%5D/0.tar", ["{server}/photos%20%5B2024%5D/0.tar"]),
        ("simplecache::{server}/me/0.tar", ["simplecache::{server}/me/0.tar"]),
        ("simplecache::{server}/me/*.tar", ["simplecache::{server}/me/0.tar"]),
        ("{server}/none/0.tar", None),
    ],
)
def test_web_servers(tree: Path, server: str, pattern: str, expected: list[str] | None) -> None:
    pattern = pattern.replace("{server}", server)
    if expected is None:
        with pytest.raises(UserError, match="no shard found"):
            find_inputs(pattern)
        return
    shards = find_inputs(pattern).shards
    assert list(shards) == [url.format(server=server, tree=tree) for url in expected]
    for url, label in shards.items():
        assert [row["key"] for row in read_rows(url, label)] == ["x"]


# --- labels

SAFE = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,114}")
URLS = st.from_regex(r"(gs://b/|s3://b/|https://h/|/)[^\0\n]{1,60}\.(tar|parquet)", fullmatch=True)


@given(st.lists(URLS, min_size=2, max_size=8, unique=True))
def test_labels_are_distinct_safe_and_those_of_their_urls_alone(urls: list[str]) -> None:
    labels = [shard_label(url) for url in urls]
    assert len(set(labels)) == len(urls)
    assert all(SAFE.fullmatch(label) for label in labels)
    assert [shard_label(url) for url in reversed(urls)] == labels[::-1]


@pytest.mark.parametrize(
    ("url", "readable"),
    [
        ("/data/laion/00017.tar", "laion__00017"),
        ("/0.tar", "0"),
        ("gs://bucket/0.tar", "bucket__0"),
        ("https://host:80/a/0.tar?x=/b/1.tar", "a__0"),
        ("simplecache::https://host:80/0.tar", "host_80__0"),
        ("/data/photos [2024]/a b.v2.parquet", "photos_2024___a_b.v2"),
        ("/data/.hidden/..tar", "hidden"),
        (f"/{'f' * 250}/{'n' * 240}7.tar", f"{'f' * 40}__{'n' * 59}7"),
    ],
)
def test_labels_say_folder_and_file(url: str, readable: str) -> None:
    label = shard_label(url)
    assert label[:-13] == readable and re.fullmatch("-[0-9a-f]{12}", label[-13:])


def test_a_set_that_grows_keeps_its_labels_in_the_order_of_its_files(tree: Path) -> None:
    before = find_shards("in/?.tar")
    after = find_shards("in/?.tar,in/below,me")
    assert before.items() <= after.items() and len(after) == 5
    assert list(before.values()) == sorted(before.values())
