"""Parquet reader: rows of samples with embedded images, or with links to images as in LAION's metadata.

Columns are found by name, ignoring case. Only columns of plain types are read, so that no extension type can unpickle
data. Only a few rows are in memory at a time, however large a row group is.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import IO, Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ...errors import UserError
from .images import MAX_IMAGE_BYTES
from .keys import ORIGINAL_KEY, Keys, readable, safe_key
from .metadata import LAION_NAMES, column_name, json_value
from .rows import problem_row
from .texts import CAPTION_NAMES, TextError, caption_of

IMAGE_COLUMNS = ("image", "jpg", "jpeg", "png", "webp", "image_bytes", "bytes")
LINK_COLUMNS = ("url", "image_url")
KEY_COLUMNS = ("key", "__key__", "id", "uid")
IMAGES_AT_ONCE, LINKS_AT_ONCE = 64, 4096
"""Rows per read, of files with images and with links."""
_READ_ERRORS = (pa.ArrowException, OSError, UnicodeDecodeError)
"""Exceptions of a damaged file, among other causes (:func:`_is_damage`)."""


class Columns(NamedTuple):
    """Names of the columns of a file, by their use; None for a column that the file lacks."""

    image: str | None
    """Encoded images: binary, or a struct with a binary ``bytes``."""
    link: str | None
    """URLs of the images, in a file without an image column."""
    key: str | None
    captions: tuple[str, ...]
    """Columns of captions, in order of preference."""
    meta: tuple[str, ...]
    """Columns of text, numbers or booleans, except the image, the key and the first of ``captions``."""

    def names(self) -> list[str]:
        """Return the names of all columns to read."""
        return [name for name in dict.fromkeys((self.image, self.link, self.key, *self.captions, *self.meta)) if name]


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
        text = {name for name in batch.schema.names if _is_text(_plain(batch.schema.field(name).type))}
        for row in _python_rows(batch):
            yield {k: v.decode("utf-8", "replace") if k in text and v is not None else v for k, v in row.items()}


def find_columns(
    schema: pa.Schema, url: str, *, captions: bool = True, caption_keys: Sequence[str] = CAPTION_NAMES
) -> Columns:
    """Find the columns of a file by name and type; those of captions by ``caption_keys``.

    Raises UserError naming ``url`` if there is no column of images or links, or, with ``captions``, none of captions.
    """
    # Ignores duplicate names, which are ambiguous.
    names = [name for name, count in Counter(schema.names).items() if count == 1]
    types = {name: _plain(schema.field(name).type) for name in names}
    text = [name for name in names if _is_text(types[name])]
    image = _first(IMAGE_COLUMNS, [name for name in names if _is_image(types[name])])
    link = None if image else _first(LINK_COLUMNS, [name for name in names if _holds_text(types[name], lists=False)])
    candidates = [name for name in names if name != image and _may_be_caption(types[name])]
    texts = tuple(dict.fromkeys(name for wanted in caption_keys if (name := _first([wanted], candidates))))
    found = f"found {', '.join(schema.names) or 'none'}"
    if image is None and link is None:
        expected = f"expected {', '.join(IMAGE_COLUMNS)} with encoded images, or {' or '.join(LINK_COLUMNS)}"
        raise UserError(f"{url}: no column with images or links to them; {expected}; {found}")
    if not texts and captions:
        other = _first(caption_keys, names)
        found += f", where {other} is {types[other]}" if other else ""
        raise UserError(f"{url}: no column with captions; expected {', '.join(caption_keys)}; {found}")
    keys = [name for name in names if name in text or pa.types.is_integer(types[name]) or _is_bytes(types[name])]
    key = _first(KEY_COLUMNS, keys)
    taken = {image, key, *texts[:1]}
    scalars = [name for name in names if name in {*text, link} or _is_number(types[name]) or _is_score(name, types)]
    return Columns(image, link, key, texts, tuple(name for name in scalars if name not in taken))


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
                yield _row(values, columns, shard, number, keys)
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
    if pa.types.is_struct(column.type):
        column = pc.struct_field(column, "bytes")
    if _is_text(column.type):
        column = column.cast(pa.large_binary())
    elif _is_list(column.type) and _is_text(column.type.value_type):
        column = column.cast(pa.large_list(pa.large_binary()))
    if pa.types.is_floating(column.type):
        column = column.cast(pa.float64())
    return list(column.to_pylist())


def _row(values: dict[str, Any], columns: Columns, shard: str, number: int, keys: Keys) -> dict[str, Any]:
    image = values[columns.image] if columns.image else None
    name = _text(values[columns.key]) if columns.key else ""
    meta = _meta(values, columns)
    key, new = keys.assign(name) if name else (safe_key(f"{shard}-{number:07d}"), True)
    if name and key != name:
        meta.setdefault(ORIGINAL_KEY, readable(name))
    problem = None if new else "duplicate_key"
    try:
        caption = caption_of({column: values[column] for column in columns.captions}, columns.captions)
    except TextError:
        caption, problem = "", problem or "bad_caption"
    if image is not None and len(image) > MAX_IMAGE_BYTES:
        image, problem = None, problem or "oversized_member"
    linked = columns.link is not None and "url" in meta
    missing = "no_image" if image is None and not linked else "no_caption" if not caption else None
    row = {"key": key, "shard": shard, "row": number, "problem": problem or missing}
    return {**row, "image": image, "caption": caption or None, "meta": json.dumps(meta)}


def _text(value: str | bytes | int | None) -> str:
    if isinstance(value, bytes):
        return value.decode("utf-8", "surrogateescape")
    return "" if value is None else str(value)


def _meta(values: dict[str, Any], columns: Columns) -> dict[str, Any]:
    """Return the metadata of a row, without nulls and NaN; of several spellings of a name, that in lower case counts."""
    meta: dict[str, Any] = {}
    for column in columns.meta:
        value, name = json_value(values[column]), "url" if column == columns.link else column_name(column)
        if value is not None and (column in (name, columns.link) or name not in meta):
            meta[name] = value
    return meta


def _first(wanted: Sequence[str], names: Sequence[str]) -> str | None:
    """Return the first of ``wanted`` in ``names``, ignoring case; None if there is none."""
    lowered = {name.lower(): name for name in reversed(names)}
    return next((lowered[name] for name in wanted if name in lowered), None)


def _plain(kind: pa.DataType) -> pa.DataType:
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _holds_text(kind: pa.DataType, *, lists: bool = True) -> bool:
    """Return whether values may be text: Hive, Impala and old Presto write text as bytes, COCO has lists of captions."""
    if lists and _is_list(kind):
        return _holds_text(kind.value_type, lists=False)
    return _is_text(kind) or _is_bytes(kind)


def _may_be_caption(kind: pa.DataType) -> bool:
    """Return whether values may be captions: also of an empty column, which writers give the type null or float."""
    return _holds_text(kind) or bool(pa.types.is_null(kind) or pa.types.is_floating(kind))


def _is_score(name: str, types: Mapping[str, pa.DataType]) -> bool:
    """Return whether a column has one of LAION's names and text as bytes, which may be numeric."""
    return column_name(name) in LAION_NAMES and _is_bytes(types[name])


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def _is_bytes(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind))


def _is_number(kind: pa.DataType) -> bool:
    kinds = (pa.types.is_integer, pa.types.is_floating, pa.types.is_decimal, pa.types.is_boolean)
    return any(is_kind(kind) for is_kind in kinds)


def _is_image(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        index = kind.get_field_index("bytes")
        return index >= 0 and _is_image(kind.field(index).type) and not pa.types.is_struct(kind.field(index).type)
    return _is_bytes(kind)


def _is_damage(error: Exception) -> bool:
    """Return whether an error means a damaged file: unlike Arrow's, OSErrors of storage have an errno or a subclass."""
    return not isinstance(error, OSError) or (type(error) is OSError and error.errno is None)
