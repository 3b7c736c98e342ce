"""URLs and paths, as texts: which is which, chains of fsspec, and percent-encoding that is left as it is given."""

from __future__ import annotations

import os
import re
from urllib.parse import quote, urlsplit, urlunsplit

import fsspec
from yarl import URL

_URL = re.compile(r"(?P<protocol>[A-Za-z][A-Za-z0-9+.-]*)(?P<separator>://|::)")
_NO_URL_CHARACTER = re.compile(r"%(?![0-9A-Fa-f]{2})|[^A-Za-z0-9._~:/?#@!$&'()*+,;=%\[\]-]")


def is_local(url: str) -> bool:
    """Return whether ``url`` is a path on this machine, given as such or as ``file://``; not one within an archive."""
    found = _URL.match(url)
    if found is None:
        return True
    if found["separator"] == "::":
        return found["protocol"] not in fsspec.available_protocols()  # a file name with colons
    return found["protocol"] in ("file", "local") and "::" not in url


def is_relative(path: str) -> bool:
    """Return whether ``path`` means something else in another working directory, or in another user's home (``~``)."""
    return is_local(path) and not os.path.isabs(_without_protocol(path))


def absolute(path: str) -> str:
    """Return a path or URL that means the same in another working directory; workers run in directories of their own.

    ``~`` is expanded, and ``file://`` removed.
    """
    if not is_local(path):
        return path
    return os.path.abspath(os.path.expanduser(_without_protocol(path)))


def _without_protocol(path: str) -> str:
    return re.sub("^(file|local)://", "", path)


def encoded_link(link: str) -> str:
    """Percent-encode what an http or https URL may not hold, and leave the rest: servers may have signed its text.

    Names of hosts in other scripts are encoded as in DNS. Raises ValueError for a host or port that is none.
    """
    parts = urlsplit(link)
    host = URL(f"{parts.scheme}://{parts.netloc}").raw_authority if parts.netloc else ""
    path, query, fragment = (_NO_URL_CHARACTER.sub(lambda found: quote(found[0], safe=""), text) for text in parts[2:])
    return urlunsplit((parts.scheme, host, path, query, fragment))


def encoded_chain(url: str) -> str:
    """Encode the http or https URL at the end of a chain such as ``simplecache::https://host/a b.tar``."""
    chain, link = re.split(r"(?=https?://)", url, maxsplit=1)
    return chain + encoded_link(link)


def split_archive(path: str) -> tuple[str, str]:
    """Split the URL of a file within an archive, such as ``zip://a.tar::gs://b/c.zip``, before the archive's own URL."""
    first, chain, rest = path.partition("::")
    return (first, chain + rest) if not is_local(path) and "://" in first else (path, "")


def url_of(pattern: str, path: str) -> str:
    """Return the URL of a path that the filesystem of ``pattern`` names: fsspec leaves out the protocol, except of HTTP."""
    first, chain, rest = pattern.partition("::")
    if chain and "://" not in first:  # a cache, whose paths are those of the store behind it
        return f"{first}::{url_of(rest, path)}"
    protocol = first.partition("://")[0]
    if path.startswith(f"{protocol}://") or is_local(pattern):
        return path
    return f"{protocol}://{path if protocol in ('file', 'local') else path.lstrip('/')}{chain}{rest}"
