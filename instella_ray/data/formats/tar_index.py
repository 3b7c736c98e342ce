"""Indexes of tars: offsets, sizes and captions of their images, for random access."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from ... import storage
from .parts import INDEX
from .tar_source import read_samples
from .texts import both_captions

PLACES = pa.schema([("key", pa.string()), ("offset", pa.int64()), ("bytes", pa.int64())])
"""Position of a usable image: its bytes are ``[offset, offset + bytes)``. One row per image, in the order of the tar."""
SCHEMA = pa.schema([*PLACES, ("caption_long", pa.string()), ("caption_short", pa.string())])
"""Columns of an index: positions and captions."""


def index_url(shard: str) -> str:
    """Return the URL of the index of a tar: ``index/NAME.parquet`` beside it."""
    folder, name = os.path.split(shard)
    return storage.join(folder, INDEX, f"{name.removesuffix('.tar')}.parquet")


def read_index(shard: str, *, captions: bool = False) -> pa.Table:
    """Return the index of a tar, as :data:`PLACES`, or :data:`SCHEMA` with ``captions``.

    Reads the index file if it exists and has these columns, else the whole tar.
    """
    url, schema = index_url(shard), SCHEMA if captions else PLACES
    if storage.exists(url):
        table = storage.read_parquet(url, schema=schema)
        if not captions or not table["caption_long"].null_count:  # null if the file has no such column
            return table
    return scan_index(shard).select(schema.names)


def write_index(shard: str, rows: Sequence[dict[str, Any]]) -> None:
    """Write rows of :data:`SCHEMA` as the index of a tar."""
    storage.write_parquet(index_url(shard), pa.Table.from_pylist(list(rows), SCHEMA))


def scan_index(shard: str) -> pa.Table:
    """Build the index by reading the whole tar; only samples with an image and without a problem."""
    with storage.open_file(shard) as stream:
        found = [
            index_row(row["key"], row["offset"], row["image"], row["caption"], json.loads(row["meta"]))
            for row in read_samples(stream, shard)
            if row["image"] and not row["problem"]
        ]
    return pa.Table.from_pylist(found, SCHEMA)


def index_row(key: str, offset: int, image: bytes, caption: str, meta: Mapping[str, Any]) -> dict[str, Any]:
    """Build a row of :data:`SCHEMA`."""
    return {"key": key, "offset": offset, "bytes": len(image), **both_captions(caption, meta)}


def read_ranges(shards: Sequence[str], offsets: Sequence[int], sizes: Sequence[int]) -> list[bytes]:
    """Read the bytes ``[offset, offset + size)`` of each shard, concurrently if the storage supports it.

    All shards must be in the same filesystem.
    """
    fs, _ = storage.filesystem(shards[0])
    paths = [storage.filesystem(shard)[1] for shard in shards]
    ends = [offset + size for offset, size in zip(offsets, sizes, strict=True)]
    found: list[bytes] = storage.retry(lambda: fs.cat_ranges(paths, list(offsets), ends, on_error="raise"))
    return found
