"""Sources of samples: WebDataset tars and parquet files, read as tables of :data:`.rows.SCHEMA`.

Ray's readers decode images while reading, so that one corrupt image fails a whole shard. These readers keep images as
bytes, and report problems of a sample in the column ``problem``, which the ledger counts.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

import pyarrow as pa

from ... import storage
from ...errors import UserError
from ..stages import Source
from .names import find_shards
from .parquet_source import Footer, problem_row, read_footer, read_parquet, row_count
from .parts import LOST
from .patterns import Pattern, file_name
from .rows import blocks
from .tar_source import count_samples, read_samples

SUFFIXES = (".tar", ".parquet")
"""Extensions of shards; of a folder with both, the tars are read."""
ROWS_PER_SHARD = 100_000
"""Rows above which a parquet file is split into several shards, which limits the work to redo after a kill."""
_CUT = re.compile(r"(?P<url>.+)#rows=(?P<first>\d+)-(?P<end>\d+)")


class Inputs(NamedTuple):
    """Input shards of a job."""

    shards: dict[str, str]
    """URL -> label, for :func:`shard_sources`. The URLs of a split parquet file end with their row range."""
    links: tuple[str, ...]
    """URLs of the shards whose images have to be downloaded."""


def find_inputs(pattern: Pattern, *, output: str | None = None, rows_per_shard: int = ROWS_PER_SHARD) -> Inputs:
    """Find the shards that match ``pattern`` (:func:`.names.find_shards`), reading the footers of parquet files.

    The folder ``output``, that of the job itself, is no part of its input. Raises UserError as
    :func:`.names.find_shards`, and for a parquet file without images, links or captions, naming its columns.
    """
    found = find_shards(pattern, SUFFIXES, output=output)
    files = [url for url in found if _is_parquet(url)]
    with ThreadPoolExecutor(32) as threads:
        footers = dict(zip(files, threads.map(_footer, files), strict=True))
    shards: dict[str, str] = {}
    links: list[str] = []
    for url, label in found.items():
        footer = footers.get(url)
        parts = _cut(url, label, footer.rows if footer else 0, rows_per_shard)
        shards |= parts
        links += parts if footer and footer.columns.link else []
    return Inputs(shards, tuple(links))


def find_images(pattern: Pattern, *, output: str | None = None) -> dict[str, str]:
    """Find the shards of a job that needs images, as :func:`find_inputs`; UserError for shards of links only."""
    inputs = find_inputs(pattern, output=output)
    if inputs.links:
        raise _links_without_images(inputs.links[0])
    return inputs.shards


def refuse_links(urls: Iterable[str]) -> None:
    """Raise UserError for one of these parquet files with links in the place of images; others are ignored if damaged."""
    for url in urls:
        if (footer := _footer(url, captions=False)) and footer.columns.link:
            raise _links_without_images(url)


def shard_sources(shards: Mapping[str, str], rows_per_block: int) -> dict[str, Source]:
    """Return a source for each shard of ``shards`` (URL -> label), by label.

    Tables have up to ``rows_per_block`` consecutive rows (:func:`read_blocks`).
    """
    return {label: partial(read_blocks, url, label, rows_per_block) for url, label in shards.items()}


def read_blocks(url: str, label: str, rows_per_block: int) -> Iterator[pa.Table]:
    """Yield the tables of one shard; after a transient storage error, reading continues after those already yielded."""
    return storage.retry_iter(lambda: blocks(read_rows(url, label), rows_per_block))


def read_rows(url: str, label: str, *, captions: bool = True) -> Iterator[dict[str, Any]]:
    """Yield the rows of one shard, tar or parquet, in order: the columns of :data:`.rows.SCHEMA` without ``last``.

    With ``captions``, a parquet file must have a column of captions. A shard that no longer exists ends with a row whose
    problem is ``lost_shard``.
    """
    number = 0
    try:
        for row in _rows(url, label, captions):
            yield row
            number += 1
    except (storage.MissingFileError, FileNotFoundError):
        yield problem_row(label, number, LOST)


def _rows(url: str, label: str, captions: bool) -> Iterator[dict[str, Any]]:
    cut = _CUT.fullmatch(url)
    path = cut["url"] if cut else url
    with storage.open_file(path) as stream:
        if cut:
            yield from read_parquet(stream, label, path, int(cut["first"]), int(cut["end"]), captions=captions)
        elif _is_parquet(path):
            yield from read_parquet(stream, label, path, captions=captions)
        else:
            yield from read_samples(stream, label)


def count_rows(url: str) -> int:
    """Count the rows of a shard by its headers alone; an undercount if it is damaged."""
    with storage.open_file(url) as stream:
        return row_count(stream) if _is_parquet(url) else count_samples(stream)


def require_captions(urls: Sequence[str], *, shards: int = 16, samples: int = 32) -> None:
    """Raise UserError if the first ``samples`` samples of the first ``shards`` shards have images but no captions."""
    images = 0
    for url in urls[:shards]:
        rows = list(islice(read_rows(url, url), samples))
        if any(row["caption"] for row in rows):
            return
        # Also counts links: the problem no_caption is reported for them like for images.
        images += sum(row["problem"] in ("no_caption", "bad_caption") for row in rows)
    if images:
        expected = "KEY.txt (or 'caption' in KEY.json) beside KEY.jpg"
        if _CUT.fullmatch(urls[0]) or _is_parquet(urls[0]):
            expected = "text in the caption column"
        raise UserError(f"{urls[0]}: shard without captions; expected {expected}")


def _links_without_images(url: str) -> UserError:
    return UserError(f"{url}: links without images; curate first (jobs/curate.py), which downloads them")


def _is_parquet(url: str) -> bool:
    return file_name(url).endswith(".parquet")


def _footer(url: str, *, captions: bool = True) -> Footer | None:
    try:
        with storage.open_file(url) as stream:
            return read_footer(stream, url, captions=captions)
    except storage.MissingFileError:
        return None  # its rows will say so


def _cut(url: str, label: str, rows: int, rows_per_shard: int) -> dict[str, str]:
    """Split a file with ``rows`` rows into shards, URL -> label, of at most ``rows_per_shard`` rows."""
    if rows <= rows_per_shard:
        return {url: label}
    starts = range(0, rows, rows_per_shard)
    return {f"{url}#rows={first}-{min(first + rows_per_shard, rows)}": f"{label}__{first:09d}" for first in starts}
