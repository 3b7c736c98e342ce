"""Names from outside: patterns of paths and URLs, lists of shards, members of archives, ids of rows, links.

What a pattern names: a path, a glob, a folder, a list of shards (a JSON file, so that a bucket of a million objects is
listed once), or several of these with commas between; local or any URL that fsspec reads.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence

from pydantic import Field, TypeAdapter, ValidationError
from yarl import URL

from ... import storage
from ...config import Config
from ...errors import UserError
from .images import IMAGE_ENDINGS
from .parts import Part, refuse_unfinished

SHARD_LIST = "shards.json"
"""Name of the list in the folder of its shards: a job that is given the folder reads it."""
_MEMBER = re.compile(r"(?P<key>(?:.*/)?[^./][^./]*)\.(?P<extension>[^/]+)")


# --- patterns and lists of files


class ShardEntry(Config):
    """One shard."""

    url: str
    """Relative to the folder of the list, or absolute."""
    bytes: int = Field(ge=0)
    rows: int | None = Field(None, ge=0)
    """Samples in it; None: not counted."""


class ShardList(Config):
    """The content of a list of shards."""

    shards: tuple[ShardEntry, ...]

    @property
    def bytes(self) -> int:
        """Size of all shards together."""
        return sum(shard.bytes for shard in self.shards)


def split_pattern(pattern: str) -> list[str]:
    """Return the parts of a pattern between its commas, without the space around them."""
    return [part.strip() for part in pattern.split(",")]


def absolute_pattern(pattern: str) -> str:
    """Return a pattern that means the same in another working directory; workers run in directories of their own."""
    return ",".join(map(storage.absolute, split_pattern(pattern)))


def find_shards(pattern: str, suffixes: str | Sequence[str] = ".tar") -> dict[str, str]:
    """Map the URLs of the shards that ``pattern`` names, sorted, to short unique names; at least one.

    A folder means the shards on its own list, or else all its files with the first of ``suffixes`` that there are any
    with. UserError for a part that names nothing, and for a folder whose curation is not finished.
    """
    return _named([entry.url for entry in find_files(pattern, suffixes)])


def find_files(pattern: str, suffixes: str | Sequence[str] = ".tar") -> list[ShardEntry]:
    """List the shards of :func:`find_shards` with their sizes; a part of the pattern costs one listing at most."""
    suffixes = (suffixes,) if isinstance(suffixes, str) else tuple(suffixes)
    found: dict[str, ShardEntry] = {}
    for part in split_pattern(pattern):
        files = {entry.url: entry for entry in _part_files(part, suffixes) if entry.url.endswith(suffixes)}
        if not files:
            kind = "WebDataset tars" if ".tar" in suffixes else f"{suffixes[0]} files"
            others = "".join(f" or {suffix} files" for suffix in suffixes[1:])
            raise UserError(f"{part}: no shard found; expected {kind}{others}, for example 'data/*{suffixes[0]}'")
        found.update(files)
    return [found[url] for url in sorted(found)]


def names_shards(part: str, suffix: str) -> bool:
    """Tell whether a part of a pattern names files with ``suffix``: by its ending, or as a folder that holds some."""
    fs, path = storage.filesystem(part)
    return bool(storage.glob(storage.join(part, f"*{suffix}"))) if fs.isdir(path) else part.endswith(suffix)


def find_image_files(folder: str) -> list[str]:
    """List the image files of a folder and the folders below it, by their ending, as paths below it; sorted.

    UserError where there is none.
    """
    fs, root = storage.filesystem(folder)
    found = fs.find(root) if fs.isdir(root) else []
    files = sorted(path[len(root) :].strip("/") for path in found if image_extension(path))
    if not files:
        kinds = f"{', '.join(IMAGE_ENDINGS[:-1])} or {IMAGE_ENDINGS[-1]}"
        raise UserError(f"{folder}: no images found; expected tars, parquet files, or a folder of {kinds}")
    return files


def list_shards(pattern: str, output: str, suffixes: str | Sequence[str]) -> ShardList:
    """Write the list of the shards of :func:`find_shards` to the file ``output``."""
    if not output.endswith(".json"):
        raise UserError(f"output {output}: expected a name that ends with .json, by which jobs know a list of shards")
    folder, _, name = storage.absolute(output).rpartition("/")
    return write_shard_list(folder, find_files(pattern, suffixes), name)


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
    """List the data files of a job's finished ``parts`` in ``folder``; their sizes cost one listing of it."""
    sizes = storage.sizes(storage.join(folder, "*"))
    files = ((part.file, part.records) for part in parts if part.file)
    return [ShardEntry(url=name, bytes=sizes[storage.join(folder, name)], rows=records) for name, records in files]


def read_shard_list(path: str) -> list[ShardEntry]:
    """Read the shards of a list, under absolute URLs; UserError where the file holds none."""
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
    """Raise a UserError where two shards would have one name."""
    if len(set(names)) < len(names):
        twice = next(name for name, count in Counter(names).items() if count > 1)
        raise UserError(f"two shards would both be called '{twice}'; rename one of them")


def _absolute(url: str, folder: str) -> str:
    return url if "://" in url or url.startswith("/") else storage.join(folder, url)


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
    """Leave out the parquet file of metadata that img2dataset writes beside each tar: it holds the same samples."""
    tars = {url.removesuffix(".tar") for url in files if url.endswith(".tar")}
    return {url: size for url, size in files.items() if url.removesuffix(".parquet") not in tars}


def _named(urls: list[str]) -> dict[str, str]:
    """Name each URL by its path below the folder that all share, with slashes replaced: names become file names."""
    paths = [url.rpartition("://")[2].lstrip("/") for url in urls]
    shared = os.path.commonpath([os.path.dirname(path) for path in paths])
    names = [os.path.splitext(os.path.relpath(path, shared or "."))[0].replace("/", "__") for path in paths]
    refuse_twins(names)
    return dict(zip(urls, names, strict=True))


# --- keys of samples


def member_name(name: str) -> tuple[str, str] | None:
    """Split the name of a tar's member into key and extension, in small letters; ``None`` for one without either."""
    found = _MEMBER.fullmatch(name.removeprefix("./"))
    return (found["key"], found["extension"].lower()) if found else None


def image_extension(name: str) -> str | None:
    """Return the ending by which a file or member is taken for an image, ``None`` for any other."""
    ending = name.rpartition(".")[2].lower()
    return ending if ending in IMAGE_ENDINGS else None


def row_key(value: str | int | None) -> str:
    """Return the key of a row's id, without dots: in a tar a key ends at the first one. ``""`` for none."""
    text = "" if value is None else str(value)
    return "/".join(part if part == ".." else part.replace(".", "_") for part in text.split("/"))


class Keys:
    """Checks the keys of one shard, in their order."""

    def __init__(self) -> None:
        self._seen: set[str] = set()

    def problem(self, key: str) -> str | None:
        """Return ``unsafe_name`` for a key that leads out of a folder, ``duplicate_key`` for one seen before."""
        if key.startswith("/") or ".." in key.split("/"):
            return "unsafe_name"
        if key in self._seen:
            return "duplicate_key"
        self._seen.add(key)
        return None


# --- links


def web_url(link: str, base: URL | None = None) -> URL | None:
    """Return the http or https URL of a link, against ``base``, without user, password and fragment; else ``None``."""
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
