"""Packed codes on disk: parquet files with one row per view, and a manifest that identifies the tokenizer."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pydantic

from ... import storage
from ...config import Config
from ...errors import UserError
from ...lru import LRUCache
from .texts import both_captions

if TYPE_CHECKING:
    from torch import Tensor

A = TypeVar("A", np.ndarray, "Tensor")

SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("shard", pa.string()),
        ("row", pa.int64()),
        ("caption_long", pa.string()),
        ("caption_short", pa.string()),
        ("codes", pa.binary()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("source", pa.string()),
    ]
)
MANIFEST = "manifest.json"


class CodesFile(Config):
    """Parquet file of a folder of codes: its name and number of rows."""

    name: str
    rows: int


class CodesManifest(Config):
    """Manifest of a folder of codes: its files, the shape of the codes, and the tokenizer that made them."""

    tokenizer_hash: str
    """:func:`instella_ray.models.checkpoint.weight_hash` of the tokenizer."""
    num_tokens: int
    bits_per_token: int
    rows: int
    files: tuple[CodesFile, ...]


def pack_codes(codes: np.ndarray) -> list[bytes]:
    """Pack uint8 0/1 ``[N, L, K]`` into N byte strings of ``ceil(L * K / 8)`` bytes."""
    return [row.tobytes() for row in np.packbits(codes.reshape(len(codes), math.prod(codes.shape[1:])), axis=1)]


def unpack_codes(packed: Sequence[bytes], tokens: int, bits: int) -> np.ndarray:
    """Unpack byte strings into uint8 0/1 ``[N, tokens, bits]``; UserError for one of another length."""
    return _unpack(_matrix(packed, tokens, bits), tokens, bits)


def dead_bits(ones: A) -> A:
    """Tell which bits are the same in every image, from the share ``ones`` of images in which each is set."""
    return (ones == 0) | (ones == 1)


def write_codes_file(url: str, rows: Sequence[dict[str, Any]]) -> None:
    """Write a parquet file with the columns of :data:`SCHEMA`, atomically."""
    storage.write_parquet(url, pa.Table.from_pylist(list(rows), SCHEMA))


class CodesWriter:
    """Writes images with their codes as one parquet file, one row per view; returns the number of rows."""

    def __init__(self, source: str) -> None:
        self.source = source

    def __call__(self, url: str, rows: list[dict[str, Any]]) -> int:
        views = [{**self._facts(row), "codes": codes} for row in rows for codes in row["codes"]]
        write_codes_file(url, views)
        return len(views)

    def _facts(self, row: dict[str, Any]) -> dict[str, Any]:
        captions = both_captions(row["caption"], json.loads(row["meta"]))
        facts = {name: row[name] for name in ("key", "shard", "row", "width", "height")}
        return {**facts, **captions, "source": self.source}


def read_manifest(folder: str) -> CodesManifest:
    """Read the manifest of a finished folder of codes; UserError if it is missing or invalid."""
    path = storage.join(folder, MANIFEST)
    if not storage.exists(path):
        raise UserError(f"{folder}: not a finished folder of codes (no {MANIFEST})")
    try:
        return CodesManifest.model_validate(storage.read_json(path))
    except pydantic.ValidationError as error:
        raise UserError(f"{path}: not a manifest of codes ({error.errors()[0]['msg']})") from None


class CodesReader:
    """Random access to the rows of a folder of codes, in the order of the manifest.

    Files are read on first access and cached in memory, packed (1 KiB per image at full size), up to ``cache_bytes``.
    Raises UserError if the codes were made by another tokenizer than ``tokenizer_hash``, or a file does not match the
    manifest.
    """

    def __init__(self, folder: str, *, tokenizer_hash: str | None = None, cache_bytes: int = 2 << 30) -> None:
        self.folder = folder
        self.manifest = read_manifest(folder)
        made_by = self.manifest.tokenizer_hash
        if tokenizer_hash is not None and made_by != tokenizer_hash:
            mismatch = f"codes were made by tokenizer {made_by[:12]}, expected {tokenizer_hash[:12]}"
            raise UserError(f"{folder}: {mismatch}; encode the images again")
        self.starts = np.cumsum([0, *(file.rows for file in self.manifest.files)])
        """Index of the first row of each file, followed by the number of all rows."""
        self._files: LRUCache[int, _File] = LRUCache(lambda file: file.bytes, cache_bytes)

    def __len__(self) -> int:
        return int(self.starts[-1])

    def codes(self, index: Sequence[int] | np.ndarray) -> np.ndarray:
        """Return the codes of the rows at ``index``, uint8 0/1 ``[N, L, K]``."""
        cfg = self.manifest
        packed = np.empty((len(index), (cfg.num_tokens * cfg.bits_per_token + 7) // 8), np.uint8)
        for number, places, rows in self._by_file(index):
            packed[places] = self._file(number).packed[rows]
        return _unpack(packed, cfg.num_tokens, cfg.bits_per_token)

    def column(self, index: Sequence[int] | np.ndarray, name: str) -> list[str]:
        """Return the values of ``key``, ``caption_long`` or ``caption_short`` of the rows at ``index``."""
        values = np.empty(len(index), object)
        for number, places, rows in self._by_file(index):
            column = self._file(number).text[name]
            values[places] = [column[row].as_py() for row in rows.tolist()]
        return values.tolist()

    def _by_file(self, index: Sequence[int] | np.ndarray) -> list[tuple[int, np.ndarray, np.ndarray]]:
        """Return (file, positions in ``index``, rows within the file) for every file that has rows in ``index``."""
        rows = np.asarray(index, np.int64)
        if len(rows) and not (rows.min() >= 0 and rows.max() < len(self)):
            raise IndexError(f"{self.folder}: index {rows.min()} to {rows.max()}, expected 0 to {len(self) - 1}")
        files = np.searchsorted(self.starts, rows, side="right") - 1
        groups = ((int(number), np.flatnonzero(files == number)) for number in np.unique(files))
        return [(number, places, rows[places] - self.starts[number]) for number, places in groups]

    def _file(self, number: int) -> _File:
        return self._files.get(number, lambda: self._load(number))

    def _load(self, number: int) -> _File:
        cfg, file = self.manifest, self.manifest.files[number]
        columns = ["key", "caption_long", "caption_short"]
        with storage.open_file(storage.join(self.folder, file.name)) as stream:
            table = pq.read_table(stream, columns=[*columns, "codes"])
        if table.num_rows != file.rows:
            raise UserError(f"{self.folder}/{file.name}: {table.num_rows} rows, expected {file.rows} by the manifest")
        packed = _matrix(table["codes"].to_pylist(), cfg.num_tokens, cfg.bits_per_token)
        return _File(packed, {name: table[name].combine_chunks() for name in columns})


class _File:
    def __init__(self, packed: np.ndarray, text: dict[str, pa.Array]) -> None:
        self.packed, self.text = packed, text
        self.bytes = packed.nbytes + sum(column.nbytes for column in text.values())


def _matrix(packed: Sequence[bytes], tokens: int, bits: int) -> np.ndarray:
    """Stack byte strings as uint8 ``[N, bytes]``; UserError for one of another length than ``tokens * bits`` take."""
    expected = (tokens * bits + 7) // 8
    wrong = next((len(p) for p in packed if len(p) != expected), None)
    if wrong is not None:
        raise UserError(f"packed codes of {wrong} bytes: expected {expected} for {tokens} tokens x {bits} bits")
    return np.frombuffer(b"".join(packed), np.uint8).reshape(len(packed), expected)


def _unpack(packed: np.ndarray, tokens: int, bits: int) -> np.ndarray:
    return np.unpackbits(packed, axis=1, count=tokens * bits).reshape(len(packed), tokens, bits)
