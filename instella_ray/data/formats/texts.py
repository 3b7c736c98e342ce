"""Texts from outside: captions and prompts, from bytes, JSON values and columns of any type to one line of Unicode."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

CAPTION_NAMES = ("caption", "text", "txt", "prompt", "alt_text")
"""Keys of JSON objects and columns of tables that hold a caption, the most wanted first."""
PROMPT_NAMES = ("prompt", "caption", "caption_long", "text")
"""The same for a prompt."""


class TextError(ValueError):
    """A value is no text; the message names its type."""


def clean_text(data: bytes) -> str:
    """Decode UTF-8, replace what is not, and join the words by single spaces: no line breaks, no NUL bytes, no mark."""
    return one_line(data.decode("utf-8-sig", "replace"))


def one_line(text: str) -> str:
    """Join the words of ``text`` by single spaces; NUL counts as a space."""
    return " ".join(trimmed(text.replace("\0", " ")).split())


def trimmed(text: str) -> str:
    """Strip the space around ``text``; halves of surrogate pairs, which JSON may carry and no file, become ``?``."""
    return text.encode("utf-8", "replace").decode().strip()


def text_of(value: Any, clean: Callable[[str], str] = one_line) -> str:
    """Return the text of a JSON value or of a column's value through ``clean``; ``""`` for null, NaN and blanks.

    Of a list of texts the first that is not blank counts. :class:`TextError` for numbers, truth values, objects and
    lists of anything else: what such a value says is not a caption.
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, str):
        return clean(value)
    if isinstance(value, bytes):
        return clean(value.decode("utf-8-sig", "replace"))
    if isinstance(value, list | tuple) and all(item is None or isinstance(item, str | bytes) for item in value):
        return next(filter(None, (text_of(item, clean) for item in value)), "")
    kind = {bool: "truth value", int: "number", float: "number", dict: "object", list: "list"}.get(type(value))
    raise TextError(f"{kind or type(value).__name__}, expected text")


def decode_line(line: bytes) -> str:
    """Decode one line of a text file, without a byte order mark; UnicodeDecodeError where it is not UTF-8."""
    return line.decode("utf-8-sig")


def both_captions(caption: str, meta: Mapping[str, Any]) -> dict[str, str]:
    """Return ``caption_long`` and ``caption_short`` of a sample; ``caption`` stands in for what ``meta`` lacks."""
    given = {name: meta.get(name) for name in ("caption_long", "caption_short")}
    return {name: text if isinstance(text, str) and text else caption for name, text in given.items()}
