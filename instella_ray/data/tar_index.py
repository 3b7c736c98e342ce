"""Where in a tar its pictures lie, so that any of them can be read without the rest."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from .. import storage
from .tar_source import read_samples

INDEX = "index"
SCHEMA = pa.schema([("key", pa.string()), ("offset", pa.int64()), ("bytes", pa.int64())])
"""One row a usable picture, in the tar's order: its bytes are ``[offset, offset + bytes)``."""


def index_url(shard: str) -> str:
    """Where the index of a tar is kept: ``index/NAME.parquet`` beside it."""
    folder, name = os.path.split(shard)
    return storage.join(folder, INDEX, f"{name.removesuffix('.tar')}.parquet")


def read_index(shard: str) -> pa.Table:
    """The index of a tar, as :data:`SCHEMA`: from its file where there is one, else by reading the tar to its end."""
    url = index_url(shard)
    if storage.exists(url):
        return storage.read_parquet(url, schema=SCHEMA)
    return scan_index(shard)


def write_index(shard: str, rows: Sequence[dict[str, Any]]) -> None:
    """Write rows of :data:`SCHEMA` as the index of a tar."""
    storage.write_parquet(index_url(shard), pa.Table.from_pylist(list(rows), SCHEMA))


def scan_index(shard: str) -> pa.Table:
    """The index by reading the tar: samples that nothing is wrong with."""
    with storage.open_file(shard) as stream:
        found = [
            {"key": row["key"], "offset": row["offset"], "bytes": len(row["image"])}
            for row in read_samples(stream, shard)
            if row["image"] and not row["problem"]
        ]
    return pa.Table.from_pylist(found, SCHEMA)


def read_ranges(shards: Sequence[str], offsets: Sequence[int], sizes: Sequence[int]) -> list[bytes]:
    """The bytes at ``[offset, offset + size)`` of each shard; at once where the storage can. All lie in one filesystem."""
    fs, _ = storage.filesystem(shards[0])
    paths = [storage.filesystem(shard)[1] for shard in shards]
    ends = [offset + size for offset, size in zip(offsets, sizes, strict=True)]
    found: list[bytes] = storage.retry(lambda: fs.cat_ranges(paths, list(offsets), ends, on_error="raise"))
    return found
