"""Sources of samples: WebDataset tars and parquet files, read as tables of :data:`.rows.SCHEMA`.

Ray's readers decode images while reading, so that one corrupt image fails a whole shard. These readers keep images as
bytes, and report problems of a sample in the column ``problem``, which the ledger counts.
"""

from __future__ import annotations

import logging
import math
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
from .names import find_shards, refuse_twins
from .parquet_source import Footer, read_footer, read_parquet, row_count
from .rows import blocks, problem_row
from .tar_source import count_samples, read_samples
from .texts import CAPTION_NAMES
from .time_limit import OutOfTimeError, within

SUFFIXES = (".tar", ".parquet")
"""Extensions of shards; of a folder with both, the tars are read."""
ROWS_PER_SHARD = 100_000
"""Rows above which a parquet file is split into several shards, which limits the work to redo after a kill."""
log = logging.getLogger(__name__)
_CUT = re.compile(r"(?P<url>.+\.parquet)#rows=(?P<first>\d+)-(?P<end>\d+)")


class Inputs(NamedTuple):
    """Input shards of a job."""

    shards: dict[str, str]
    """URL -> label, for :func:`shard_sources`. The URLs of a split parquet file end with their row range."""
    links: tuple[str, ...]
    """URLs of the shards whose images have to be downloaded."""


def find_inputs(
    pattern: str, *, rows_per_shard: int = ROWS_PER_SHARD, caption_keys: Sequence[str] = CAPTION_NAMES
) -> Inputs:
    """Find the shards that match ``pattern`` (:func:`.names.find_shards`), reading the footers of parquet files.

    Raises UserError as :func:`.names.find_shards`, and for a parquet file without images, links or captions, naming its
    columns.
    """
    found = find_shards(pattern, SUFFIXES)
    files = [url for url in found if url.endswith(".parquet")]
    with ThreadPoolExecutor(32) as threads:
        footers = dict(zip(files, threads.map(partial(_footer, caption_keys=caption_keys), files), strict=True))
    shards: dict[str, str] = {}
    links: list[str] = []
    for url, label in found.items():
        footer = footers.get(url)
        parts = _cut(url, label, footer.rows if footer else 0, rows_per_shard)
        shards |= parts
        links += parts if footer and footer.columns.link else []
    refuse_twins(list(shards.values()))
    return Inputs(shards, tuple(links))


def find_images(pattern: str, caption_keys: Sequence[str] = CAPTION_NAMES) -> dict[str, str]:
    """Find the shards of a job that needs images, as :func:`find_inputs`; UserError for shards of links only."""
    inputs = find_inputs(pattern, caption_keys=caption_keys)
    if inputs.links:
        raise _links_without_images(inputs.links[0])
    return inputs.shards


def refuse_links(urls: Iterable[str]) -> None:
    """Raise UserError for one of these parquet files with links in the place of images; others are ignored if damaged."""
    for url in urls:
        if (footer := _footer(url, captions=False)) and footer.columns.link:
            raise _links_without_images(url)


def shard_sources(
    shards: Mapping[str, str],
    rows_per_block: int,
    *,
    caption_keys: Sequence[str] = CAPTION_NAMES,
    time_limit_s: float = math.inf,
) -> dict[str, Source]:
    """Return a source (:func:`read_blocks`) for each shard of ``shards`` (URL -> label), by label."""
    read = partial(read_blocks, caption_keys=caption_keys, time_limit_s=time_limit_s)
    return {label: partial(read, url, label, rows_per_block) for url, label in shards.items()}


def read_blocks(
    url: str,
    label: str,
    rows_per_block: int,
    *,
    caption_keys: Sequence[str] = CAPTION_NAMES,
    time_limit_s: float = math.inf,
) -> Iterator[pa.Table]:
    """Yield the tables of one shard, of up to ``rows_per_block`` consecutive rows.

    After a transient storage error, reading continues after those already yielded. A shard that takes longer to read
    than ``time_limit_s``, without the time in which its tables are processed, ends with a row whose problem is
    ``time_limit``.
    """
    tables = storage.retry_iter(lambda: blocks(read_rows(url, label, caption_keys=caption_keys), rows_per_block))
    number = 0
    try:
        for table in within(tables, time_limit_s):
            yield table
            number += table.num_rows
    except OutOfTimeError:
        log.warning("%s: not read within %g s, given up after %d samples", url, time_limit_s, number)
        yield from blocks([problem_row(label, number, "time_limit")], 1)


def read_rows(
    url: str, label: str, *, captions: bool = True, caption_keys: Sequence[str] = CAPTION_NAMES
) -> Iterator[dict[str, Any]]:
    """Yield the rows of one shard, tar or parquet, in order: the columns of :data:`.rows.SCHEMA` without ``last``.

    With ``captions``, a parquet file must have a column of captions.
    """
    cut = _CUT.fullmatch(url)
    path = cut["url"] if cut else url
    first, end = (int(cut["first"]), int(cut["end"])) if cut else (0, None)
    with storage.open_file(path) as stream:
        if path.endswith(".parquet"):
            yield from read_parquet(stream, label, path, first, end, captions=captions, caption_keys=caption_keys)
        else:
            yield from read_samples(stream, label, path, caption_keys)


def count_rows(url: str) -> int:
    """Count the rows of a shard by its headers alone; an undercount if it is damaged."""
    with storage.open_file(url) as stream:
        return row_count(stream) if url.endswith(".parquet") else count_samples(stream, url)


def require_captions(
    urls: Sequence[str], caption_keys: Sequence[str] = CAPTION_NAMES, *, shards: int = 16, samples: int = 32
) -> None:
    """Raise UserError if the first ``samples`` samples of the first ``shards`` shards have images but no captions."""
    images = 0
    for url in urls[:shards]:
        rows = list(islice(read_rows(url, url, caption_keys=caption_keys), samples))
        if any(row["caption"] for row in rows):
            return
        # Also counts links: the problem no_caption is reported for them like for images.
        images += sum(row["problem"] in ("no_caption", "bad_caption") for row in rows)
    if images:
        expected = f"KEY.txt beside KEY.jpg, or one of {', '.join(caption_keys)} in KEY.json"
        if ".parquet" in urls[0]:
            expected = "text in the caption column"
        raise UserError(f"{urls[0]}: shard without captions; expected {expected}")


def _links_without_images(url: str) -> UserError:
    return UserError(f"{url}: links without images; curate first (jobs/curate.py), which downloads them")


def _footer(url: str, *, captions: bool = True, caption_keys: Sequence[str] = CAPTION_NAMES) -> Footer | None:
    with storage.open_file(url) as stream:
        return read_footer(stream, url, captions=captions, caption_keys=caption_keys)


def _cut(url: str, label: str, rows: int, rows_per_shard: int) -> dict[str, str]:
    """Split a file with ``rows`` rows into shards, URL -> label, of at most ``rows_per_shard`` rows."""
    if rows <= rows_per_shard:
        return {url: label}
    starts = range(0, rows, rows_per_shard)
    return {f"{url}#rows={first}-{min(first + rows_per_shard, rows)}": f"{label}__{first:09d}" for first in starts}
