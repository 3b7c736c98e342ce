"""Files of a folder, local or on any fsspec filesystem: listing them, and reading images among them by name."""

from __future__ import annotations

import errno
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from ... import storage
from .images import MAX_IMAGE_BYTES

AT_ONCE, THREADS = 64, 16
"""Files to ask for at once, and threads that read them."""


def list_files(folder: str, *, recursive: bool = True) -> dict[str, int]:
    """Map the paths of the files in a folder, relative to it and sorted, to their sizes (bytes).

    Hidden files and folders are left out, and folders that are links, which may form a circle.
    """
    fs, root = storage.filesystem(folder)
    depth = None if recursive else 1
    found = storage.retry(lambda: fs.find(root, maxdepth=depth, detail=True)) if fs.isdir(root) else {}
    names = {path[len(root) :].strip("/"): entry for path, entry in found.items()}
    return {
        name: int(entry.get("size") or 0)
        for name, entry in sorted(names.items())
        if (entry["type"] == "file" or entry.get("islink")) and not any(part[0] == "." for part in name.split("/"))
    }


def read_files(folder: str, names: Sequence[str]) -> list[bytes | None]:
    """Read files of ``folder`` by their paths relative to it, several at a time; None for one that does not exist.

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
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            return None
        raise
