"""File access through fsspec: local paths, ``gs://``, ``s3://``, ``memory://``, with retries and atomic writes."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import IO, Any, TypeVar

import fsspec

from .errors import FULL, UserError
from .retries import RetryPolicy
from .transient import transient

T = TypeVar("T")

RETRIES = RetryPolicy(transient, tries=5, first_wait_s=0.5)


def filesystem(url: str) -> tuple[Any, str]:
    """Return the fsspec filesystem of ``url`` and the path within it; UserError for an unknown or missing protocol."""
    try:
        return fsspec.core.url_to_fs(url)
    except (ValueError, ImportError) as error:
        raise UserError(f"{url}: {error}") from None


def retry(call: Callable[[], T], policy: RetryPolicy = RETRIES) -> T:
    """Return ``call()``, retried with exponential backoff on transient errors."""
    return policy.call(call)


def retry_iter(make: Callable[[], Iterator[T]], policy: RetryPolicy = RETRIES) -> Iterator[T]:
    """Iterate over ``make()``; after a transient error, call it again and skip the items already yielded.

    ``make`` must yield the same items every time.
    """
    return policy.iterate(make)


def is_local(url: str) -> bool:
    """Return whether ``url`` is a path on this machine."""
    return "local" in getattr(filesystem(url)[0], "protocol", ()) or "://" not in url


def join(url: str, *parts: str) -> str:
    """Append path parts to ``url``."""
    return "/".join([url.rstrip("/"), *parts])


def absolute(path: str) -> str:
    """Return a path or URL that means the same in another working directory; workers run in directories of their own."""
    return path if "://" in path else str(Path(path).absolute())


def exists(url: str) -> bool:
    """Return whether a file or folder exists."""
    fs, path = filesystem(url)
    return bool(retry(lambda: fs.exists(path)))


def size(url: str) -> int:
    """Return the size of a file in bytes."""
    fs, path = filesystem(url)
    return int(retry(lambda: fs.size(path)))


def is_empty(url: str) -> bool:
    """Return whether a folder does not exist or is empty."""
    fs, path = filesystem(url)
    return not fs.exists(path) or not retry(lambda: fs.ls(path, detail=False))


def glob(pattern: str) -> list[str]:
    """Return the matching files, sorted, as paths or URLs like the pattern; a plain name matches itself if it exists."""
    return list(sizes(pattern))


def sizes(pattern: str) -> dict[str, int]:
    """Return the matching files of :func:`glob` with their sizes in bytes, from one listing."""
    fs, path = filesystem(pattern)
    found = retry(lambda: fs.glob(path, detail=True))
    protocol, separator, _ = pattern.partition("://")
    base = f"{protocol}://" if separator else ""
    strip = separator and protocol != "file"
    return {base + (p.lstrip("/") if strip else p): int(found[p].get("size") or 0) for p in sorted(found)}


def move(url: str, to: str) -> None:
    """Move a file within one filesystem."""
    fs, path = filesystem(url)
    target = filesystem(to)[1]
    make_folder(fs, fs._parent(target))
    retry(lambda: fs.mv(path, target))


def make_folder(fs: Any, path: str) -> None:
    """Create a folder and its parents, unless they exist; NotADirectoryError if one of them is a file."""
    try:
        fs.makedirs(path, exist_ok=True)
    except FileExistsError:
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), path) from None


def invalidate_listing(url: str) -> None:
    """Invalidate the client's cached directory listings of ``url``, because other machines write there too."""
    filesystem(url)[0].invalidate_cache()


def remove_tree(url: str) -> None:
    """Delete a folder and its contents, if it exists."""
    fs, path = filesystem(url)
    if fs.exists(path):
        fs.rm(path, recursive=True)


OBJECT_STORES = {"gs", "gcs", "s3", "s3a"}
"""Protocols of object stores, where an object appears atomically at the end of its upload; a move would copy it.

They have no folders without objects.
"""
TEMPORARY = ".tmp"
"""Ending of files and folders that are not complete yet."""


def is_object_store(url: str) -> bool:
    """Return whether ``url`` is in an object store."""
    protocol = filesystem(url)[0].protocol
    return not OBJECT_STORES.isdisjoint([protocol] if isinstance(protocol, str) else protocol)


@contextmanager
def open_file(url: str, mode: str = "rb") -> Iterator[IO[Any]]:
    """Open a file for reading or for an atomic write, which appears when the block succeeds; UserError if missing.

    PermissionError and errors of a full disk name ``url``.
    """
    fs, path = filesystem(url)
    if "r" in mode:
        try:
            with _named(url):
                stream = retry(lambda: fs.open(path, mode))
        except FileNotFoundError:
            raise UserError(f"{url}: no such file") from None
        with stream:
            yield stream
        return
    with _named(url), (_uploaded if is_object_store(url) else _moved_into_place)(fs, path, mode) as stream:
        yield stream


@contextmanager
def _named(url: str) -> Iterator[None]:
    """Name ``url`` in errors about permission and space that name no path, or only that of a temporary file."""
    try:
        yield
    except OSError as error:
        known = error.filename is not None and not str(error.filename).endswith(TEMPORARY)
        if known or not (isinstance(error, PermissionError) or error.errno in FULL):
            raise
        # Stores raise a PermissionError with a text alone.
        raise type(error)(error.errno or errno.EACCES, error.strerror or str(error), url) from error


@contextmanager
def _uploaded(fs: Any, path: str, mode: str) -> Iterator[IO[Any]]:
    stream = fs.open(path, mode, autocommit=False)
    try:
        yield stream
        stream.close()
        stream.commit()
    except BaseException:
        with suppress(Exception):  # uncommitted uploads expire, and the original error must not be hidden
            stream.discard()
        raise


@contextmanager
def _moved_into_place(fs: Any, path: str, mode: str) -> Iterator[IO[Any]]:
    make_folder(fs, fs._parent(path))
    temporary = f"{path}.{uuid.uuid4().hex[:8]}{TEMPORARY}"
    try:
        with fs.open(temporary, mode) as stream:
            yield stream
        retry(lambda: fs.mv(temporary, path))
    except BaseException:
        if fs.exists(temporary):
            fs.rm(temporary)
        raise


def read_bytes(url: str) -> bytes:
    with open_file(url) as stream:
        return stream.read()


def read_many(urls: Iterable[str], *, at_once: int = 64) -> Iterator[bytes]:
    """Read many small files in order, with ``at_once`` parallel requests to hide a store's latency."""
    remaining = iter(urls)
    with ThreadPoolExecutor(at_once) as threads:
        # In portions, to bound the memory of files read ahead of the caller.
        while portion := list(islice(remaining, 16 * at_once)):
            yield from threads.map(_read_whole, portion)


def _read_whole(url: str) -> bytes:
    fs, path = filesystem(url)
    return bytes(retry(lambda: fs.cat_file(path)))


def file_sha256(url: str) -> str:
    """Return the sha256 of a file; UserError if it does not exist."""
    digest = hashlib.sha256()
    with open_file(url) as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def read_text(url: str) -> str:
    return read_bytes(url).decode()


def read_json(url: str) -> Any:
    """Read and parse a JSON file; UserError if it does not exist or is not valid JSON."""
    try:
        return json.loads(read_bytes(url))
    except ValueError as error:
        raise UserError(f"{url}: not valid JSON ({error})") from None


def write_bytes(url: str, data: bytes) -> None:
    with open_file(url, "wb") as stream:
        stream.write(data)


def write_text(url: str, text: str) -> None:
    write_bytes(url, text.encode())


def write_json(url: str, value: Any) -> None:
    write_text(url, json.dumps(value, indent=1) + "\n")


def read_parquet(url: str, **options: Any) -> Any:
    """Read a parquet file as a pyarrow table; ``options`` are passed to pyarrow's ``read_table``."""
    import pyarrow.parquet as pq

    with open_file(url) as stream:
        return pq.read_table(stream, **options)


def write_parquet(url: str, table: Any, **options: Any) -> None:
    """Write a pyarrow table as a parquet file atomically; ``options`` are passed to pyarrow's ``write_table``."""
    import pyarrow.parquet as pq

    with open_file(url, "wb") as stream:
        pq.write_table(table, stream, **options)


@contextmanager
def atomic_dir(path: str | Path) -> Iterator[Path]:
    """Provide a temporary local folder that is renamed to ``path`` if the block succeeds, and deleted otherwise."""
    path = Path(path)
    make_folder(*filesystem(str(path.parent)))
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}{TEMPORARY}")
    temporary.mkdir()
    try:
        yield temporary
        temporary.rename(path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
