"""WebDataset tars, written the way img2dataset writes them: ``KEY.jpg|png``, ``KEY.txt`` (caption), ``KEY.json``."""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

from .. import storage
from ..errors import UserError
from .parts import refuse_unfinished
from .tar_index import index_url, write_index

Sample = tuple[str, bytes, str, dict[str, Any]]
"""(key, encoded picture, caption, metadata)."""


def find_shards(pattern: str, suffix: str = ".tar") -> dict[str, str]:
    """URL -> short unique name of the tars that ``pattern`` names, sorted; at least one. Or of files that end otherwise.

    A pattern is a path, a glob, a folder (all its tars), or several of these with commas between. UserError for a part
    that names nothing, and for a folder whose curation is not finished.
    """
    found: set[str] = set()
    for part in (text.strip() for text in pattern.split(",")):
        fs, path = storage.filesystem(part)
        folder = fs.isdir(path)
        refuse_unfinished(part if folder else os.path.dirname(part))
        urls = [
            url for url in storage.glob(storage.join(part, f"*{suffix}") if folder else part) if url.endswith(suffix)
        ]
        if not urls:
            kind = "WebDataset tars" if suffix == ".tar" else f"{suffix} files"
            raise UserError(f"{part}: no shard found; expected {kind}, for example 'data/*{suffix}'")
        found.update(urls)
    return _named(sorted(found), suffix)


def _named(urls: list[str], suffix: str) -> dict[str, str]:
    """Names are paths below the folder that all share, with slashes replaced: they become file names."""
    shared = os.path.commonpath([os.path.dirname(url) for url in urls])
    names = [url[len(shared) :].strip("/").removesuffix(suffix).replace("/", "__") for url in urls]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"two shards would both be called '{twice}'; rename one of them")
    return dict(zip(urls, names, strict=True))


def write_tar(url: str, samples: Iterable[Sample]) -> int:
    """Write one shard and its index, whole or not at all, the same bytes for the same samples. Returns their number."""
    index: list[dict[str, Any]] = []
    with storage.open_file(url, "wb") as stream, tarfile.open(fileobj=stream, mode="w|") as tar:
        for key, image, caption, meta in samples:
            _add(tar, f"{key}.{image_extension(image)}", image)
            # What was just added ends here, filled up to whole blocks.
            index.append({"key": key, "offset": tar.offset - -len(image) // 512 * -512, "bytes": len(image)})
            _add(tar, f"{key}.txt", caption.encode())
            _add(tar, f"{key}.json", json.dumps(meta, sort_keys=True).encode())
    write_index(url, index)
    return len(index)


def remove_shard(url: str) -> None:
    """Delete a tar and its index, where they are."""
    storage.remove_tree(url)
    storage.remove_tree(index_url(url))


def write_samples(url: str, rows: Iterable[dict[str, Any]]) -> int:
    """:func:`write_tar` of rows with ``key, image, caption`` and ``meta`` (JSON)."""
    return write_tar(url, ((row["key"], row["image"], row["caption"], json.loads(row["meta"])) for row in rows))


def write_webdataset(samples: Iterable[Sample], folder: str, samples_per_shard: int) -> Iterator[tuple[str, int]]:
    """Write ``samples`` as ``folder/00000.tar``, ...; yields (url, samples in it) as each shard is finished."""
    rest, number = iter(samples), 0
    while part := list(islice(rest, samples_per_shard)):
        url = storage.join(folder, f"{number:05d}.tar")
        yield url, write_tar(url, part)
        number += 1


def image_extension(image: bytes) -> str:
    """``png``, ``webp`` or ``jpg``, by the first bytes."""
    if image.startswith(b"\x89PNG"):
        return "png"
    return "webp" if image[8:12] == b"WEBP" else "jpg"


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))
