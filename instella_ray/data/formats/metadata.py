"""Metadata from outside: JSON objects and numbers about images, in the form in which this package keeps them."""

from __future__ import annotations

import datetime
import json
import math
from collections.abc import Mapping
from typing import Any

from .texts import clean_text

LAION_NAMES = ("url", "width", "height", "pwatermark", "punsafe", "similarity", "hash")
"""LAION's columns, which sets spell in capitals or not; kept in small letters."""


def json_object(text: str) -> dict[str, Any] | None:
    """Return the object that ``text`` holds, ``None`` where it holds none or what no UTF-8 text can."""
    try:
        value = json.loads(text)
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode()  # half of a surrogate pair is no text to Arrow
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def number(value: Any) -> float | None:
    """Return a finite number, given as one or as its text; ``None`` for anything else, truth values among it."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        found = float(value)
    except (ValueError, OverflowError):
        return None
    return found if math.isfinite(found) else None


def score(meta: Mapping[str, Any], name: str) -> float | None:
    """Return the number under one of LAION's names, in small letters or capitals; ``None`` where there is none."""
    return number(meta.get(name, meta.get(name.upper())))


def column_name(column: str) -> str:
    """Return the name under which a column is kept: LAION's in small letters, others as they are."""
    return column.lower() if column.lower() in LAION_NAMES else column


def json_value(value: Any) -> Any:
    """Return a column's value as JSON holds it: text for bytes, ISO text for times, ``None`` for NaN and infinities."""
    if isinstance(value, bytes):
        return clean_text(value)
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
