"""Ray Data source for WebDataset tars: Arrow blocks, and one bad sample costs one row.

Ray's own ``read_webdataset`` decodes while it reads, so that one corrupt picture fails a whole tar. Here bytes stay
bytes, and whatever is wrong with a sample is written in its row's ``problem`` column, for the ledger to count.
"""

from __future__ import annotations

import json
import re
import tarfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import IO, Any

import pyarrow as pa
from ray.data import Dataset, read_datasource
from ray.data.datasource import FileBasedDatasource

from .. import storage
from ..errors import UserError

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
"""``row`` counts a shard's samples from 0 without gaps, bad ones too; ``last`` marks the shard's final row."""

IMAGE_TYPES = ("jpg", "jpeg", "png", "webp")
MAX_MEMBER_BYTES = 64 << 20
"""Members above this size are not read: no picture of a training set is so large."""
_MEMBER_NAME = re.compile(r"(?P<key>(?:.*/)?[^./][^./]*)\.(?P<extension>[^/]+)")


def read_samples(stream: IO[bytes], shard: str) -> Iterator[dict[str, Any]]:
    """Rows of one tar, in order: the columns of :data:`SCHEMA` without ``last``, and the ``offset`` of the picture's bytes.

    Every tar gives at least one row. One that breaks off ends with a row whose problem is ``truncated_shard``, which
    takes the place of the sample that was being read; one without samples gives ``empty_shard``.
    """
    number = 0
    for sample in _samples(stream):
        yield sample.row(shard, number)
        number += 1
    if not number:
        yield _Sample("", problem="empty_shard").row(shard, 0)


class TarShardDatasource(FileBasedDatasource):
    """Columns of :data:`SCHEMA`; a block holds up to ``rows_per_block`` samples of one shard.

    ``shards`` gives each tar's URL the name that its rows carry; all lie in one filesystem.
    """

    def __init__(self, shards: Mapping[str, str], *, rows_per_block: int = 256) -> None:
        first = next(iter(shards))
        filesystem = None if storage.is_local(first) else storage.filesystem(first)[0]
        self.labels = {storage.filesystem(url)[1]: label for url, label in shards.items()}
        super().__init__(list(self.labels), filesystem=filesystem)
        self.rows_per_block = rows_per_block

    def _read_stream(self, f: Any, path: str) -> Iterator[pa.Table]:
        rows = _with_last(read_samples(f, self.labels[path]))
        while block := list(islice(rows, self.rows_per_block)):
            yield pa.Table.from_pylist(block, SCHEMA)


def read_shards(shards: Mapping[str, str], *, rows_per_block: int = 256) -> Dataset:
    """A Ray dataset over tars (URL -> name), one read task a tar."""
    source = TarShardDatasource(shards, rows_per_block=rows_per_block)
    return read_datasource(source, override_num_blocks=len(shards))


def require_captions(urls: Sequence[str], *, shards: int = 16, samples: int = 32) -> None:
    """UserError when pictures are there but none has a caption, judged by the first samples of the first shards."""
    pictures = 0
    for url in urls[:shards]:
        with storage.open_file(url) as stream:
            rows = list(islice(read_samples(stream, url), samples))
        if any(row["caption"] for row in rows):
            return
        pictures += sum(row["image"] is not None for row in rows)
    if pictures:
        raise UserError(
            f"{urls[0]}: shard without captions; expected KEY.txt (or 'caption' in KEY.json) beside KEY.jpg"
        )


@dataclass
class _Sample:
    key: str
    parts: dict[str, bytes] = field(default_factory=dict)
    places: dict[str, int] = field(default_factory=dict)
    problem: str | None = None

    def row(self, shard: str, number: int) -> dict[str, Any]:
        kind = next((t for t in IMAGE_TYPES if t in self.parts), "")
        image = self.parts.get(kind)
        meta_text = _text(self.parts.get("json", b"{}"))
        meta = _json_object(meta_text)
        caption = _text(self.parts.get("txt", b"")) or _text(str((meta or {}).get("caption") or "").encode())
        missing = None if meta is not None else "bad_metadata"
        missing = "no_image" if image is None else "no_caption" if not caption else missing
        values = {"key": self.key, "shard": shard, "row": number, "problem": self.problem or missing}
        return {
            **values,
            "image": image,
            "caption": caption or None,
            "meta": meta_text,
            "offset": self.places.get(kind),
        }


def _samples(stream: IO[bytes]) -> Iterator[_Sample]:
    """Consecutive members of one key make a sample."""
    sample: _Sample | None = None
    seen: set[str] = set()
    try:
        with _Tar.open(fileobj=stream, mode="r|*") as tar:
            for member in tar:
                name = _MEMBER_NAME.fullmatch(member.name.removeprefix("./"))
                if name is None or member.isdir():
                    continue
                key, extension = name["key"], name["extension"].lower()
                if sample is None or sample.key != key or extension in sample.parts:
                    if sample is not None:
                        yield sample
                    sample = _Sample(key, problem="duplicate_key" if key in seen else None)
                    seen.add(key)
                if key.startswith("/") or ".." in key.split("/"):
                    sample.problem = "unsafe_name"
                elif member.size > MAX_MEMBER_BYTES:
                    sample.problem = "oversized_member"
                elif member.isfile():
                    sample.places[extension] = member.offset_data
                    content = tar.extractfile(member)
                    sample.parts[extension] = content.read() if content else b""
            if tar.ending is not tarfile.EOFHeaderError:  # type: ignore[attr-defined]
                raise EOFError
            if sample is not None:
                yield sample
    except (tarfile.TarError, EOFError, ValueError):
        yield _Sample(sample.key if sample else "", problem="truncated_shard")


class _Member(tarfile.TarInfo):
    @classmethod
    def fromtarfile(cls, tarfile: tarfile.TarFile) -> _Member:
        try:
            return super().fromtarfile(tarfile)
        except Exception as error:
            tarfile.ending = type(error)  # type: ignore[attr-defined]
            raise


class _Tar(tarfile.TarFile):
    """Remembers how the archive ended: the standard class takes a missing end and a broken header for a regular end."""

    tarinfo = _Member
    ending: type[Exception] | None = None


def _with_last(rows: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    iterator = iter(rows)
    held = next(iterator)
    for row in iterator:
        yield {**held, "last": False}
        held = row
    yield {**held, "last": True}


def _text(data: bytes) -> str:
    """UTF-8 on one line: captions with line breaks or NUL bytes become plain words."""
    return " ".join(data.decode("utf-8", "replace").replace("\0", " ").split())


def _json_object(text: str) -> dict[str, Any] | None:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None
