"""Keys of samples: names of tar members, and ids as keys that every reader of tars gives back unchanged."""

from __future__ import annotations

import hashlib
import re

ORIGINAL_KEY = "original_key"
"""Name in the metadata of the id of a sample whose key differs from it."""
SEGMENT_BYTES, KEY_BYTES = 200, 1000
"""Limits of a key and of its parts between slashes (bytes of UTF-8); file systems allow 255 and 4096 with the extension."""
_EXTENSION_BYTES = 50
_HASH_CHARS = 32
_MEMBER = re.compile(r"(?P<key>(?:.*/)?[^./][^./]*)\.(?P<extension>[^/]+)", re.DOTALL)
_EDGE_SLASH = re.compile(r"\A/|/(?=/|\Z)|(?<=/)/")
"""A slash at the start, at the end, or beside another one: paths are often normalised, which would drop it."""
_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


def member_name(name: str) -> tuple[str, str] | None:
    """Split the name of a tar member at the first dot of its base name, as WebDataset does; ``None`` if it lacks a part.

    What follows the last dot is in lower case.
    """
    found = _MEMBER.fullmatch(name.removeprefix("./"))
    if not found:
        return None
    inner, dot, last = found["extension"].rpartition(".")
    return found["key"], inner + dot + last.lower()


def is_apple_double(name: str) -> bool:
    """Return whether a member holds attributes of macOS of the file beside it, ``._NAME``, rather than a file."""
    return name.rpartition("/")[2].startswith("._")


def is_unsafe(name: str) -> bool:
    """Return whether the name of a tar member leads out of the folder that the tar is extracted to."""
    return name.startswith("/") or ".." in name.split("/")


def safe_key(name: str) -> str:
    """Return the key under which a tar holds the sample ``name``; a key is returned unchanged.

    Percent-encodes what readers of tars cut at, skip or cannot hold: dots of the base name, folders ``.`` and ``..``,
    slashes beside nothing, control characters and bytes that are not UTF-8 (surrogate escapes). Long names are shortened
    and end with their hash.
    """
    segments = _UNPRINTABLE.sub(_percent, _EDGE_SLASH.sub("%2F", name)).split("/")
    segments[:-1] = [part.replace(".", "%2E") if part in (".", "..") else part for part in segments[:-1]]
    segments[-1] = segments[-1].replace(".", "%2E")
    if len(segments) > 1 and segments[0].startswith("__") and segments[0].endswith("__"):
        segments[0] = "%5F" + segments[0][1:]  # webdataset skips such folders
    key = "/".join(segments)
    if len(key.encode()) > KEY_BYTES or max(len(part.encode()) for part in segments) > SEGMENT_BYTES:
        return _hashed(key, name)
    return key


def safe_extension(extension: str) -> str:
    """Return the extension under which a tar holds a further member of a sample, encoded as a key but for its dots."""
    escaped = _UNPRINTABLE.sub(_percent, extension)
    return escaped if len(escaped.encode()) <= _EXTENSION_BYTES else _hashed(escaped, extension, _EXTENSION_BYTES)


def readable(name: str) -> str:
    """Return a name with surrogate escapes, the bytes that are not UTF-8, replaced by ``\\xFF``."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


class Keys:
    """Keys of one shard: the same key for the same name, another for any other name."""

    def __init__(self) -> None:
        self._names: dict[str, str] = {}

    def assign(self, name: str) -> tuple[str, bool]:
        """Return the key of ``name``, and whether it is new to the shard."""
        key = safe_key(name)
        if self._names.get(key, name) != name:  # such as 'a.b' and 'a%2Eb'
            key = _hashed(key, name)
        new = key not in self._names
        self._names[key] = name
        return key, new


def _hashed(key: str, name: str, limit: int = SEGMENT_BYTES) -> str:
    """Return the start of ``key`` and the hash of ``name``, at most ``limit`` bytes without slashes and dots."""
    flat = key.replace("/", "%2F").replace(".", "%2E")
    start = flat.encode()[: limit - _HASH_CHARS - 2].decode("utf-8", "ignore")
    digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:_HASH_CHARS]
    # '%_' is not an encoded byte, so no other name has such a key by accident.
    return f"{re.sub('%.?$', '', start)}%_{digest}"


def _percent(found: re.Match[str]) -> str:
    errors = "surrogateescape" if "\udc80" <= found[0] <= "\udcff" else "surrogatepass"
    return "".join(f"%{byte:02X}" for byte in found[0].encode("utf-8", errors))
