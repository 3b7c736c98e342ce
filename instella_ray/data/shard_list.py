"""Lists of shards: a JSON file in place of a pattern, so that a bucket of a million objects is listed once."""

from __future__ import annotations

from collections.abc import Iterable

from pydantic import Field, TypeAdapter, ValidationError

from .. import storage
from ..config import Config
from ..errors import UserError
from .parts import Part

SHARD_LIST = "shards.json"
"""Its name in the folder of its shards: a job that is given the folder reads it."""


class ShardEntry(Config):
    """One shard."""

    url: str
    """Relative to the folder of the list, or absolute."""
    bytes: int = Field(ge=0)
    rows: int | None = Field(None, ge=0)
    """Samples in it, where they were counted."""


class ShardList(Config):
    """The file."""

    shards: tuple[ShardEntry, ...]

    @property
    def bytes(self) -> int:
        """Of all shards."""
        return sum(shard.bytes for shard in self.shards)


def write_shard_list(folder: str, entries: Iterable[ShardEntry], name: str = SHARD_LIST) -> ShardList:
    """Write the list of ``entries`` into ``folder``; the names of shards below it are made relative to it.

    A list and its shards may then be moved together.
    """
    base = storage.join(storage.absolute(folder), "")
    listed = [entry.model_copy(update={"url": entry.url.removeprefix(base)}) for entry in entries]
    made = ShardList(shards=tuple(sorted(listed, key=lambda entry: entry.url)))
    storage.write_json(storage.join(folder, name), made.model_dump(mode="json", exclude_none=True))
    return made


def part_entries(folder: str, parts: Iterable[Part]) -> list[ShardEntry]:
    """The data files of a job's finished ``parts`` in ``folder``; their sizes cost one listing of it."""
    sizes = storage.sizes(storage.join(folder, "*"))
    files = ((part.file, part.records) for part in parts if part.file)
    return [ShardEntry(url=name, bytes=sizes[storage.join(folder, name)], rows=records) for name, records in files]


def read_shard_list(path: str) -> list[ShardEntry]:
    """The shards in a list, under absolute URLs; UserError where it is none."""
    try:
        read = TypeAdapter(ShardList).validate_json(storage.read_bytes(path))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        reason = f"{where}: {first['msg']}" if where else first["msg"]
        raise UserError(f"{path}: not a list of shards ({reason}); instella-ray shards writes one") from None
    folder = storage.absolute(path).rpartition("/")[0]
    return [shard.model_copy(update={"url": _absolute(shard.url, folder)}) for shard in read.shards]


def _absolute(url: str, folder: str) -> str:
    return url if "://" in url or url.startswith("/") else storage.join(folder, url)
