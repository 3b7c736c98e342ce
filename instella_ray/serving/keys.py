"""API keys: the variable INSTELLA_API_KEYS and ``api_keys_file``, which is read again while the endpoint runs."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import os
import re
import secrets
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import Field, StringConstraints

from ..config import Config, validate
from ..errors import UserError

KEYS_VARIABLE = "INSTELLA_API_KEYS"
SHORTEST_KEY = 16
UNNAMED = "unnamed"
"""Name of keys without an entry: those of the variable and of a plain list."""
ANONYMOUS = "anonymous"
"""Name of callers without a key, where there are no keys."""
NO_KEY = "none"
"""Name in metrics of requests that were refused for lack of a valid key."""
RELOAD_S = 2.0
"""Seconds between two looks at the file."""
log = logging.getLogger(__name__)


class ApiKey(Config):
    """One API key by its hash, with the limits of whoever holds it."""

    name: Annotated[str, StringConstraints(pattern=r"^[\w.@-]{1,64}$")]
    """Name in audit lines and metrics: letters, digits and ``_ . @ -``."""
    sha256: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
    """SHA-256 of the key, in hexadecimal; the key itself is stored nowhere."""
    requests_per_minute: int | None = Field(None, ge=1)
    """Maximum requests for images in any 60 seconds. None: no limit."""
    concurrent_images: int | None = Field(None, ge=1)
    """Maximum images in progress. None: no limit but the endpoint's."""
    models: tuple[str, ...] | None = Field(None, min_length=1)
    """Models that the key may use. None: all."""

    @classmethod
    def unnamed(cls, key: str) -> ApiKey:
        return cls(name=UNNAMED, sha256=digest(key.encode()))


class ApiKeys:
    """Valid API keys of an endpoint, by their hashes, so that neither Serve's state nor a log contains a key."""

    def __init__(
        self, keys: Iterable[str] = (), file: str | None = None, models: Collection[str] | None = None
    ) -> None:
        """``file`` is the api_keys_file, whose entries may name ``models`` (None: any).

        Raises UserError as :func:`read_keys`, and for a key of ``keys`` as for a line of a file.
        """
        self.fixed = tuple(ApiKey.unnamed(_checked(key, "API keys")) for key in keys)
        self.file = os.path.abspath(file) if file is not None else None
        self.models = frozenset(models) if models is not None else None
        self.of_file = read_keys(self.file, self.models) if self.file is not None else ()
        self._problem = ""

    @classmethod
    def load(cls, file: str | None = None, models: Collection[str] | None = None) -> ApiKeys:
        """Load the keys of the variable INSTELLA_API_KEYS, comma-separated, and of ``file``.

        Raises UserError as the constructor.
        """
        keys = (key.strip() for key in os.environ.get(KEYS_VARIABLE, "").split(","))
        return cls(filter(None, keys), file, models)

    def __bool__(self) -> bool:
        return bool(self.fixed or self.of_file)

    def find(self, key: bytes) -> ApiKey | None:
        """Return the entry of ``key``, in a time that does not depend on which it is; None if there is none."""
        given, found = digest(key), None
        for known in (*self.fixed, *self.of_file):
            # All are compared: a loop that ended at the first match would reveal by its timing which key matched.
            if hmac.compare_digest(given, known.sha256):
                found = known
        return found

    def reload(self) -> None:
        """Read the file again; if it is invalid, keep the keys and log each problem once."""
        assert self.file is not None
        try:
            found = read_keys(self.file, self.models)
        except UserError as error:
            if (problem := str(error)) != self._problem:
                log.error("%s; the keys read before remain valid", problem)
            self._problem = problem
            return
        if found != self.of_file:
            log.info("api_keys_file %s: read again, %d keys", self.file, len(found))
        self.of_file, self._problem = found, ""

    async def watch(self) -> None:
        """Reload every RELOAD_S seconds, in a thread, until cancelled; returns at once without a file."""
        while self.file is not None:
            await asyncio.sleep(RELOAD_S)
            await asyncio.to_thread(self.reload)


def read_keys(file: str, models: Collection[str] | None = None) -> tuple[ApiKey, ...]:
    """Read a file of keys: one per line, where # begins a comment, or a YAML or JSON list of :class:`ApiKey`.

    Raises UserError naming the file, the line and what was expected: for a file that cannot be read or holds no key, a
    key that is short, contains spaces or is not ASCII, an invalid entry, one that names none of ``models``, and a name or
    hash that is listed twice. No message contains a key.
    """
    source = f"api_keys_file {file}"
    try:
        text = Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{source}: cannot be read ({error})") from None
    lines = {
        number: line.strip()
        for number, line in enumerate(text.splitlines(), 1)
        if line.strip() and not line.lstrip().startswith("#")
    }
    first = next(iter(lines.values()), "")
    if re.match(r"---$|-( |$)|\[ *([{\]]|$)", first):
        found = _entries(text, source, models)
    else:
        found = tuple(ApiKey.unnamed(_checked(line, f"{source}, line {number}")) for number, line in lines.items())
    if not found:
        raise UserError(f"{source}: holds no key")
    return found


def new_key() -> str:
    """Return a new random key of 256 bits."""
    return f"instella-{secrets.token_urlsafe(32)}"


def digest(key: bytes) -> str:
    """Return the SHA-256 of ``key`` in hexadecimal."""
    return hashlib.sha256(key).hexdigest()


def _checked(key: str, source: str) -> str:
    if len(key) < SHORTEST_KEY or not key.isascii() or " " in key:
        # The message omits the key, because it is written to logs.
        raise UserError(f"{source}: expected a key of at least {SHORTEST_KEY} ASCII characters, without spaces")
    return key


def _entries(text: str, source: str, models: Collection[str] | None) -> tuple[ApiKey, ...]:
    try:
        nodes, values = yaml.compose(text, yaml.SafeLoader), yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:  # PyYAML raises a plain ValueError for an impossible date
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        reason = getattr(error, "problem", None) or "invalid value"
        raise UserError(f"{source}{where}: expected a YAML or JSON list of entries ({reason})") from None
    if not isinstance(nodes, yaml.SequenceNode):
        raise UserError(f"{source}, line 1: expected a list of entries with name and sha256")
    found: list[ApiKey] = []
    seen: dict[str, int] = {}
    for node, value in zip(nodes.value, values, strict=True):
        line = node.start_mark.line + 1
        entry = _entry(value, f"{source}, line {line}", models)
        for what, text in (("name", entry.name), ("sha256", entry.sha256)):
            if text in seen:
                raise UserError(f"{source}, line {line}: {what}: is that of line {seen[text]}, expected another one")
            seen[text] = line
        found.append(entry)
    return tuple(found)


def _entry(value: Any, source: str, models: Collection[str] | None) -> ApiKey:
    if not isinstance(value, dict):
        raise UserError(f"{source}: expected an entry with name and sha256")
    # Checked here, because pydantic's message would contain the value, and whoever errs may have written the key.
    if not re.fullmatch(r"[0-9a-f]{64}", str(value.get("sha256"))):
        raise UserError(f"{source}: sha256: expected the key's SHA-256, 64 hexadecimal digits in small letters")
    entry = validate(ApiKey, value, source)
    if entry.name in (UNNAMED, ANONYMOUS, NO_KEY):
        raise UserError(f"{source}: name: {entry.name} stands for requests without a named key, expected another one")
    for name in entry.models or ():
        if models is not None and name not in models:
            raise UserError(f"{source}: models: '{name}' is not served, expected one of {', '.join(models)}")
    return entry
