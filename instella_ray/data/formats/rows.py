"""What every source of samples gives: rows of one schema, under the same rules for keys, captions and images."""

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
"""``row`` counts a shard's samples from 0 without gaps, bad ones too; ``last`` marks the shard's final row.

``problem`` is a ledger reason, empty for a good sample; ``meta`` a JSON object as text.
"""

BLOCK_BYTES = 128 << 20
"""Images, or their pixels, that are in work together: what Ray Data aims at."""


def blocks(rows: Iterable[dict[str, Any]], rows_per_block: int) -> Iterator[pa.Table]:
    """Rows of one shard as tables of :data:`SCHEMA`, the final row marked as ``last``.

    A table has ``rows_per_block`` rows, or fewer where their images reach :data:`BLOCK_BYTES`.
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
