"""File access through fsspec: local paths, ``gs://``, ``s3://``, ``memory://``, with retries and atomic writes."""

from __future__ import annotations

import errno
import glob as globs
import hashlib
import json
import math
import os
import re
import shutil
import stat
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import IO, Any, TypeVar

import fsspec
from fsspec.utils import glob_translate

from .errors import FULL, UserError
from .retries import RetryPolicy
from .transient import transient
from .urls import absolute, encoded_chain, is_local, split_archive, url_of

T = TypeVar("T")

RETRIES = RetryPolicy(transient, tries=5, first_wait_s=0.5)


class MissingFileError(UserError):
    """File that does not exist."""


def filesystem(url: str) -> tuple[Any, str]:
    """Return the fsspec filesystem of ``url`` and the path within it; UserError for an unknown or missing protocol."""
    if is_local(url):
        return fsspec.filesystem("file"), absolute(url)
    try:
        # HTTP servers get the text of a URL as it is given: fsspec would encode it anew.
        as_given = {name: {"encoded": True} for name in ("http", "https") if f"{name}://" in url}
        return fsspec.core.url_to_fs(encoded_chain(url) if as_given else url, **as_given)
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


def join(url: str, *parts: str) -> str:
    """Append path parts to ``url``."""
    return "/".join([url.rstrip("/"), *parts])


def exists(url: str) -> bool:
    """Return whether a file or folder exists."""
    fs, path = filesystem(url)
    return bool(retry(lambda: fs.exists(path)))


def size(url: str) -> int:
    """Return the size of a file in bytes."""
    fs, path = filesystem(url)
    return int(retry(lambda: fs.size(path)))


def kind(url: str) -> str | None:
    """Return ``file``, ``directory`` or, for devices and such, ``other``; None if nothing is there."""
    return _kind(*filesystem(url))


def _kind(fs: Any, path: str) -> str | None:
    try:
        return str(retry(lambda: fs.info(path))["type"])
    except (FileNotFoundError, NotADirectoryError):
        return None


def is_empty(url: str, besides: Collection[str] = ()) -> bool:
    """Return whether a folder does not exist or holds nothing but the names ``besides``."""
    fs, path = filesystem(url)
    found = retry(lambda: fs.ls(path, detail=False)) if fs.exists(path) else []
    return {PurePosixPath(name).name for name in found} <= set(besides)


def glob(pattern: str) -> list[str]:
    """Return the matching files, sorted, as paths or URLs like the pattern; a plain name matches itself if it exists."""
    return list(sizes(pattern))


def sizes(pattern: str) -> dict[str, int]:
    """Return the matching files of :func:`glob` with their sizes in bytes, from one listing.

    The leading folders of ``pattern`` that exist as they are written are no glob, such as ``photos [2024]``. ``**`` means
    folders at any depth. PermissionError for a local folder that cannot be read.
    """
    return _local_sizes(absolute(pattern)) if is_local(pattern) else _remote_sizes(pattern)


def split_glob(path: str, magic: str = "*?[") -> tuple[str, str]:
    """Split an absolute path or URL before its first component with a character of ``magic`` that does not exist as such.

    The second part is empty if there is no such component.
    """
    local, (path, archive) = is_local(path), split_archive(path)
    start = "" if local else path[: path.rfind("://") + 3]
    names, number = path[len(start) :].split("/"), 0
    if not local:
        magic = magic.replace("?", "")  # starts the query of a URL
    while number < len(names):
        here = start + "/".join(names[: number + 1]) + archive
        if any(c in names[number] for c in magic) and not (_may_be_name(names[number], local) and kind(here)):
            break
        number += 1
    return start + "/".join(names[:number]) + archive, "/".join(names[number:])


def _may_be_name(component: str, local: bool) -> bool:
    """Return whether a component of a path may be the name of something; a question to a store costs a request."""
    return local or "*" not in component


def _local_sizes(path: str) -> dict[str, int]:
    folder, rest = split_glob(path)
    if rest and not os.path.isdir(folder or "/"):
        return {}
    if rest:
        os.scandir(folder or "/").close()  # glob takes a folder without permission for an empty one
    names = globs.glob(
        f"{globs.escape(folder)}/{rest}" if rest else globs.escape(folder), recursive=True, include_hidden=True
    )
    found = {name: _stat(name) for name in sorted(names)}
    return {
        name: about.st_size if about else 0
        for name, about in found.items()
        if not (about and stat.S_ISDIR(about.st_mode))
    }


def _stat(path: str) -> os.stat_result | None:
    """Return the attributes of a file; None for a link to nothing or to itself."""
    try:
        return os.stat(path)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ELOOP):
            return None
        raise


def _remote_sizes(pattern: str) -> dict[str, int]:
    folder, rest = split_glob(pattern)
    fs, path = filesystem(folder)
    if not rest:
        found = {path: retry(lambda: fs.info(path))} if kind(folder) else {}
    elif globs.has_magic(path):
        depth = None if "**" in rest else rest.count("/") + 1
        matches = re.compile(glob_translate(rest)).match
        below = retry(lambda: fs.find(f"{path}/", maxdepth=depth, detail=True))
        found = {name: about for name, about in below.items() if matches(name[len(path) :].lstrip("/"))}
    else:
        found = retry(lambda: fs.glob(f"{path.rstrip('/')}/{rest}", detail=True))
    return {
        url_of(pattern, p): int(found[p].get("size") or 0) for p in sorted(found) if found[p]["type"] != "directory"
    }


def move(url: str, to: str) -> None:
    """Move a file within one filesystem."""
    fs, path = filesystem(url)
    target = filesystem(to)[1]
    make_folder(fs, fs._parent(target))
    _rename(fs, path, target)


def _rename(fs: Any, path: str, target: str) -> None:
    """Move a file; fsspec's general ``mv`` takes brackets in its name for a glob."""
    general = globs.has_magic(path) and type(fs).mv is fsspec.AbstractFileSystem.mv
    if general:
        retry(lambda: fs.cp_file(path, target))
        fs.rm_file(path)
    else:
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
    if not fs.exists(path):
        return
    if is_local(url) or not globs.has_magic(path):
        fs.rm(path, recursive=True)
        return
    # fsspec's rm would take brackets in the path for a glob, and delete what matches.
    below = fs.find(path, withdirs=True, detail=True)
    for name in sorted(below, reverse=True):
        if below[name]["type"] != "directory":
            fs.rm_file(name)
        elif not is_object_store(url):
            fs.rmdir(name)


OBJECT_STORES = {"gs", "gcs", "s3", "s3a"}
"""Protocols of object stores: uploads appear atomically, a move would copy, and there are no folders without objects."""
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
            raise MissingFileError(f"{url}: no such file") from None
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
    if (there := _kind(fs, path)) == "directory":  # where a move would put the file into it
        raise UserError(f"{path}: a folder, expected the name of a file")
    if there == "other" or path.startswith("/dev/"):  # a device, pipe or link to one, which a move would replace
        with fs.open(path, mode) as stream:
            yield stream
        return
    make_folder(fs, fs._parent(path))
    temporary = f"{path}.{uuid.uuid4().hex[:8]}{TEMPORARY}"
    try:
        with fs.open(temporary, mode) as stream:
            yield stream
        _rename(fs, temporary, path)
    except BaseException:
        if fs.exists(temporary):
            fs.rm_file(temporary)
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
    """Write ``value`` as JSON, which has no NaN and no infinities: they become null."""
    write_text(url, json.dumps(finite(value), indent=1, allow_nan=False) + "\n")


def finite(value: Any) -> Any:
    """Return a JSON value with None in place of NaN and infinities, also within lists and objects."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value


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
