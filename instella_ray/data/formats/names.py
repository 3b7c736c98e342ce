"""Names of inputs: patterns of paths and URLs, lists of shards, image files and links.

A pattern is a path, a glob, a folder, a list of shards (a JSON file, so that a bucket of a million objects is listed
only once), or several of these separated by commas; local, or any URL that fsspec supports.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Sequence

from pydantic import Field, TypeAdapter, ValidationError
from yarl import URL

from ... import storage
from ...config import Config
from ...errors import UserError
from .files import list_files
from .images import IMAGE_ENDINGS
from .parts import Part, refuse_unfinished
from .tar_reader import COMPRESSED_ENDINGS, compressed_error

SHARD_LIST = "shards.json"
"""Name of the list of shards in their folder; read by jobs whose input is the folder."""


# --- patterns and lists of shards


class ShardEntry(Config):
    """Entry of a list of shards."""

    url: str
    """URL or path, absolute or relative to the folder of the list."""
    bytes: int = Field(ge=0)
    rows: int | None = Field(None, ge=0)
    """Number of samples; None: not counted."""


class ShardList(Config):
    """Content of a list of shards."""

    shards: tuple[ShardEntry, ...]

    @property
    def bytes(self) -> int:
        """Total size of the shards."""
        return sum(shard.bytes for shard in self.shards)


def split_pattern(pattern: str) -> list[str]:
    """Split a pattern at its commas, stripping whitespace."""
    return [part.strip() for part in pattern.split(",")]


def absolute_pattern(pattern: str) -> str:
    """Make the paths of a pattern absolute, because workers run in other working directories."""
    return ",".join(map(storage.absolute, split_pattern(pattern)))


def find_shards(pattern: str, suffixes: str | Sequence[str] = ".tar") -> dict[str, str]:
    """Map the URLs of the shards that match ``pattern``, sorted, to short unique names; at least one.

    A folder stands for the shards in its list, or without a list for all files with the first of ``suffixes`` that
    matches any. Raises UserError for a part of the pattern that matches nothing, and for the output of an unfinished job.
    """
    return name_shards([entry.url for entry in find_files(pattern, suffixes)])


def find_files(pattern: str, suffixes: str | Sequence[str] = ".tar") -> list[ShardEntry]:
    """List the shards of :func:`find_shards` with their sizes; each part of the pattern costs at most one listing."""
    suffixes = (suffixes,) if isinstance(suffixes, str) else tuple(suffixes)
    found: dict[str, ShardEntry] = {}
    for part in split_pattern(pattern):
        files = part_files(part, suffixes)
        if not files:
            kind = "WebDataset tars" if ".tar" in suffixes else f"{suffixes[0]} files"
            others = "".join(f" or {suffix} files" for suffix in suffixes[1:])
            raise UserError(f"{part}: no shard found; expected {kind}{others}, for example 'data/*{suffixes[0]}'")
        found.update((entry.url, entry) for entry in files)
    return [found[url] for url in sorted(found)]


def part_files(part: str, suffixes: tuple[str, ...], tables: tuple[str, ...] = ()) -> list[ShardEntry]:
    """List the files with one of ``suffixes`` that a part of a pattern stands for, from one listing; there may be none.

    Files with one of ``tables`` are found by their own names and globs only, not by their folder. Raises UserError for the
    output of an unfinished job.
    """
    return [entry for entry in _listed(part, suffixes) if entry.url.endswith((*suffixes, *tables))]


def names_shards(part: str, suffix: str) -> bool:
    """Return whether a part of a pattern ends with ``suffix``, or is a folder with files that do."""
    fs, path = storage.filesystem(part)
    return bool(storage.glob(storage.join(part, f"*{suffix}"))) if fs.isdir(path) else part.endswith(suffix)


def find_image_files(folder: str) -> list[str]:
    """List the image files of a folder, recursively, by their extension, as sorted paths relative to it.

    Raises UserError if there are none.
    """
    found = list_files(folder)
    refuse_compressed([folder, *found])
    files = [name for name in found if image_extension(name)]
    if not files:
        raise no_images(folder)
    return files


def no_images(folder: str) -> UserError:
    """Return the error for a folder without images, which names what was expected."""
    kinds = f"{', '.join(IMAGE_ENDINGS[:-1])} or {IMAGE_ENDINGS[-1]}"
    return UserError(f"{folder}: no images found; expected tars, parquet files, or a folder of {kinds}")


def refuse_compressed(urls: Iterable[str]) -> None:
    """Raise UserError for a compressed tar, by the endings of ``urls``."""
    for url in urls:
        kind = next((kind for ending, kind in COMPRESSED_ENDINGS.items() if url.endswith(ending)), None)
        if kind:
            raise compressed_error(url, kind)


def list_shards(pattern: str, output: str, suffixes: str | Sequence[str]) -> ShardList:
    """Write the list of the shards of :func:`find_shards` to the file ``output``; UserError unless it ends with .json."""
    if not output.endswith(".json"):
        raise UserError(f"output {output}: expected a name that ends with .json, as lists of shards have")
    folder, _, name = storage.absolute(output).rpartition("/")
    return write_shard_list(folder, find_files(pattern, suffixes), name)


def write_shard_list(folder: str, entries: Iterable[ShardEntry], name: str = SHARD_LIST) -> ShardList:
    """Write the list of ``entries`` into ``folder``, with relative URLs for shards below it.

    The list and its shards may then be moved together.
    """
    base = storage.join(storage.absolute(folder), "")
    listed = [entry.model_copy(update={"url": entry.url.removeprefix(base)}) for entry in entries]
    made = ShardList(shards=tuple(sorted(listed, key=lambda entry: entry.url)))
    storage.write_json(storage.join(folder, name), made.model_dump(mode="json", exclude_none=True))
    return made


def part_entries(folder: str, parts: Iterable[Part]) -> list[ShardEntry]:
    """List the data files of the finished ``parts`` in ``folder``, with their sizes, by one listing of it."""
    sizes = storage.sizes(storage.join(folder, "*"))
    files = ((part.file, part.records) for part in parts if part.file)
    return [ShardEntry(url=name, bytes=sizes[storage.join(folder, name)], rows=records) for name, records in files]


def read_shard_list(path: str) -> list[ShardEntry]:
    """Read a list of shards, with absolute URLs; UserError if the file is not one."""
    try:
        read = TypeAdapter(ShardList).validate_json(storage.read_bytes(path))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        reason = f"{where}: {first['msg']}" if where else first["msg"]
        raise UserError(f"{path}: not a list of shards ({reason}); instella-ray shards writes one") from None
    folder = storage.absolute(path).rpartition("/")[0]
    return [shard.model_copy(update={"url": _absolute(shard.url, folder)}) for shard in read.shards]


def refuse_twins(names: Sequence[str]) -> None:
    """Raise UserError for duplicate shard names."""
    if len(set(names)) < len(names):
        twice = next(name for name, count in Counter(names).items() if count > 1)
        raise UserError(f"two shards would both be called '{twice}'; rename one of them")


def _absolute(url: str, folder: str) -> str:
    return url if "://" in url or url.startswith("/") else storage.join(folder, url)


def _listed(part: str, suffixes: tuple[str, ...]) -> list[ShardEntry]:
    if part.endswith(".json"):
        refuse_unfinished(os.path.dirname(part) or ".")
        return read_shard_list(part)
    fs, path = storage.filesystem(part)
    if not fs.isdir(path):
        refuse_unfinished(os.path.dirname(part) or ".")
        found = storage.sizes(part)
        refuse_compressed(found)
        return _entries(_without_sidecars(found))
    refuse_unfinished(part)
    if storage.exists(listed := storage.join(part, SHARD_LIST)):
        return read_shard_list(listed)
    files = storage.sizes(storage.join(part, "*"))
    refuse_compressed(files)
    by_suffix = ({url: size for url, size in files.items() if url.endswith(suffix)} for suffix in suffixes)
    return _entries(next(filter(None, by_suffix), {}))


def _entries(files: dict[str, int]) -> list[ShardEntry]:
    return [ShardEntry(url=url, bytes=size) for url, size in files.items()]


def _without_sidecars(files: dict[str, int]) -> dict[str, int]:
    """Exclude the parquet file of metadata that img2dataset writes beside each tar: it describes the same samples."""
    tars = {url.removesuffix(".tar") for url in files if url.endswith(".tar")}
    return {url: size for url, size in files.items() if url.removesuffix(".parquet") not in tars}


def name_shards(urls: Sequence[str]) -> dict[str, str]:
    """Name each URL by its path below their common folder, with slashes replaced, because names become file names."""
    if not urls:
        return {}
    paths = [url.rpartition("://")[2].lstrip("/") for url in urls]
    shared = os.path.commonpath([os.path.dirname(path) for path in paths])
    names = [os.path.splitext(os.path.relpath(path, shared or "."))[0].replace("/", "__") for path in paths]
    refuse_twins(names)
    return dict(zip(urls, names, strict=True))


# --- image files


def image_extension(name: str) -> str | None:
    """Return the lower-case extension of an image file or member; ``None`` if it is not one of an image."""
    ending = split_extension(name)[1]
    return ending if ending in IMAGE_ENDINGS else None


def split_extension(name: str) -> tuple[str, str]:
    """Split the path of a file at its last dot: its path without extension, and the lower-case extension."""
    stem, _, ending = name.rpartition(".")
    return (stem, ending.lower()) if stem and "/" not in ending and not stem.endswith("/") else (name, "")


# --- links


def web_url(link: str, base: URL | None = None) -> URL | None:
    """Parse a link, relative to ``base``, as an http or https URL without user, password and fragment; else ``None``."""
    try:
        url = URL(link.strip())
        url = base.join(url) if base else url
        return (
            url.with_user(None).with_fragment(None)
            if url.scheme in ("http", "https") and url.host and url.port
            else None
        )
    except ValueError:
        return None
