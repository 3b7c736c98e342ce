"""Files of a folder, local or on any fsspec filesystem: listing them, and reading images among them by name."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from ... import storage
from .images import MAX_IMAGE_BYTES

AT_ONCE, THREADS = 64, 16
"""Files to ask for at once, and threads that read them."""
CONTENT_TAGS = ("md5Hash", "etag", "ETag", "mtime", "updated", "LastModified", "last_modified", "modified", "created")
"""What filesystems tell of the content of a file, or of the time of its last change, in order of preference."""


def list_files(folder: str, *, recursive: bool = True) -> dict[str, int]:
    """Map the paths of the files in a folder, relative to it and sorted, to their sizes (bytes).

    Hidden files and folders are left out, and what is in folders that are links, which may form a circle; such a link is
    listed itself. PermissionError for a local folder that cannot be read, in it or below.
    """
    fs, root = storage.filesystem(folder)
    if not fs.isdir(root):
        return {}
    if storage.is_local(folder):
        return dict(sorted(_local_files(root, recursive)))
    found = storage.retry(lambda: fs.find(root, maxdepth=None if recursive else 1, detail=True))
    names = {path[len(root) :].strip("/"): entry for path, entry in found.items()}
    return {
        name: int(entry.get("size") or 0)
        for name, entry in sorted(names.items())
        if entry["type"] == "file" and not any(part[0] == "." for part in name.split("/"))
    }


def _local_files(root: str, recursive: bool) -> Iterator[tuple[str, int]]:
    """Yield what :func:`list_files` lists, in any order: fsspec takes a folder without permission for an empty one."""
    folders = [""]
    for folder in folders:  # grows
        with os.scandir(f"{root}/{folder}") as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if entry.is_dir(follow_symlinks=False):
                    folders += [f"{folder}{entry.name}/"] * recursive
                elif entry.is_symlink() or entry.is_file():
                    yield f"{folder}{entry.name}", _size(entry)


def _size(entry: os.DirEntry[str]) -> int:
    try:
        return entry.stat().st_size
    except OSError:  # a link to nothing
        return 0


def file_stamps(urls: Sequence[str]) -> Iterator[str]:
    """Yield of each file a text that changes with its content: its size and time of change, or a store's tag.

    That of a file that does not exist, such as a dead link, is ``missing``.
    """
    with ThreadPoolExecutor(THREADS) as threads:
        remote = threads.map(_remote_stamp, [url for url in urls if not storage.is_local(url)])
        yield from (_local_stamp(url) if storage.is_local(url) else next(remote) for url in urls)


def _local_stamp(path: str) -> str:
    try:
        about = os.stat(path)  # of the file that a link leads to
    except OSError:
        return "missing"
    return f"{about.st_size} {about.st_mtime_ns}"


def _remote_stamp(url: str) -> str:
    fs, path = storage.filesystem(url)
    try:
        entry = storage.retry(lambda: fs.info(path))
    except FileNotFoundError:
        return "missing"
    return f"{entry.get('size')} {next((entry[tag] for tag in CONTENT_TAGS if entry.get(tag)), None)}"


def read_files(folder: str, names: Sequence[str]) -> list[bytes | None]:
    """Read files of ``folder`` by their paths relative to it, several at a time.

    None for one that does not exist, and for one on a local disk without permission to read it.
    Of a file over :data:`.images.MAX_IMAGE_BYTES` one byte more than that is read. All are in memory together: callers
    ask for up to :data:`AT_ONCE`.
    """
    with ThreadPoolExecutor(THREADS) as threads:
        return list(threads.map(partial(_read, folder), names))


def _read(folder: str, name: str) -> bytes | None:
    if not name or "\0" in name:
        return None
    fs, root = storage.filesystem(folder)
    try:
        # Not by a URL: in one, a file's name may have a meaning of its own.
        with storage.retry(lambda: fs.open(f"{root}/{name}", "rb")) as stream:
            return bytes(stream.read(MAX_IMAGE_BYTES + 1))
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        return None
    except PermissionError:
        if storage.is_local(folder):
            return None
        raise  # by a store, which would refuse all of them
    except OSError as error:
        if error.errno in (errno.ENAMETOOLONG, errno.ELOOP):
            return None
        raise
