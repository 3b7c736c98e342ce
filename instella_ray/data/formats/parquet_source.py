"""Parquet reader: rows of samples with embedded images, or with links to images as in LAION's metadata.

Columns are found by name (:mod:`.columns`). Only columns of plain types are read, so that no extension type can unpickle
data. Only a few rows are in memory at a time, however large a row group is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import IO, Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from .columns import Columns, find_columns, is_list, is_text, plain, table_row
from .keys import Keys
from .rows import problem_row
from .texts import CAPTION_NAMES

IMAGES_AT_ONCE, LINKS_AT_ONCE = 64, 4096
"""Rows per read, of files with images and with links."""
_READ_ERRORS = (pa.ArrowException, OSError, UnicodeDecodeError)
"""Exceptions of a damaged file, among other causes (:func:`_is_damage`)."""


class Footer(NamedTuple):
    """Number of rows and columns of a file, from its footer."""

    rows: int
    columns: Columns


def read_footer(
    stream: IO[bytes], url: str, *, captions: bool = True, caption_keys: Sequence[str] = CAPTION_NAMES
) -> Footer | None:
    """Read the footer of a file; None if it is damaged or not parquet, UserError if it lacks images or captions."""
    try:
        file = pq.ParquetFile(stream)
        columns = find_columns(file.schema_arrow, url, captions=captions, caption_keys=caption_keys)
        return Footer(file.metadata.num_rows, columns)
    except _READ_ERRORS as error:
        if not _is_damage(error):
            raise
        return None


def row_count(stream: IO[bytes]) -> int:
    """Return the number of rows in the footer of a file; 0 if it is damaged."""
    try:
        return int(pq.ParquetFile(stream).metadata.num_rows)
    except _READ_ERRORS as error:
        if not _is_damage(error):
            raise
        return 0


def read_records(stream: IO[bytes]) -> Iterator[dict[str, Any]]:
    """Yield all columns of each row, text decoded as far as it is UTF-8; pyarrow's errors for a damaged file."""
    for batch in pq.ParquetFile(stream).iter_batches(LINKS_AT_ONCE):
        types = {name: plain(batch.schema.field(name).type) for name in set(batch.schema.names)}
        text = {name for name, kind in types.items() if is_text(kind) or (is_list(kind) and is_text(kind.value_type))}
        for row in _python_rows(batch):
            yield {name: _decoded(value) if name in text else value for name, value in row.items()}


def _decoded(value: Any) -> Any:
    """Decode text that :func:`_values` returned as bytes, or a list of them."""
    if isinstance(value, list):
        return [_decoded(item) for item in value]
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value


def read_parquet(
    stream: IO[bytes],
    shard: str,
    url: str,
    first: int = 0,
    end: int | None = None,
    *,
    captions: bool = True,
    caption_keys: Sequence[str] = CAPTION_NAMES,
) -> Iterator[dict[str, Any]]:
    """Yield rows ``first`` to ``end`` of one file, in order: the columns of :data:`.rows.SCHEMA` without ``last``.

    The column ``row`` counts from 0 at ``first``. There is at least one row: a truncated or damaged file ends with a row
    whose problem is ``truncated_shard``, one without rows gives ``empty_shard``. Rows with a link instead of an image
    have it as ``url`` in their metadata. Raises UserError for missing columns.
    """
    number, keys = 0, Keys()
    try:
        # Without the buffer, a whole column of a row group would be read at once.
        file = pq.ParquetFile(stream, buffer_size=1 << 20, pre_buffer=False)
        columns = find_columns(file.schema_arrow, url, captions=captions, caption_keys=caption_keys)
        for batch in _batches(file, columns, first, file.metadata.num_rows if end is None else end):
            for values in _python_rows(batch):
                yield table_row(values, columns, shard, number, keys, values[columns.image] if columns.image else None)
                number += 1
    except _READ_ERRORS as error:
        if not _is_damage(error):
            raise
        yield problem_row(shard, number, "truncated_shard")
        return
    if not number:
        yield problem_row(shard, 0, "empty_shard")


def _batches(file: pq.ParquetFile, columns: Columns, first: int, end: int) -> Iterator[pa.RecordBatch]:
    """Yield the rows of ``file`` from ``first`` to ``end`` in small batches, one row group after another."""
    start, at_once = 0, IMAGES_AT_ONCE if columns.image else LINKS_AT_ONCE
    for group in range(file.metadata.num_row_groups):
        rows = file.metadata.row_group(group).num_rows
        if start + rows > first and start < end:
            at = start
            for batch in file.iter_batches(at_once, [group], columns.names(), use_threads=False):
                low, high = max(first - at, 0), min(end - at, batch.num_rows)
                if low < high:
                    yield batch.slice(low, high - low)
                at += batch.num_rows
                if at >= end:
                    return
        start += rows


def _python_rows(batch: pa.RecordBatch) -> Iterator[dict[str, Any]]:
    """Yield the rows of ``batch`` as dicts, with text as bytes, because it need not be valid UTF-8."""
    names = batch.schema.names
    columns = [_values(column) for column in batch.columns]
    for values in zip(*columns, strict=True):
        yield dict(zip(names, values, strict=True))


def _values(column: pa.Array) -> list[Any]:
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if pa.types.is_struct(column.type) and column.type.get_field_index("bytes") >= 0:
        column = pc.struct_field(column, "bytes")
    if is_text(column.type):
        column = column.cast(pa.large_binary())
    elif is_list(column.type) and is_text(column.type.value_type):
        column = column.cast(pa.large_list(pa.large_binary()))
    if pa.types.is_floating(column.type):
        column = column.cast(pa.float64())
    return list(column.to_pylist())


def _is_damage(error: Exception) -> bool:
    """Return whether an error means a damaged file: unlike Arrow's, OSErrors of storage have an errno or a subclass."""
    return not isinstance(error, OSError) or (type(error) is OSError and error.errno is None)
