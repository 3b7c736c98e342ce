"""Sources of samples: tars, parquet files, tables as text and folders of images, read as tables of :data:`.rows.SCHEMA`.

Ray's readers decode images while reading, so that one corrupt image fails a whole shard. These readers keep images as
bytes, and report problems of a sample in the column ``problem``, which the ledger counts.
"""

from __future__ import annotations

import logging
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice, pairwise
from typing import Any, NamedTuple

import pyarrow as pa

from ... import storage
from ...errors import UserError
from ..stages import Source
from .columns import Columns
from .files import list_files
from .folder_source import FILES_PER_SHARD, METADATA_FILES, SAMPLE_ENDINGS, FolderShard, folder_shards, read_folder
from .names import Found, ShardEntry, image_extension, refuse_twins, resolve, split_extension
from .parquet_source import Footer, read_footer, read_parquet, row_count
from .parts import LOST
from .patterns import Pattern, expand_part, file_name, is_http, shard_label, split_pattern
from .rows import blocks, problem_row
from .table_source import TABLES, TableScan, read_table, scan_table
from .tar_source import count_samples, read_samples
from .texts import CAPTION_NAMES
from .time_limit import OutOfTimeError, within

SUFFIXES = (".tar", ".parquet")
"""Extensions of shards; of a folder with both, the tars are read."""
ROWS_PER_SHARD = 100_000
"""Rows above which a parquet file or a table is split into several shards, which limits the work to redo after a kill."""
_CUT = re.compile(r"(?P<url>.+)#(rows|bytes)=(?P<first>\d+)-(?P<end>\d+)")
log = logging.getLogger(__name__)
Scan = Callable[[str], TableScan | None]
"""Reads a table, given by its URL."""


class Inputs(NamedTuple):
    """Input shards of a job."""

    shards: dict[str, str]
    """URL -> label, for :func:`shard_sources`. The URLs of parts of a file or a folder end with what part it is."""
    links: tuple[str, ...]
    """URLs of the shards whose images have to be downloaded."""


def find_inputs(
    pattern: Pattern,
    *,
    output: str | None = None,
    rows_per_shard: int = ROWS_PER_SHARD,
    files_per_shard: int = FILES_PER_SHARD,
    caption_keys: Sequence[str] = CAPTION_NAMES,
    captions: bool = True,
) -> Inputs:
    """Find the shards that ``pattern`` stands for, reading the footers of parquet files and the whole of other tables.

    A folder stands for its list of shards, else its tars, else its parquet files, else the images in it and below it
    (:mod:`.folder_source`). The folder ``output``, that of the job itself, is no part of its input. Every label is a
    function of its shard's URL alone. Raises UserError as :func:`.names.resolve`, and for a table without images, links or,
    with ``captions``, captions, naming its columns.
    """
    found = _find(pattern, output)
    with ThreadPoolExecutor(32) as threads:
        scan = partial(_scan, rows_per_shard=rows_per_shard, caption_keys=caption_keys, captions=captions)
        cut = partial(_file_inputs, scan, rows_per_shard, caption_keys, captions)
        parts = list(threads.map(cut, [entry.url for entry in found.files]))
    for root, files in found.folders.items():
        parts.append(_folder_inputs(root, files, scan, files_per_shard))
    shards = {url: label for part in parts for url, label in part.shards.items()}
    refuse_twins(list(shards.values()))
    return Inputs(shards, tuple(dict.fromkeys(url for part in parts for url in part.links)))


def list_inputs(pattern: Pattern, *, output: str | None = None) -> list[ShardEntry]:
    """List the files of :func:`find_inputs` with their sizes."""
    found = _find(pattern, output)
    of_folders = [(f"{root}/{name}", size) for root, files in found.folders.items() for name, size in files.items()]
    return [*found.files, *(ShardEntry(url=url, bytes=size) for url, size in of_folders)]


class Files(NamedTuple):
    """Files that a pattern stands for."""

    read: list[str]
    """URLs of shards, tables, images and what is beside images, in folders or named by tables."""
    left_out: Counter[str]
    """Number of files of folders that are not read, by ending, as ``.heic``, and of ``linked folder``."""


def find_images(
    pattern: Pattern, caption_keys: Sequence[str] = CAPTION_NAMES, *, output: str | None = None, **options: Any
) -> dict[str, str]:
    """Find the shards of a job that needs images, as :func:`find_inputs`; UserError for shards of links only."""
    inputs = find_inputs(pattern, output=output, caption_keys=caption_keys, **options)
    if inputs.links:
        raise UserError(f"{inputs.links[0]}: links without images; curate first (jobs/curate.py), which downloads them")
    return inputs.shards


def list_image_files(pattern: Pattern, *, output: str | None = None) -> Files:
    """List the files that are read for the shards of :func:`find_images`, and count those of its folders that are not.

    Raises UserError for an image that two tables have, or a table and a folder of the pattern beside it.
    """
    found, left_out = _find(pattern, output), Counter[str]()
    read = [entry.url for entry in found.files]
    for root, files in found.folders.items():
        kept = [f for f in files if split_extension(f)[1] in SAMPLE_ENDINGS or file_name(f) in METADATA_FILES]
        read += [f"{root}/{name}" for name in kept]
        left_out.update(_reason(root, name) for name in set(files).difference(kept))
    parts = {each.rstrip("/") for part in split_pattern(pattern) for each in expand_part(part)}
    for folder in (part for part in parts - set(found.folders) if not is_http(part)):
        # A folder of shards, beside which images are not read.
        left_out.update(_reason(folder, name) for name in list_files(folder) if image_extension(name))
    # A folder's own tables take their images out of it; others name them once more.
    named = {entry.url for entry in found.files}
    images = dict.fromkeys((url for url in read if image_extension(url)), "a folder")
    described = dict[str, str]()
    for table in [url for url in read if _is_table(url)]:
        scan = _scan(table, ROWS_PER_SHARD, CAPTION_NAMES, captions=False)
        for path in filter(None, scan.paths if scan else ()):
            url = storage.join(table.rpartition("/")[0], path)
            if other := described.get(url) or (table in named and images.get(url)):
                raise UserError(f"{table} and {other}: both have {path}, which would be measured twice")
            described[url] = table
    read += described
    return Files(sorted(set(read)), left_out)


def _reason(root: str, name: str) -> str:
    """Say why a file is not read: it has another ending, or is a link to a folder."""
    if storage.is_local(root) and os.path.isdir(f"{root}/{name}"):
        return "linked folder"
    ending = split_extension(name)[1]
    return f".{ending}" if ending else "no ending"


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
    url: str, label: str, *, captions: bool = True, caption_keys: Sequence[str] = CAPTION_NAMES, skip: int = 0
) -> Iterator[dict[str, Any]]:
    """Yield the rows of one shard, in order, without the first ``skip``: the columns of :data:`.rows.SCHEMA` but ``last``.

    With ``captions``, a table must have a column of captions. A shard that no longer exists ends with a row whose
    problem is ``lost_shard``.
    """
    number = skip
    try:
        for row in _rows(url, label, captions, caption_keys, skip):
            yield row
            number += 1
    except (storage.MissingFileError, FileNotFoundError):
        yield problem_row(label, number, LOST)


def _rows(url: str, label: str, captions: bool, caption_keys: Sequence[str], skip: int) -> Iterator[dict[str, Any]]:
    if folder := FolderShard.parse(url):
        yield from islice(read_folder(folder, label, caption_keys), skip, None)
        return
    cut = _CUT.fullmatch(url)
    path = cut["url"] if cut else url
    part = (int(cut["first"]), int(cut["end"])) if cut else ()
    with storage.open_file(path) as stream:
        options: dict[str, Any] = {"captions": captions, "caption_keys": caption_keys}
        if _is_parquet(path):
            yield from islice(read_parquet(stream, label, path, *part, **options), skip, None)
        elif _is_table(path):
            yield from read_table(stream, label, path, *part, **options, skip=skip)
        else:
            yield from islice(read_samples(stream, label, path, caption_keys), skip, None)


def count_rows(url: str) -> int:
    """Count the rows of a tar or a parquet file by its headers alone, or of a table; an undercount if it is damaged."""
    with storage.open_file(url) as stream:
        if _is_table(url):
            return scan_table(stream, url, ROWS_PER_SHARD, captions=False).rows
        return row_count(stream) if _is_parquet(url) else count_samples(stream, url)


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
        named = f"one of {', '.join(caption_keys)}"
        expected = f"KEY.txt beside KEY.jpg, or {named} in KEY.json"
        if FolderShard.parse(urls[0]):
            expected = f"NAME.txt, NAME.caption or NAME.json beside NAME.jpg, or {' or '.join(METADATA_FILES)}"
        elif _CUT.fullmatch(urls[0]) or _is_parquet(urls[0]) or _is_table(urls[0]):
            expected = "text in the caption column"
        raise UserError(f"{urls[0].partition('#')[0]}: shard without captions; expected {expected}")


def _is_parquet(url: str) -> bool:
    return file_name(url).endswith(".parquet")


def _is_table(url: str) -> bool:
    return file_name(url).endswith(TABLES)


def _find(pattern: Pattern, output: str | None) -> Found:
    return resolve(pattern, SUFFIXES, TABLES, images=True, output=output)


def _footer(url: str, captions: bool, caption_keys: Sequence[str]) -> Footer | None:
    try:
        with storage.open_file(url) as stream:
            return read_footer(stream, url, captions=captions, caption_keys=caption_keys)
    except storage.MissingFileError:
        return None  # its rows will say so


def _scan(url: str, rows_per_shard: int, caption_keys: Sequence[str], captions: bool) -> TableScan | None:
    try:
        with storage.open_file(url) as stream:
            return scan_table(stream, url, rows_per_shard, caption_keys, captions=captions)
    except storage.MissingFileError:
        return None  # its rows will say so


def _file_inputs(scan: Scan, rows_per_shard: int, caption_keys: Sequence[str], captions: bool, url: str) -> Inputs:
    """Return the shards of one file, of at most ``rows_per_shard`` rows; a tar stays whole."""
    if _is_table(url) and (table := scan(url)):
        return _cut(url, "bytes", table.marks, table.columns)
    if _is_parquet(url) and (footer := _footer(url, captions, caption_keys)):
        return _cut(url, "rows", [*range(0, footer.rows, rows_per_shard), footer.rows], footer.columns)
    return Inputs({url: shard_label(url)}, ())


def _folder_inputs(root: str, files: Collection[str], scan: Scan, files_per_shard: int) -> Inputs:
    """Return the shards of a folder of images: those of its tables, and of the images that no table describes."""
    shards, links, described = dict[str, str](), list[str](), set[str]()
    for table in (file for file in files if file.rpartition("/")[2] in METADATA_FILES):
        folder, url = table.rpartition("/")[0], storage.join(root, table)
        if (content := scan(url)) is None:
            continue
        found = _cut(url, "bytes", content.marks, content.columns)
        shards |= found.shards
        links += found.links
        described.update(f"{folder}/{path}" if folder else path for path in content.paths)
    shards |= {each.url: each.label for each in folder_shards(root, files, described, files_per_shard)}
    return Inputs(shards, tuple(links))


def _cut(url: str, unit: str, marks: Sequence[int], columns: Columns) -> Inputs:
    """Split a file at ``marks`` into shards; one shard is the file itself."""
    label = shard_label(url)
    shards = {f"{url}#{unit}={first}-{end}": f"{label}__{first:09d}" for first, end in pairwise(marks)}
    if len(shards) <= 1:
        shards = {url: label}
    return Inputs(shards, tuple(shards) if columns.link else ())
