"""Captions and prompts of inputs: converts bytes, JSON values and column values into one line of Unicode text."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

CAPTION_NAMES = ("caption", "caption_long", "text", "txt", "prompt", "alt_text")
"""Names of JSON keys and columns with captions, in order of preference."""
PROMPT_NAMES = ("prompt", "caption", "caption_long", "text")
"""Names of JSON keys and columns with prompts, in order of preference."""


class TextError(ValueError):
    """Value that is not text; the message names its type."""


def clean_text(data: bytes) -> str:
    """Decode UTF-8, replacing invalid bytes, to one line without byte order mark and NUL (:func:`one_line`)."""
    return one_line(data.decode("utf-8-sig", "replace"))


def one_line(text: str) -> str:
    """Collapse whitespace, NUL included, to single spaces."""
    return " ".join(trimmed(text.replace("\0", " ")).split())


def trimmed(text: str) -> str:
    """Strip whitespace, and replace unpaired surrogates, which JSON may contain but UTF-8 cannot encode, by ``?``."""
    return text.encode("utf-8", "replace").decode().strip()


def text_of(value: Any, clean: Callable[[str], str] = one_line) -> str:
    """Return the text of a JSON or column value, normalised by ``clean``; ``""`` for null, NaN and blank text.

    Of a list of texts, returns the first that is not blank. Raises :class:`TextError` for numbers, booleans, objects and
    lists of anything else, which are not captions.
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, str):
        return clean(value)
    if isinstance(value, bytes):
        return clean(value.decode("utf-8-sig", "replace"))
    if isinstance(value, list | tuple) and all(item is None or isinstance(item, str | bytes) for item in value):
        return next(filter(None, (text_of(item, clean) for item in value)), "")
    kind = {bool: "boolean", int: "number", float: "number", dict: "object", list: "list"}.get(type(value))
    raise TextError(f"{kind or type(value).__name__}, expected text")


def caption_of(meta: Mapping[str, Any]) -> str:
    """Return the first text under :data:`CAPTION_NAMES` that is not blank; ``""`` if there is none.

    Raises :class:`TextError` if none of them holds text, but one something else.
    """
    found, problem = "", None
    for name in CAPTION_NAMES:
        try:
            found = found or text_of(meta.get(name))
        except TextError as error:
            problem = problem or error
    if problem and not found:
        raise problem
    return found


def decode_line(line: bytes) -> str:
    """Decode one line of a text file, without byte order mark; UnicodeDecodeError if it is not UTF-8."""
    return line.decode("utf-8-sig")


def both_captions(caption: str, meta: Mapping[str, Any]) -> dict[str, str]:
    """Return ``caption_long`` and ``caption_short`` of a sample from ``meta``; ``caption`` replaces missing ones."""
    return {name: _text_or_blank(meta.get(name)) or caption for name in ("caption_long", "caption_short")}


def _text_or_blank(value: Any) -> str:
    try:
        return text_of(value)
    except TextError:
        return ""
