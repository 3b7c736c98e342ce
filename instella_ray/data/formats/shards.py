"""WebDataset tar writer, in img2dataset's layout: ``KEY.jpg``, ``KEY.txt`` (caption), ``KEY.json`` (metadata)."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

from ... import storage
from .containers import file_extension
from .tar_index import index_row, index_url, write_index

Sample = tuple[str, bytes, str, dict[str, Any]]
"""(key, encoded image, caption, metadata)."""


def write_tar(url: str, samples: Iterable[Sample]) -> int:
    """Write one shard and its index, atomically and reproducibly to the byte; returns the number of samples."""
    index: list[dict[str, Any]] = []
    with storage.open_file(url, "wb") as stream, tarfile.open(fileobj=stream, mode="w|") as tar:
        for key, image, caption, meta in samples:
            _add(tar, f"{key}.{file_extension(image)}", image)
            # tar.offset is the end of the image, padded to whole blocks.
            index.append(index_row(key, tar.offset - -len(image) // 512 * -512, image, caption, meta))
            _add(tar, f"{key}.txt", caption.encode())
            _add(tar, f"{key}.json", json.dumps(meta, sort_keys=True).encode())
    write_index(url, index)
    return len(index)


def remove_shard(url: str) -> None:
    """Delete a tar and its index, if they exist."""
    storage.remove_tree(url)
    storage.remove_tree(index_url(url))


def write_samples(url: str, rows: Iterable[dict[str, Any]]) -> int:
    """Write rows with ``key, image, caption`` and ``meta`` (JSON) by :func:`write_tar`."""
    return write_tar(url, ((row["key"], row["image"], row["caption"], json.loads(row["meta"])) for row in rows))


def write_webdataset(samples: Iterable[Sample], folder: str, samples_per_shard: int) -> Iterator[tuple[str, int]]:
    """Write ``samples`` as ``folder/00000.tar``, ...; yields (url, number of samples) of each finished shard."""
    rest, number = iter(samples), 0
    while part := list(islice(rest, samples_per_shard)):
        url = storage.join(folder, f"{number:05d}.tar")
        yield url, write_tar(url, part)
        number += 1


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))
