"""Schema of the rows that all sources of samples yield, and their grouping into tables."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import pyarrow as pa

SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("shard", pa.string()),
        ("row", pa.int64()),
        ("image", pa.large_binary()),
        ("caption", pa.string()),
        ("meta", pa.string()),
        ("problem", pa.string()),
        ("last", pa.bool_()),
    ]
)
"""Columns of a sample.

``row`` counts the samples of a shard from 0 without gaps, invalid ones included; ``last`` marks the final row of the
shard. ``problem`` is a ledger reason, null for a valid sample; ``meta`` is a JSON object as text.
"""

BLOCK_BYTES = 128 << 20
"""Size of the images, or their pixels, at which a table ends (bytes): the target block size of Ray Data."""


def blocks(rows: Iterable[dict[str, Any]], rows_per_block: int) -> Iterator[pa.Table]:
    """Group the rows of one shard into tables of :data:`SCHEMA`, and mark the final row as ``last``.

    A table has ``rows_per_block`` rows, or fewer if their images reach :data:`BLOCK_BYTES`.
    """
    block, size = list[dict[str, Any]](), 0
    for row in _with_last(rows):
        block.append(row)
        size += len(row["image"] or b"")
        if row["last"] or len(block) == rows_per_block or size >= BLOCK_BYTES:
            yield pa.Table.from_pylist(block, SCHEMA)
            block, size = [], 0


def _with_last(rows: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    iterator = iter(rows)
    held = next(iterator)
    for row in iterator:
        yield {**held, "last": False}
        held = row
    yield {**held, "last": True}
