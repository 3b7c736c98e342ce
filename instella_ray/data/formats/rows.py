"""What every source of samples gives: rows of one schema, under the same rules for keys, captions and images."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
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

MAX_IMAGE_BYTES = 64 << 20
"""Images above this size are not read: none of a training set is so large."""
BLOCK_BYTES = 128 << 20
"""Images, or their pixels, that are in work together: what Ray Data aims at."""


class Keys:
    """The keys of one shard as they come, and what is wrong with each."""

    def __init__(self) -> None:
        self._seen: set[str] = set()

    def problem(self, key: str) -> str | None:
        """``unsafe_name`` for a key that leads out of a folder, ``duplicate_key`` for one that was here before."""
        if key.startswith("/") or ".." in key.split("/"):
            return "unsafe_name"
        if key in self._seen:
            return "duplicate_key"
        self._seen.add(key)
        return None


def clean_text(data: bytes) -> str:
    """UTF-8 on one line: captions with line breaks or NUL bytes become plain words."""
    return " ".join(data.decode("utf-8", "replace").replace("\0", " ").split())


def json_object(text: str) -> dict[str, Any] | None:
    """The object that ``text`` holds, if it does."""
    try:
        value = json.loads(text)
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode()  # half of a surrogate pair is no text to Arrow
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def both_captions(caption: str, meta: Mapping[str, Any]) -> dict[str, str]:
    """``caption_long`` and ``caption_short`` of a sample; its one caption stands in for what ``meta`` does not have."""
    given = {name: meta.get(name) for name in ("caption_long", "caption_short")}
    return {name: text if isinstance(text, str) and text else caption for name, text in given.items()}


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
