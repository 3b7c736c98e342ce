"""Reader of tables as text, CSV, TSV and JSONL: rows of samples with paths of their images, or with links to them.

Paths are relative to the folder of the table, and lead nowhere else.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import IO, Any, NamedTuple

import pyarrow as pa

from .columns import Columns, find_columns, table_row
from .files import AT_ONCE, read_files
from .keys import Keys, is_unsafe
from .metadata import json_object
from .names import split_extension
from .patterns import file_name
from .rows import problem_row
from .texts import CAPTION_NAMES

TABLES = (".csv", ".tsv", ".jsonl")
"""Extensions of tables as text."""
OBJECTS_SEEN = 64
"""Objects of a JSONL file whose keys are its columns."""
LONGEST_LINE = 16 << 20
"""Bytes after which a line ends that does not end itself."""
Record = dict[str, Any]


class TableScan(NamedTuple):
    """What one reading of a whole table tells."""

    columns: Columns
    marks: list[int]
    """Position of each shard in the file (bytes), and at last of its end."""
    paths: frozenset[str]
    """Paths of the images."""
    rows: int


def scan_table(
    stream: IO[bytes],
    url: str,
    rows_per_shard: int,
    caption_keys: Sequence[str] = CAPTION_NAMES,
    *,
    captions: bool = True,
) -> TableScan:
    """Read a whole table, and divide it into shards of ``rows_per_shard`` rows; the last one may have fewer.

    Raises UserError if it lacks a column of paths or links, or, with ``captions``, one of captions.
    """
    table = _Table(stream, url, caption_keys, captions)
    marks, paths, rows = [table.start], set[str](), 0
    for record in table.records(table.start):
        rows += 1
        if rows % rows_per_shard == 0:
            marks.append(table.position)
        if record is not None and table.columns.path:
            paths.add(table.path(record))
    if rows % rows_per_shard or not rows:
        marks.append(table.position)
    return TableScan(table.columns, marks, frozenset(paths), rows)


def read_table(
    stream: IO[bytes],
    shard: str,
    url: str,
    start: int | None = None,
    end: int | None = None,
    *,
    captions: bool = True,
    caption_keys: Sequence[str] = CAPTION_NAMES,
    skip: int = 0,
) -> Iterator[dict[str, Any]]:
    """Yield the rows between two positions of a table, in order: the columns of :data:`.rows.SCHEMA` without ``last``.

    The first ``skip`` rows are left out, and most of their images unread. There is at least one row: without any, its
    problem is ``empty_shard``. A record that is no JSON object, or has more values than there are columns, becomes a row
    with the problem ``bad_metadata``. Raises UserError as :func:`scan_table`.
    """
    table, number, keys = _Table(stream, url, caption_keys, captions), 0, Keys()
    records = table.records(table.start if start is None else start, end)
    while part := list(islice(records, AT_ONCE)):
        images = table.images(part) if number + len(part) > skip else [None] * len(part)
        for record, image in zip(part, images, strict=True):
            row = table.row(record, image, shard, number, keys)
            number += 1
            if number > skip:
                yield row
    if not number:
        yield problem_row(shard, 0, "empty_shard")


class _Table:
    """Table that is read in any order of its records, whose positions it knows."""

    def __init__(self, stream: IO[bytes], url: str, caption_keys: Sequence[str], captions: bool) -> None:
        self.stream, self.folder, self.position = stream, url.rpartition("/")[0], 0
        self.delimiter = {"csv": ",", "tsv": "\t"}.get(split_extension(file_name(url))[1])
        self.names: list[str] = []
        if self.delimiter:
            self.names = [name.strip() for name in next(self._fields(self.delimiter), None) or ()]
            schema = pa.schema([(name, pa.string()) for name in self.names])
        else:
            objects = [each for each in islice(self._objects(), OBJECTS_SEEN) if each is not None]
            schema = _schema(objects)
        self.start = self.position if self.delimiter else 0
        self.columns = find_columns(schema, url, paths=True, captions=captions, caption_keys=caption_keys)

    def records(self, start: int, end: int | None = None) -> Iterator[Record | None]:
        """Yield the records between two positions; None for one that cannot be read."""
        self.stream.seek(start)
        self.position = start
        records = self._rows(self.delimiter) if self.delimiter else self._objects()
        while end is None or self.position < end:
            try:
                record = next(records)
            except StopIteration:
                return
            yield record

    def images(self, records: list[Record | None]) -> list[bytes | None]:
        """Read the images of records."""
        if not self.columns.path:
            return [None] * len(records)
        paths = ["" if record is None else self.path(record) for record in records]
        return read_files(self.folder, ["" if is_unsafe(path) else path for path in paths])

    def path(self, record: Record) -> str:
        """Return the path of the image of a record, relative to the folder if it is inside; ``""`` if it has none."""
        value = record.get(self.columns.path or "")
        if not isinstance(value, str):
            return ""
        path = value.strip().removeprefix(f"{self.folder}/")
        return "/" * path.startswith("/") + "/".join(part for part in path.split("/") if part not in ("", "."))

    def row(self, record: Record | None, image: bytes | None, shard: str, number: int, keys: Keys) -> dict[str, Any]:
        """Return the row of a record."""
        if record is None:
            return problem_row(shard, number, "bad_metadata")
        values = {name: record.get(name) for name in self.columns.names()}
        if self.columns.link and not isinstance(values[self.columns.link], str):
            values[self.columns.link] = None
        path = self.path(record)
        name, problem = split_extension(path)[0], "unsafe_name" if is_unsafe(path) else None
        return table_row(values, self.columns, shard, number, keys, image, name=name, problem=problem)

    def _lines(self) -> Iterator[str]:
        while line := self.stream.readline(LONGEST_LINE):
            self.position += len(line)
            yield line.decode("utf-8-sig", "replace")

    def _fields(self, delimiter: str) -> Iterator[list[str] | None]:
        """Yield the values of the records of a CSV; None for a record that is none."""
        reader = csv.reader(self._lines(), delimiter=delimiter)
        while True:
            try:
                fields = next(reader)
            except StopIteration:
                return
            except csv.Error:
                yield None
                continue
            if fields:
                yield fields

    def _rows(self, delimiter: str) -> Iterator[Record | None]:
        for fields in self._fields(delimiter):
            if fields is None or len(fields) > len(self.names):
                yield None
            else:
                yield {name: value or None for name, value in zip(self.names, fields, strict=False)}

    def _objects(self) -> Iterator[Record | None]:
        return (json_object(line) for line in self._lines() if line.strip())


def _schema(objects: list[Record]) -> pa.Schema:
    """Return the columns of JSON objects, with the types of their first values."""
    first: Record = {}
    for name, value in ((name, value) for each in objects for name, value in each.items() if value is not None):
        first.setdefault(name, value)
    return pa.schema([(name, _kind(value)) for name, value in first.items()])


def _kind(value: Any) -> pa.DataType:
    """Return the type of a column; null for what is neither text nor a number."""
    if isinstance(value, list) and value and all(isinstance(item, str) for item in value):
        return pa.list_(pa.string())
    kinds = {str: pa.string(), bool: pa.bool_(), int: pa.int64(), float: pa.float64()}
    return kinds.get(type(value), pa.null())
