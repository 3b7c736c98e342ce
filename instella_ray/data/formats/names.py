"""Names of inputs: shards of patterns, lists of shards, tar members, row keys and links.

A pattern (:mod:`.patterns`) is a path, a glob, a folder, a list of shards (a JSON file, so that a bucket of a million
objects is listed only once), or several of these; local, or any URL that fsspec supports.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from urllib.parse import urljoin

from pydantic import Field, TypeAdapter, ValidationError
from yarl import URL

from ... import storage
from ...config import Config
from ...errors import UserError
from ...urls import encoded_link
from .images import IMAGE_ENDINGS
from .parts import Part, refuse_unfinished
from .patterns import Pattern, expand_part, file_name, is_http, pattern_text, shard_label, split_pattern

SHARD_LIST = "shards.json"
"""Name of the list of shards in their folder; read by jobs whose input is the folder."""
LISTINGS_AT_ONCE = 32
"""Parts of a pattern that are listed concurrently: braces may have one for every shard."""
_MEMBER = re.compile(r"(?P<key>(?:.*/)?[^./][^./]*)\.(?P<extension>[^/]+)")


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


def find_shards(
    pattern: Pattern, suffixes: str | Sequence[str] = ".tar", *, output: str | None = None
) -> dict[str, str]:
    """Map the URLs of the shards that match ``pattern``, sorted, to their labels (:func:`.patterns.shard_label`).

    A folder stands for the shards in its list, or without a list for all files with the first of ``suffixes`` that
    matches any. What lies in the folder ``output``, that of the job itself, is no input. Raises UserError for a part of
    the pattern that matches nothing, and for the output of an unfinished job.
    """
    labels = {entry.url: shard_label(entry.url) for entry in find_files(pattern, suffixes, output=output)}
    refuse_twins(list(labels.values()))
    return labels


def find_files(
    pattern: Pattern, suffixes: str | Sequence[str] = ".tar", *, output: str | None = None
) -> list[ShardEntry]:
    """List the shards of :func:`find_shards` with their sizes; each part of the pattern costs at most one listing."""
    suffixes = (suffixes,) if isinstance(suffixes, str) else tuple(suffixes)
    given = [(part, each) for part in split_pattern(pattern) for each in expand_part(part)]
    found: dict[str, ShardEntry] = {}
    with ThreadPoolExecutor(LISTINGS_AT_ONCE) as threads:
        listed = threads.map(partial(_part_files, suffixes=suffixes), [each for _, each in given])
        for (part, each), entries in zip(given, listed, strict=True):
            files = {entry.url: entry for entry in entries if file_name(entry.url).endswith(suffixes)}
            if not files:
                for folder in _folders([each, storage.join(each, "")]):
                    if not (output and _within(folder, output)):
                        refuse_unfinished(folder)
                where = f" for {each}" if len(expand_part(part)) > 1 else ""
                kind = "WebDataset tars" if ".tar" in suffixes else f"{suffixes[0]} files"
                others = "".join(f" or {suffix} files" for suffix in suffixes[1:])
                example = f"for example 'data/*{suffixes[0]}'"
                raise UserError(f"{part}: no shard found{where}; expected {kind}{others}, {example}")
            found |= files
        own = {folder for folder in _folders(found) if output and _within(folder, output)}
        found = {url: entry for url, entry in found.items() if os.path.dirname(url) not in own}
        if not found:
            raise UserError(f"{pattern_text(pattern)}: only the output of this job, which is no input of its own")
        list(threads.map(refuse_unfinished, _folders(found)))
    return [found[url] for url in sorted(found)]


def _folders(urls: Iterable[str]) -> list[str]:
    """Return the folders of shards in which outputs of jobs may be: not those of web servers and archives."""
    plain = (url for url in urls if storage.is_local(url) or not ("::" in url or is_http(url)))
    return sorted({os.path.dirname(url) for url in plain})


def _within(folder: str, output: str) -> bool:
    """Return whether ``folder`` is ``output`` or below it, however links lead there."""
    output = storage.absolute(output)
    inner, outer = (storage.join(os.path.realpath(f) if storage.is_local(f) else f, "") for f in (folder, output))
    return inner.startswith(outer)


def names_shards(part: str, suffix: str) -> bool:
    """Return whether a part of a pattern ends with ``suffix``, or is a folder with files that do."""
    (path, *others) = expand_part(part)
    if others or storage.kind(path) != "directory":
        return file_name(path).endswith(suffix)
    return bool(storage.glob(storage.join(path, f"*{suffix}")))


def find_image_files(folder: str) -> list[str]:
    """List the image files of a folder, recursively, by their extension, as sorted paths relative to it.

    Raises UserError if there are none.
    """
    fs, root = storage.filesystem(folder)
    found = fs.find(root) if fs.isdir(root) else []
    files = sorted(path[len(root) :].strip("/") for path in found if image_extension(path))
    if not files:
        kinds = f"{', '.join(IMAGE_ENDINGS[:-1])} or {IMAGE_ENDINGS[-1]}"
        raise UserError(f"{folder}: no images found; expected tars, parquet files, or a folder of {kinds}")
    return files


def list_shards(pattern: Pattern, output: str, suffixes: str | Sequence[str]) -> ShardList:
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


def _part_files(part: str, suffixes: tuple[str, ...]) -> list[ShardEntry]:
    if part.endswith(".json"):
        return read_shard_list(part)
    named = file_name(part).endswith(suffixes)
    if named and (files := _without_sidecars(storage.sizes(part))):
        return _entries(files)
    if storage.kind(part) == "directory" or (is_http(part) and not named and "*" not in part):
        return _folder_files(part, suffixes)
    return [] if named else _entries(_without_sidecars(storage.sizes(part)))


def _folder_files(folder: str, suffixes: tuple[str, ...]) -> list[ShardEntry]:
    if storage.exists(listed := storage.join(folder, SHARD_LIST)):
        return read_shard_list(listed)
    files = storage.sizes(storage.join(folder, "*"))
    by_suffix = ({url: size for url, size in files.items() if file_name(url).endswith(suffix)} for suffix in suffixes)
    return _entries(next(filter(None, by_suffix), {}))


def _entries(files: dict[str, int]) -> list[ShardEntry]:
    return [ShardEntry(url=url, bytes=size) for url, size in files.items()]


def _without_sidecars(files: dict[str, int]) -> dict[str, int]:
    """Exclude the parquet file of metadata that img2dataset writes beside each tar: it describes the same samples."""
    tars = {url.removesuffix(".tar") for url in files if url.endswith(".tar")}
    return {url: size for url, size in files.items() if url.removesuffix(".parquet") not in tars}


# --- keys of samples


def member_name(name: str) -> tuple[str, str] | None:
    """Split the name of a tar member into its key and its lower-case extension; ``None`` if it lacks either."""
    found = _MEMBER.fullmatch(name.removeprefix("./"))
    return (found["key"], found["extension"].lower()) if found else None


def image_extension(name: str) -> str | None:
    """Return the lower-case extension of an image file or member; ``None`` if it is not one of an image."""
    ending = name.rpartition(".")[2].lower()
    return ending if ending in IMAGE_ENDINGS else None


def row_key(value: str | int | None) -> str:
    """Return the key for the id of a row, with dots replaced, because a tar key ends at the first; ``""`` for no id."""
    text = "" if value is None else str(value)
    return "/".join(part if part == ".." else part.replace(".", "_") for part in text.split("/"))


class Keys:
    """Checks the keys of one shard, in order."""

    def __init__(self) -> None:
        self._seen: set[str] = set()

    def problem(self, key: str) -> str | None:
        """Return ``unsafe_name`` for a key outside its folder, ``duplicate_key`` for a repeated one, else ``None``."""
        if key.startswith("/") or ".." in key.split("/"):
            return "unsafe_name"
        if key in self._seen:
            return "duplicate_key"
        self._seen.add(key)
        return None


# --- links


def web_url(link: str, base: URL | None = None) -> URL | None:
    """Parse a link, relative to ``base``, as an http or https URL without user, password and fragment; else ``None``.

    What is percent-encoded in the link stays as it is.
    """
    try:
        url = URL(encoded_link(urljoin(str(base or ""), link.strip())), encoded=True)
        return (
            url.with_user(None).with_fragment(None)
            if url.scheme in ("http", "https") and url.host and url.port
            else None
        )
    except ValueError:
        return None
