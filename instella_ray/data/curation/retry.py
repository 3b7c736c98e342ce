"""Another try of the downloads of a finished run that failed for reasons of the network."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import pyarrow as pa

from ... import storage
from ..formats.parts import UNREACHED, PartFolder, is_of_network, retry_label
from ..formats.rows import blocks
from ..stages import Source


def retry_sources(folder: PartFolder, rows_per_block: int) -> dict[str, Source]:
    """Return a source of the rows of each shard that are to be tried again, by the label of that try.

    These are the rows in :data:`..formats.parts.UNREACHED`, of parts whose shards have not been tried again yet.
    """
    parts = folder.parts()
    tried = {part.shard for part in parts}
    names: dict[str, list[str]] = defaultdict(list)
    for part in parts:
        if retry_label(part.shard) not in tried and any(map(is_of_network, part.ledger["dropped"])):
            names[part.shard].append(storage.join(folder.url, UNREACHED, f"{part.name}.parquet"))
    return {
        retry_label(shard): partial(_tables, urls, retry_label(shard), rows_per_block) for shard, urls in names.items()
    }


def _tables(urls: Sequence[str], label: str, rows_per_block: int) -> Iterator[pa.Table]:
    return blocks(_rows(urls, label), rows_per_block)


def _rows(urls: Sequence[str], label: str) -> Iterator[dict[str, Any]]:
    given = (row for url in urls for row in storage.read_parquet(url).to_pylist())
    for number, row in enumerate(given):
        yield {**row, "shard": label, "row": number, "image": None, "problem": None}
