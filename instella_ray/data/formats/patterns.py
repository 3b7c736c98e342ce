"""Patterns of inputs: paths, globs, braces, folders and URLs, as one text or a list; and the labels of what they name.

All jobs resolve their inputs here: :func:`split_pattern` and :func:`expand_part` say what is meant,
:func:`.names.find_files` what is there.
"""

from __future__ import annotations

import hashlib
import os
import re
from typing import Annotated
from urllib.parse import urlsplit

from braceexpand import braceexpand

from ... import storage
from ...config import PathKind

Pattern = Annotated[str | tuple[str, ...], PathKind()]
"""Text with parts separated by commas, or a list of parts, whose commas are those of names."""
FOLDER_CHARACTERS, NAME_CHARACTERS = 40, 60
"""Readable characters of a label, from the ends of the names of the folder and of the file: suffixes keep it below 200."""


def split_pattern(pattern: Pattern) -> list[str]:
    """Split a pattern at its commas, stripping whitespace; a list has its parts already.

    Commas within braces separate nothing, nor do those of a path that exists or a glob that matches as a whole.
    """
    if not isinstance(pattern, str):
        return list(pattern)
    parts = [part.strip() for part in _at_commas(pattern)]
    return [pattern] if len(parts) == 1 or not all(parts) or _is_one_path(pattern, parts) else parts


def expand_part(part: str) -> list[str]:
    """Expand a part of a pattern into absolute paths, URLs or globs: ``~``, and braces such as ``{00000..00004}``.

    Folders and files that exist as they are written have no braces. ``**`` beside other characters, as in ``**.tar``,
    means folders at any depth too.
    """
    path = storage.absolute(_as_named(part))
    rest = storage.split_glob(path, "{*?[")[1]
    if not rest:
        return [path]
    start, rest = (path.removesuffix(rest), rest) if path.endswith(rest) else ("", path)
    try:
        return [start + _with_folders(each) for each in braceexpand(rest, escape=False)]
    except ValueError:  # unbalanced: no braces but part of a name
        return [start + _with_folders(rest)]


def absolute_pattern(pattern: Pattern) -> Pattern:
    """Make the paths of a pattern absolute, because workers run in other working directories; a list if it has parts."""
    parts = tuple(storage.absolute(_as_named(part)) for part in split_pattern(pattern))
    return parts[0] if len(parts) == 1 else parts


def pattern_text(pattern: Pattern) -> str:
    """Return a pattern as text, for messages and records."""
    return pattern if isinstance(pattern, str) else ", ".join(pattern)


def file_name(url: str) -> str:
    """Return the name of a file, without its folders and, of an http or https URL, without its query."""
    return _path(url).rpartition("/")[2]


def shard_label(url: str, path: str | None = None) -> str:
    """Name a shard by its folder and file and a hash of its absolute path or URL; a function of this URL alone.

    ``path`` is the part of the URL that names folder and file, if that is not the whole.
    Labels are parts of file names: at most 115 ASCII letters, digits, dots, ``-`` and ``_``, and no dot first.
    """
    folder, _, name = _path(path or url).rpartition("/")
    folder, name = folder.rpartition("/")[2], re.sub(r"\.(tar|parquet|csv|tsv|jsonl)$", "", name)
    words = ((folder, FOLDER_CHARACTERS), (name, NAME_CHARACTERS))
    safe = (re.sub(r"[^A-Za-z0-9._-]+", "_", word)[-size:].lstrip(".") for word, size in words)
    readable = "__".join(filter(None, safe))
    return f"{readable}-{hashlib.sha256(os.fsencode(url)).hexdigest()[:12]}"


def is_http(url: str) -> bool:
    """Return whether an http or https server holds the file, which then has no folders but pages of links."""
    return url.rpartition("::")[2].startswith(("http://", "https://"))


def _path(url: str) -> str:
    """Return the path of a URL, its host first."""
    if storage.is_local(url):
        return url
    if is_http(url):
        parts = urlsplit(url.rpartition("::")[2])
        return parts.netloc + parts.path
    return url.partition("::")[0].partition("://")[2] or url


def _at_commas(text: str) -> list[str]:
    parts, depth = [""], 0
    for character in text:
        depth = max(0, depth + (character == "{") - (character == "}"))
        if character == "," and not depth:
            parts.append("")
        else:
            parts[-1] += character
    return parts


def _is_one_path(pattern: str, parts: list[str]) -> bool:
    """Return whether text with commas is the name of something or, of local files, a glob that matches."""
    if any("://" in part for part in parts[1:]):
        return False
    path = storage.absolute(_as_named(pattern))
    return storage.kind(path) is not None or (storage.is_local(path) and bool(storage.sizes(path)))


def _as_named(part: str) -> str:
    """Strip whitespace, unless it belongs to the name of a local file or folder."""
    return part if storage.is_local(part) and os.path.lexists(storage.absolute(part)) else part.strip()


def _with_folders(glob: str) -> str:
    """Write ``**.tar`` as ``**/*.tar``, and ``**`` within a name, where it means no more than that, as ``*``."""
    names = (name if name == "**" else re.sub(r"^\*\*(?=.)", "**/*", name) for name in glob.split("/"))
    return "/".join(re.sub(r"(?<=[^/])\*\*+", "*", name) for name in names)
