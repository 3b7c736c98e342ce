"""Metadata of input samples: parses JSON objects, numbers and column values into what this package stores."""

from __future__ import annotations

import datetime
import json
import math
from collections.abc import Mapping
from typing import Any

from .texts import clean_text

LAION_NAMES = ("url", "width", "height", "pwatermark", "punsafe", "similarity", "hash")
"""LAION's columns, which datasets write in either case; stored in lower case."""


def json_object(text: str) -> dict[str, Any] | None:
    """Parse ``text`` as a JSON object; ``None`` if it is not one, or contains text that UTF-8 cannot encode."""
    try:
        value = json.loads(text)
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode()  # Arrow rejects unpaired surrogates
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def number(value: Any) -> float | None:
    """Return ``value``, a number or the text of one, as a finite float; ``None`` for anything else, booleans included."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        found = float(value)
    except (ValueError, OverflowError):
        return None
    return found if math.isfinite(found) else None


def score(meta: Mapping[str, Any], name: str) -> float | None:
    """Return the number under one of LAION's names, in lower or upper case; ``None`` if there is none."""
    return number(meta.get(name, meta.get(name.upper())))


def column_name(column: str) -> str:
    """Return the name under which a column is stored: LAION's in lower case, others unchanged."""
    return column.lower() if column.lower() in LAION_NAMES else column


def json_value(value: Any) -> Any:
    """Convert a column's value for JSON: bytes to text, dates and times to ISO text, NaN and infinities to ``None``."""
    if isinstance(value, bytes):
        return clean_text(value)
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
