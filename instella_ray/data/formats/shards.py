"""WebDataset tars, found and written: ``KEY.jpg|png``, ``KEY.txt`` (caption), ``KEY.json``, as img2dataset does.

A list of shards is a JSON file in place of a pattern, so that a bucket of a million objects is listed once.
"""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

from pydantic import Field, TypeAdapter, ValidationError

from ... import storage
from ...config import Config
from ...errors import UserError
from .parts import Part, refuse_unfinished
from .tar_index import index_row, index_url, write_index

Sample = tuple[str, bytes, str, dict[str, Any]]
"""(key, encoded image, caption, metadata)."""


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


def find_shards(pattern: str, suffixes: str | Sequence[str] = ".tar") -> dict[str, str]:
    """URL -> short unique name of the shards that ``pattern`` names, sorted; at least one.

    A pattern is a path, a glob, a folder, a list of shards (:mod:`.shard_list`), or several of these with commas
    between. A folder means the shards on its own list, or else all its files with the first of ``suffixes`` that there
    are any with. UserError for a part that names nothing, and for a folder whose curation is not finished.
    """
    return _named([entry.url for entry in find_files(pattern, suffixes)])


def find_files(pattern: str, suffixes: str | Sequence[str] = ".tar") -> list[ShardEntry]:
    """The shards of :func:`find_shards` with their sizes; a part of the pattern costs one listing at most."""
    suffixes = (suffixes,) if isinstance(suffixes, str) else tuple(suffixes)
    found: dict[str, ShardEntry] = {}
    for part in (text.strip() for text in pattern.split(",")):
        files = {entry.url: entry for entry in _part_files(part, suffixes) if entry.url.endswith(suffixes)}
        if not files:
            kind = "WebDataset tars" if ".tar" in suffixes else f"{suffixes[0]} files"
            others = "".join(f" or {suffix} files" for suffix in suffixes[1:])
            raise UserError(f"{part}: no shard found; expected {kind}{others}, for example 'data/*{suffixes[0]}'")
        found.update(files)
    return [found[url] for url in sorted(found)]


def list_shards(pattern: str, output: str, suffixes: str | Sequence[str]) -> ShardList:
    """Write the list of the shards of :func:`find_shards` to the file ``output``."""
    if not output.endswith(".json"):
        raise UserError(f"output {output}: expected a name that ends with .json, by which jobs know a list of shards")
    folder, _, name = storage.absolute(output).rpartition("/")
    return write_shard_list(folder, find_files(pattern, suffixes), name)


def _part_files(part: str, suffixes: tuple[str, ...]) -> list[ShardEntry]:
    if part.endswith(".json"):
        refuse_unfinished(os.path.dirname(part) or ".")
        return read_shard_list(part)
    fs, path = storage.filesystem(part)
    if not fs.isdir(path):
        refuse_unfinished(os.path.dirname(part) or ".")
        return _entries(_without_sidecars(storage.sizes(part)))
    refuse_unfinished(part)
    if storage.exists(listed := storage.join(part, SHARD_LIST)):
        return read_shard_list(listed)
    files = storage.sizes(storage.join(part, "*"))
    by_suffix = ({url: size for url, size in files.items() if url.endswith(suffix)} for suffix in suffixes)
    return _entries(next(filter(None, by_suffix), {}))


def _entries(files: dict[str, int]) -> list[ShardEntry]:
    return [ShardEntry(url=url, bytes=size) for url, size in files.items()]


def _without_sidecars(files: dict[str, int]) -> dict[str, int]:
    """img2dataset writes a parquet file of metadata beside each tar, which holds the same samples once more."""
    tars = {url.removesuffix(".tar") for url in files if url.endswith(".tar")}
    return {url: size for url, size in files.items() if url.removesuffix(".parquet") not in tars}


def _named(urls: list[str]) -> dict[str, str]:
    """Names are paths below the folder that all share, with slashes replaced: they become file names."""
    paths = [url.rpartition("://")[2].lstrip("/") for url in urls]
    shared = os.path.commonpath([os.path.dirname(path) for path in paths])
    names = [os.path.splitext(os.path.relpath(path, shared or "."))[0].replace("/", "__") for path in paths]
    refuse_twins(names)
    return dict(zip(urls, names, strict=True))


def refuse_twins(names: Sequence[str]) -> None:
    """UserError where two shards would have one name."""
    if len(set(names)) < len(names):
        twice = next(name for name, count in Counter(names).items() if count > 1)
        raise UserError(f"two shards would both be called '{twice}'; rename one of them")


def write_tar(url: str, samples: Iterable[Sample]) -> int:
    """Write one shard and its index, whole or not at all, the same bytes for the same samples. Returns their number."""
    index: list[dict[str, Any]] = []
    with storage.open_file(url, "wb") as stream, tarfile.open(fileobj=stream, mode="w|") as tar:
        for key, image, caption, meta in samples:
            _add(tar, f"{key}.{image_extension(image)}", image)
            # What was just added ends here, filled up to whole blocks.
            index.append(index_row(key, tar.offset - -len(image) // 512 * -512, image, caption, meta))
            _add(tar, f"{key}.txt", caption.encode())
            _add(tar, f"{key}.json", json.dumps(meta, sort_keys=True).encode())
    write_index(url, index)
    return len(index)


def remove_shard(url: str) -> None:
    """Delete a tar and its index, where they are."""
    storage.remove_tree(url)
    storage.remove_tree(index_url(url))


def write_samples(url: str, rows: Iterable[dict[str, Any]]) -> int:
    """:func:`write_tar` of rows with ``key, image, caption`` and ``meta`` (JSON)."""
    return write_tar(url, ((row["key"], row["image"], row["caption"], json.loads(row["meta"])) for row in rows))


def write_webdataset(samples: Iterable[Sample], folder: str, samples_per_shard: int) -> Iterator[tuple[str, int]]:
    """Write ``samples`` as ``folder/00000.tar``, ...; yields (url, samples in it) as each shard is finished."""
    rest, number = iter(samples), 0
    while part := list(islice(rest, samples_per_shard)):
        url = storage.join(folder, f"{number:05d}.tar")
        yield url, write_tar(url, part)
        number += 1


def image_extension(image: bytes) -> str:
    """``png``, ``webp`` or ``jpg``, by the first bytes."""
    if image.startswith(b"\x89PNG"):
        return "png"
    return "webp" if image[8:12] == b"WEBP" else "jpg"


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))
