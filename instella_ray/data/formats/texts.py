"""Captions and prompts of inputs: converts bytes, JSON values and column values into one line of Unicode text."""

from __future__ import annotations

import ast
import codecs
import math
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Annotated, Any

from pydantic import Field

CAPTION_NAMES = ("caption", "caption_long", "text", "txt", "top_caption", "alt_text", "captions", "prompt")
"""Default names, in any case, of JSON keys and columns with captions, in order of preference.

``caption`` is img2dataset's, Conceptual Captions' and Re-LAION's, ``TEXT`` LAION's, ``text`` COYO's, DataComp's and
``imagefolder``'s, ``top_caption`` that of LAION-COCO.
"""
CaptionKeys = Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(min_length=1)]
PROMPT_NAMES = ("prompt", "caption", "caption_long", "text", "prompts")
"""Names, in any case, of JSON keys and columns with prompts, in order of preference; the last is DrawBench's."""
_MARKS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
"""Byte order marks; those of UTF-32 before those of UTF-16, with which they start."""
_QUOTED = r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\""
_PRINTED_LIST = re.compile(rf"\[\s*(?:(?:{_QUOTED}|None|null|nan|NaN)[\s,]*)+\]")
_PRINTED_OBJECT = re.compile(rf"\{{\s*(?:{_QUOTED})\s*:.*\}}")


class TextError(ValueError):
    """Value that is not text; the message names its type."""


def decode_text(data: bytes) -> str:
    """Decode text by its byte order mark, as UTF-16 if it has a NUL in every other byte, as UTF-8, or as Windows-1252.

    UTF-8 may have damaged characters. Windows-1252, of which Latin-1 is a part, is taken for text of mostly ASCII without
    any character of UTF-8. Raises TextError for anything else, such as an image or a text in another encoding.
    """
    if (encoding := text_encoding(data)) != "utf-8":
        return data.decode(encoding, "replace")
    try:
        return data.decode()
    except UnicodeDecodeError:
        text = data.decode("utf-8", "replace")
    if 3 * text.count("\ufffd") <= len(text):
        if any("\x7f" < char != "\ufffd" for char in text):
            return text
        with suppress(UnicodeDecodeError):
            return data.decode("cp1252")
    raise TextError("bytes in an unknown encoding, expected text")


def clean_text(data: bytes) -> str:
    """Decode as :func:`decode_text`, or else UTF-8 with invalid bytes replaced, to :func:`one_line`."""
    try:
        return one_line(decode_text(data))
    except TextError:
        return one_line(data.decode("utf-8", "replace"))


def one_line(text: str) -> str:
    """Collapse whitespace, NUL included, to single spaces."""
    return " ".join(trimmed(text.replace("\0", " ")).split())


def trimmed(text: str) -> str:
    """Strip whitespace and a leading byte order mark, and replace unpaired surrogates, which JSON may contain, by ``?``."""
    return text.encode("utf-8", "replace").decode().strip().lstrip("\ufeff").lstrip()


def text_of(value: Any, clean: Callable[[str], str] = one_line) -> str:
    """Return the text of a JSON or column value, normalised by ``clean``; ``""`` for null, NaN and blank text.

    Of a list of texts, returns the first that is not blank. Raises :class:`TextError` for numbers, booleans, objects,
    lists of anything else, and bytes that are not text, which are not captions.
    """
    if _is_missing(value):
        return ""
    if isinstance(value, str):
        return clean(value)
    if isinstance(value, bytes):
        return clean(decode_text(value))
    if isinstance(value, list | tuple) and all(_is_missing(item) or isinstance(item, str | bytes) for item in value):
        return next(filter(None, (text_of(item, clean) for item in value)), "")
    kind = {bool: "boolean", int: "number", float: "number", dict: "object", list: "list"}.get(type(value))
    raise TextError(f"{kind or type(value).__name__}, expected text")


def caption_text(value: Any, clean: Callable[[str], str] = one_line) -> str:
    """Return the text of a caption as :func:`text_of`, also of a printed list or NaN, which writers leave in text files.

    Raises :class:`TextError` for a printed object too.
    """
    text = text_of(value, clean)
    if text in ("nan", "NaN"):
        return ""
    if _PRINTED_LIST.fullmatch(text):
        return text_of([_unquoted(item) for item in re.findall(_QUOTED, text)], clean)
    if _PRINTED_OBJECT.fullmatch(text):
        raise TextError("object, expected text")
    return text


def caption_of(values: Mapping[str, Any], names: Sequence[str] = CAPTION_NAMES) -> str:
    """Return the first caption that is not blank under ``names``, in any case; ``""`` if there is none.

    Raises TextError if there is none because a value is not text.
    """
    by_name = {name.lower(): value for name, value in reversed(list(values.items()))}
    problem: TextError | None = None
    for name in names:
        try:
            if text := caption_text(by_name.get(name.lower())):
                return text
        except TextError as error:
            problem = problem or error
    if problem:
        raise problem
    return ""


def text_encoding(start: bytes) -> str:
    """Return the encoding of a text file by its first bytes: of its byte order mark, UTF-16 of mostly ASCII, or UTF-8."""
    marked = next((name for mark, name in _MARKS.items() if start.startswith(mark)), None)
    return marked or _utf_16(start) or "utf-8"


def both_captions(caption: str, meta: Mapping[str, Any]) -> dict[str, str]:
    """Return ``caption_long`` and ``caption_short`` of a sample from ``meta``; ``caption`` replaces missing ones.

    Dalle-1M calls them ``long_caption`` and ``short_caption``.
    """
    names = {f"caption_{kind}": f"{kind}_caption" for kind in ("long", "short")}
    found = {ours: _text_or_blank(meta.get(ours)) or _text_or_blank(meta.get(other)) for ours, other in names.items()}
    return {name: text or caption for name, text in found.items()}


def _is_missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def _unquoted(item: str) -> str:
    try:
        return str(ast.literal_eval(item))
    except (ValueError, SyntaxError):
        return item[1:-1]


def _utf_16(data: bytes) -> str | None:
    """Return the byte order of UTF-16 text of mostly ASCII without a mark; None for any other data."""
    half = len(data) // 2
    if len(data) % 2 or not half:
        return None
    low, high = data[::2].count(0), data[1::2].count(0)
    if min(low, high) or max(low, high) <= half // 2:
        return None
    return "utf-16-le" if high else "utf-16-be"


def _text_or_blank(value: Any) -> str:
    try:
        return text_of(value)
    except TextError:
        return ""
