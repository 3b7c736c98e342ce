"""Names of inputs: shards and folders of patterns, lists of shards, image files and links.

A pattern (:mod:`.patterns`) is a path, a glob, a folder, a list of shards (a JSON file, so that a bucket of a million
objects is listed only once), or several of these; local, or any URL that fsspec supports.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import NamedTuple
from urllib.parse import urljoin

from pydantic import Field, TypeAdapter, ValidationError
from yarl import URL

from ... import storage
from ...config import Config, check_output_file
from ...errors import UserError
from ...urls import encoded_link
from .files import list_files
from .images import IMAGE_ENDINGS
from .parts import Part, refuse_unfinished
from .patterns import Pattern, expand_part, file_name, is_http, pattern_text, shard_label, split_pattern
from .tar_reader import COMPRESSED_ENDINGS, compressed_error

SHARD_LIST = "shards.json"
"""Name of the list of shards in their folder; read by jobs whose input is the folder."""
LISTINGS_AT_ONCE = 32
"""Parts of a pattern that are listed concurrently: braces may have one for every shard."""

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


class Found(NamedTuple):
    """What a pattern stands for."""

    files: list[ShardEntry]
    """Shards, and tables named themselves, sorted by URL."""
    folders: dict[str, dict[str, int]]
    """Folders of images: URL -> files (:func:`.files.list_files`)."""


def find_shards(
    pattern: Pattern, suffixes: str | Sequence[str] = ".tar", *, output: str | None = None
) -> dict[str, str]:
    """Map the URLs of the shards of :func:`find_files`, sorted, to their labels (:func:`.patterns.shard_label`)."""
    labels = {entry.url: shard_label(entry.url) for entry in find_files(pattern, suffixes, output=output)}
    refuse_twins(list(labels.values()))
    return labels


def find_files(
    pattern: Pattern, suffixes: str | Sequence[str] = ".tar", *, output: str | None = None
) -> list[ShardEntry]:
    """List the shards that match ``pattern``, with one of ``suffixes``, and their sizes; see :func:`resolve`."""
    return resolve(pattern, (suffixes,) if isinstance(suffixes, str) else tuple(suffixes), output=output).files


def resolve(
    pattern: Pattern,
    suffixes: tuple[str, ...],
    tables: tuple[str, ...] = (),
    *,
    images: bool = False,
    output: str | None = None,
) -> Found:
    """Find what ``pattern`` stands for; each part of it costs at most one listing.

    A folder stands for the shards in its list, or without a list for all files with the first of ``suffixes`` that
    matches any, else, with ``images``, for the images in it and below. Files with one of ``tables`` are found by their own
    names, globs and lists only. What lies in the folder ``output``, that of the job itself, is no input. Raises UserError
    for a part of the pattern that matches nothing, and for the output of an unfinished job.
    """
    given = [(part, each) for part in split_pattern(pattern) for each in expand_part(part)]
    found, folders = dict[str, ShardEntry](), dict[str, dict[str, int]]()
    with ThreadPoolExecutor(LISTINGS_AT_ONCE) as threads:
        listed = threads.map(partial(_part_files, suffixes=suffixes, tables=tables), [each for _, each in given])
        for (part, each), entries in zip(given, listed, strict=True):
            found |= {entry.url: entry for entry in entries}
            if entries:
                continue
            for folder in _folders([each, storage.join(each, "")]):
                if not (output and _within(folder, output)):
                    refuse_unfinished(folder)
            if images and _is_folder(each):
                root = each.rstrip("/")
                folders[root] = _image_folder(root, output)
                continue
            where = f" for {each}" if len(expand_part(part)) > 1 else ""
            expected = f"{_kinds((*suffixes, *tables))}{', or a folder of images' if images else ''}"
            raise UserError(f"{part}: no shard found{where}; expected {expected}, for example 'data/*{suffixes[0]}'")
        if output:
            found = {url: found[url] for url in _without_output(found, output)}
        if not found and not folders:
            raise UserError(f"{pattern_text(pattern)}: only the output of this job, which is no input of its own")
        list(threads.map(refuse_unfinished, _folders(found)))
    return Found([found[url] for url in sorted(found)], folders)


def _image_folder(folder: str, output: str | None) -> dict[str, int]:
    """Return the files of a folder of images, except those in ``output``; UserError without images."""
    files = {storage.join(folder, name): size for name, size in list_files(folder).items()}
    kept = _without_output(files, output) if output else files
    if not any(map(image_extension, kept)):
        raise no_images(folder)
    return {url.removeprefix(f"{folder}/"): files[url] for url in kept}


def _is_folder(url: str) -> bool:
    fs, path = storage.filesystem(url)
    return bool(fs.isdir(path))


def _kinds(suffixes: Sequence[str]) -> str:
    """Name kinds of files, as in ``WebDataset tars, .parquet or .csv files``."""
    *others, last = ["WebDataset tars" if suffix == ".tar" else suffix for suffix in suffixes]
    kinds = f"{', '.join(others)} or {last}" if others else last
    return kinds if suffixes[-1] == ".tar" else f"{kinds} files"


def _without_output(urls: Iterable[str], output: str) -> list[str]:
    """Leave out the files that are in the folder ``output`` or below it."""
    urls = list(urls)
    own = {folder for folder in _folders(urls) if _within(folder, output)}
    return [url for url in urls if os.path.dirname(url) not in own]


def _folders(urls: Iterable[str]) -> list[str]:
    """Return the folders of shards in which outputs of jobs may be: not those of web servers and archives."""
    plain = (url for url in urls if storage.is_local(url) or not ("::" in url or is_http(url)))
    return sorted({os.path.dirname(url) for url in plain})


def _within(folder: str, output: str) -> bool:
    """Return whether ``folder`` is ``output`` or below it, however links lead there."""
    output = storage.absolute(output)
    inner, outer = (storage.join(os.path.realpath(f) if storage.is_local(f) else f, "") for f in (folder, output))
    return inner.startswith(outer)


def no_images(folder: str) -> UserError:
    """Return the error for a folder without images, which names what was expected."""
    kinds = f"{', '.join(IMAGE_ENDINGS[:-1])} or {IMAGE_ENDINGS[-1]}"
    return UserError(f"{folder}: no images found; expected tars, parquet files, or a folder of {kinds}")


def refuse_compressed(urls: Iterable[str]) -> None:
    """Raise UserError for a compressed tar, by the endings of ``urls``."""
    for url in urls:
        kind = next((kind for ending, kind in COMPRESSED_ENDINGS.items() if file_name(url).endswith(ending)), None)
        if kind:
            raise compressed_error(url, kind)


def list_shards(pattern: Pattern, output: str, suffixes: str | Sequence[str]) -> ShardList:
    """Write the list of the shards of :func:`find_shards` to the file ``output``; UserError unless it ends with .json."""
    if not output.endswith(".json"):
        raise UserError(f"output {output}: expected a name that ends with .json, as lists of shards have")
    check_output_file(output)
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


def _part_files(part: str, suffixes: tuple[str, ...], tables: tuple[str, ...]) -> list[ShardEntry]:
    """List the files that an expanded part of a pattern names, with one of ``suffixes`` or ``tables``; there may be none."""
    return [entry for entry in _listed(part, suffixes, tables) if file_name(entry.url).endswith((*suffixes, *tables))]


def _listed(part: str, suffixes: tuple[str, ...], tables: tuple[str, ...]) -> list[ShardEntry]:
    if part.endswith(".json"):
        return read_shard_list(part)
    named = file_name(part).endswith((*suffixes, *tables))
    if named and (files := _matches(part)):
        return files
    if storage.kind(part) == "directory" or (is_http(part) and not named and "*" not in part):
        return _folder_files(part, suffixes)
    return [] if named else _matches(part)


def _matches(part: str) -> list[ShardEntry]:
    found = storage.sizes(part)
    refuse_compressed(found)
    return _entries(_without_sidecars(found))


def _folder_files(folder: str, suffixes: tuple[str, ...]) -> list[ShardEntry]:
    if storage.exists(listed := storage.join(folder, SHARD_LIST)):
        return read_shard_list(listed)
    files = storage.sizes(storage.join(folder, "*"))
    refuse_compressed(files)
    by_suffix = ({url: size for url, size in files.items() if file_name(url).endswith(suffix)} for suffix in suffixes)
    return _entries(next(filter(None, by_suffix), {}))


def _entries(files: dict[str, int]) -> list[ShardEntry]:
    return [ShardEntry(url=url, bytes=size) for url, size in files.items()]


def _without_sidecars(files: dict[str, int]) -> dict[str, int]:
    """Exclude the parquet file of metadata that img2dataset writes beside each tar: it describes the same samples."""
    tars = {url.removesuffix(".tar") for url in files if url.endswith(".tar")}
    return {url: size for url, size in files.items() if url.removesuffix(".parquet") not in tars}


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
