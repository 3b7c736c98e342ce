"""Schema of the rows that all sources of samples yield, and their grouping into tables."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import pyarrow as pa

MEMBERS = pa.list_(
    pa.struct(
        [
            ("name", pa.string()),
            ("extension", pa.string()),
            ("size", pa.int64()),
            ("data", pa.large_binary()),
        ]
    )
)
"""Type of further members of a tar: full name, extension, size (bytes), and the data, null if it was not read."""
SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("shard", pa.string()),
        ("row", pa.int64()),
        ("image", pa.large_binary()),
        ("caption", pa.string()),
        ("meta", pa.string()),
        ("members", MEMBERS),
        ("problem", pa.string()),
        ("last", pa.bool_()),
    ]
)
"""Columns of a sample.

``row`` counts the samples of a shard from 0 without gaps, invalid ones included; ``last`` marks the final row of the
shard. ``problem`` is a ledger reason, null for a valid sample; ``meta`` is a JSON object as text. ``members`` are those of
a tar that ``image``, ``caption`` and ``meta`` do not hold: further files of a valid sample, all but the image of others.
"""

BLOCK_BYTES = 128 << 20
"""Size of the images, or their pixels, at which a table ends (bytes): the target block size of Ray Data."""


def blocks(rows: Iterable[dict[str, Any]], rows_per_block: int) -> Iterator[pa.Table]:
    """Group the rows of one shard into tables of :data:`SCHEMA`, and mark the final row as ``last``.

    A table has ``rows_per_block`` rows, or fewer if their files reach :data:`BLOCK_BYTES`.
    """
    block, size = list[dict[str, Any]](), 0
    for row in _with_last(rows):
        block.append(row)
        size += len(row["image"] or b"") + sum(len(member["data"] or b"") for member in row.get("members") or ())
        if row["last"] or len(block) == rows_per_block or size >= BLOCK_BYTES:
            yield pa.Table.from_pylist(block, SCHEMA)
            block, size = [], 0


def problem_row(shard: str, number: int, problem: str) -> dict[str, Any]:
    """Return a row that stands for the shard rather than for a sample of it."""
    values = {"key": "", "shard": shard, "row": number, "problem": problem}
    return {**values, "image": None, "caption": None, "meta": "{}"}


def _with_last(rows: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    iterator = iter(rows)
    held = next(iterator)
    for row in iterator:
        yield {**held, "last": False}
        held = row
    yield {**held, "last": True}
