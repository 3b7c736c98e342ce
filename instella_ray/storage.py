"""Files anywhere fsspec reaches: local paths, ``gs://``, ``s3://``, ``memory://``. Writes are whole or absent."""

from __future__ import annotations

import hashlib
import json
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import IO, Any, TypeVar

import fsspec

from .errors import UserError
from .retries import RetryPolicy
from .transient import transient

T = TypeVar("T")

RETRIES = RetryPolicy(transient, tries=5, first_wait_s=0.5)


def filesystem(url: str) -> tuple[Any, str]:
    """The fsspec filesystem of ``url`` and the path within it."""
    try:
        return fsspec.core.url_to_fs(url)
    except (ValueError, ImportError) as error:
        raise UserError(f"{url}: {error}") from None


def retry(call: Callable[[], T], policy: RetryPolicy = RETRIES) -> T:
    """``call()``, repeated with growing waits on transient errors."""
    return policy.call(call)


def retry_iter(make: Callable[[], Iterator[T]], policy: RetryPolicy = RETRIES) -> Iterator[T]:
    """What ``make()`` iterates over; after a transient error it is made anew and goes on behind what was given.

    ``make`` has to give the same items every time.
    """
    return policy.iterate(make)


def is_local(url: str) -> bool:
    """True for a path on this machine."""
    return "local" in getattr(filesystem(url)[0], "protocol", ()) or "://" not in url


def join(url: str, *parts: str) -> str:
    """``url`` with further path parts."""
    return "/".join([url.rstrip("/"), *parts])


def absolute(path: str) -> str:
    """Return a path or URL that means the same in another working directory; workers run in directories of their own."""
    return path if "://" in path else str(Path(path).absolute())


def exists(url: str) -> bool:
    fs, path = filesystem(url)
    return bool(retry(lambda: fs.exists(path)))


def size(url: str) -> int:
    """Bytes of a file."""
    fs, path = filesystem(url)
    return int(retry(lambda: fs.size(path)))


def is_empty(url: str) -> bool:
    """True for a folder that is not there or holds nothing."""
    fs, path = filesystem(url)
    return not fs.exists(path) or not retry(lambda: fs.ls(path, detail=False))


def glob(pattern: str) -> list[str]:
    """The files that match, sorted, in the form the pattern has; a plain name matches itself where it exists."""
    return list(sizes(pattern))


def sizes(pattern: str) -> dict[str, int]:
    """:func:`glob` with the bytes of each file, from one listing."""
    fs, path = filesystem(pattern)
    found = retry(lambda: fs.glob(path, detail=True))
    protocol, separator, _ = pattern.partition("://")
    base = f"{protocol}://" if separator else ""
    strip = separator and protocol != "file"
    return {base + (p.lstrip("/") if strip else p): int(found[p].get("size") or 0) for p in sorted(found)}


def move(url: str, to: str) -> None:
    """Give a file another name, within one filesystem."""
    fs, path = filesystem(url)
    target = filesystem(to)[1]
    fs.makedirs(fs._parent(target), exist_ok=True)
    retry(lambda: fs.mv(path, target))


def remove_tree(url: str) -> None:
    """Delete a folder with all it holds; nothing where there is none."""
    fs, path = filesystem(url)
    if fs.exists(path):
        fs.rm(path, recursive=True)


OBJECT_STORES = {"gs", "gcs", "s3", "s3a"}
"""There an object appears when its upload is committed; to upload it and then move it would be to write it twice."""


@contextmanager
def open_file(url: str, mode: str = "rb") -> Iterator[IO[Any]]:
    """Open for reading, or for an atomic write: the file appears under its name when the block ends well."""
    fs, path = filesystem(url)
    if "r" in mode:
        try:
            stream = retry(lambda: fs.open(path, mode))
        except FileNotFoundError:
            raise UserError(f"{url}: no such file") from None
        with stream:
            yield stream
        return
    if OBJECT_STORES.isdisjoint([fs.protocol] if isinstance(fs.protocol, str) else fs.protocol):
        with _moved_into_place(fs, path, mode) as stream:
            yield stream
        return
    stream = fs.open(path, mode, autocommit=False)
    try:
        yield stream
        stream.close()
        stream.commit()
    except BaseException:
        with suppress(Exception):  # a store forgets what is never committed; what went wrong first is what counts
            stream.discard()
        raise


@contextmanager
def _moved_into_place(fs: Any, path: str, mode: str) -> Iterator[IO[Any]]:
    fs.makedirs(fs._parent(path), exist_ok=True)
    temporary = f"{path}.{uuid.uuid4().hex[:8]}.tmp"
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
    """The contents of many small files, in order: a store that answers slowly is asked for several at a time."""
    left = iter(urls)
    with ThreadPoolExecutor(at_once) as threads:
        # In portions, or else what is read ahead of the caller would pile up.
        while portion := list(islice(left, 16 * at_once)):
            yield from threads.map(_read_whole, portion)


def _read_whole(url: str) -> bytes:
    fs, path = filesystem(url)
    return bytes(retry(lambda: fs.cat_file(path)))


def file_sha256(url: str) -> str:
    """sha256 of a file; UserError where there is none."""
    digest = hashlib.sha256()
    with open_file(url) as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def read_text(url: str) -> str:
    return read_bytes(url).decode()


def read_json(url: str) -> Any:
    """Parsed JSON; UserError naming the file where it is none."""
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
    """A parquet file as a pyarrow table; ``options`` are those of pyarrow's ``read_table``."""
    import pyarrow.parquet as pq

    with open_file(url) as stream:
        return pq.read_table(stream, **options)


def write_parquet(url: str, table: Any, **options: Any) -> None:
    """A pyarrow table as a parquet file; ``options`` are those of pyarrow's ``write_table``."""
    import pyarrow.parquet as pq

    with open_file(url, "wb") as stream:
        pq.write_table(table, stream, **options)


@contextmanager
def atomic_dir(path: str | Path) -> Iterator[Path]:
    """A local folder that appears under ``path`` complete when the block ends well, and leaves no trace otherwise."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    temporary.mkdir()
    try:
        yield temporary
        temporary.rename(path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
