"""Storage: writes are whole or absent, folders complete or absent, transient errors are tried again."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from fsspec.implementations.local import LocalFileSystem
from yarl import URL

from instella_ray import storage
from instella_ray.config import check_output_file
from instella_ray.errors import UserError


@pytest.mark.parametrize("root", ["local", "memory://box"])
def test_what_is_written_is_read(root: str, tmp_path: Path) -> None:
    base = str(tmp_path) if root == "local" else root
    storage.write_json(storage.join(base, "a", "b.json"), {"x": 1})
    assert storage.read_json(storage.join(base, "a", "b.json")) == {"x": 1}
    assert storage.glob(storage.join(base, "a", "*.json")) == [storage.join(base, "a", "b.json")]
    assert storage.is_empty(storage.join(base, "none")) and not storage.is_empty(base)
    storage.remove_tree(storage.join(base, "a"))
    assert not storage.exists(storage.join(base, "a", "b.json"))


def test_an_interrupted_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = str(tmp_path / "f")
    storage.write_bytes(path, b"old")
    with pytest.raises(KeyboardInterrupt), storage.open_file(path, "wb") as stream:
        stream.write(b"new")
        raise KeyboardInterrupt
    assert storage.read_bytes(path) == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["f"]


def test_a_folder_is_complete_or_absent(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), storage.atomic_dir(tmp_path / "d") as folder:
        (folder / "half").touch()
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    with storage.atomic_dir(tmp_path / "d") as folder:
        (folder / "whole").touch()
    assert [p.name for p in (tmp_path / "d").iterdir()] == ["whole"]


AT_ONCE = replace(storage.RETRIES, first_wait_s=0)


def unavailable() -> Exception:
    """What a busy store answers, of a class that is no OSError."""
    asked = aiohttp.RequestInfo(URL("http://store/object"), "GET", {}, URL("http://store/object"))  # type: ignore[arg-type]
    return aiohttp.ClientResponseError(asked, (), status=503)


def test_transient_errors_are_tried_again_and_others_are_not() -> None:
    calls = []

    def flaky() -> str:
        calls.append(1)
        if len(calls) < 3:
            raise unavailable()
        return "done"

    assert storage.retry(flaky, AT_ONCE) == "done" and len(calls) == 3

    def broken() -> None:
        calls.append(1)
        raise OSError("403 Forbidden")

    calls.clear()
    with pytest.raises(OSError, match="403"):
        storage.retry(broken, AT_ONCE)
    assert len(calls) == 1


@pytest.mark.parametrize("folder", ["step-0000500", "step-0000123"])
def test_a_full_disk_is_tried_once_whatever_the_folder_is_called(
    folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = []

    def full(fs: Any, source: str, target: str, **options: Any) -> None:
        tried.append(target)
        raise OSError(errno.ENOSPC, "No space left on device", target)

    monkeypatch.setattr(LocalFileSystem, "mv", full)
    with pytest.raises(OSError, match=f"No space left.*{folder}"):
        storage.write_bytes(str(tmp_path / folder / "weights"), b"x")
    assert len(tried) == 1 and not list((tmp_path / folder).iterdir())


def test_absolute_paths_mean_the_same_elsewhere() -> None:
    here = Path.cwd()
    assert [storage.absolute(path) for path in ("a,b", "gs://b/c", "/d")] == [f"{here}/a,b", "gs://b/c", "/d"]


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        storage.read_bytes(str(tmp_path / "none"))
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(UserError, match=r"bad\.json: not valid JSON"):
        storage.read_json(str(tmp_path / "bad.json"))


def test_reading_goes_on_behind_what_was_given_after_a_transient_error() -> None:
    made = []

    def flaky() -> Iterator[int]:
        made.append(1)
        yield from range(2 * len(made))
        if len(made) < 3:
            raise unavailable()

    assert list(storage.retry_iter(flaky, AT_ONCE)) == list(range(6)) and len(made) == 3


@pytest.mark.parametrize("root", ["local", "memory://box"])
def test_many_files_are_read_in_order_and_listed_with_their_sizes(root: str, tmp_path: Path) -> None:
    base = str(tmp_path) if root == "local" else root
    urls = [storage.join(base, "many", f"{i:03d}.txt") for i in range(100)]
    for number, url in enumerate(urls):
        storage.write_bytes(url, b"x" * number)
    assert [len(data) for data in storage.read_many(urls, at_once=3)] == list(range(100))
    assert storage.sizes(storage.join(base, "many", "*.txt")) == {url: number for number, url in enumerate(urls)}
    storage.remove_tree(storage.join(base, "many"))


@pytest.mark.parametrize("root", ["local", "memory://onto"])
def test_nothing_is_written_onto_a_folder(root: str, tmp_path: Path) -> None:
    base = str(tmp_path) if root == "local" else root
    folder = storage.join(base, "reports")
    storage.write_text(storage.join(folder, "kept.txt"), "kept")
    before = storage.glob(storage.join(base, "**"))
    with pytest.raises(UserError, match="reports: a folder, expected the name of a file"):
        storage.write_text(folder, "a page")
    with pytest.raises(UserError, match="reports: a folder, expected the name of a file"):
        check_output_file(folder)
    assert storage.glob(storage.join(base, "**")) == before  # nor is a temporary file left


def test_a_target_is_checked_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    for good in ("new.json", "file", "not/there/yet.json", "odd #? %41.json"):
        check_output_file(str(tmp_path / good))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]  # a check makes nothing
    with pytest.raises(UserError, match=r"file/x/y\.json: .*file is not a folder that can be written to"):
        check_output_file(str(tmp_path / "file" / "x" / "y.json"))
    with pytest.raises(UserError, match="new/: a folder, expected the name of a file"):
        check_output_file(f"{tmp_path}/new/")
    monkeypatch.setattr("os.access", lambda *_: False)  # root may write everywhere
    with pytest.raises(UserError, match=r"x\.json: .* is not a folder that can be written to"):
        check_output_file(str(tmp_path / "x.json"))


def test_a_device_is_written_to_and_not_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    storage.write_text(str(tmp_path / "pipe"), "a page")
    assert os.read(reader, 100) == b"a page" and (tmp_path / "pipe").is_fifo()
    os.close(reader)
    assert [path.name for path in tmp_path.iterdir()] == ["pipe"]
