"""Metadata of input samples: parses JSON objects, numbers and column values into what this package stores."""

from __future__ import annotations

import datetime
import decimal
import json
import math
from collections.abc import Mapping
from typing import Any

from ...errors import UserError
from ...storage import finite
from .texts import clean_text

LAION_NAMES = ("url", "width", "height", "pwatermark", "punsafe", "similarity", "hash")
"""LAION's columns, which datasets write in any case; stored in lower case."""


def json_object(text: str) -> dict[str, Any] | None:
    """Parse ``text`` as a JSON object; ``None`` if it is not one, or contains text that UTF-8 cannot encode.

    LAION's names are put in lower case; NaN and infinities become ``None``, as JSON has none.
    """
    try:
        value = json.loads(text)
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode()  # Arrow rejects unpaired surrogates
        return _lower_names(finite(value)) if isinstance(value, dict) else None
    except (ValueError, RecursionError):
        return None


def required_text(meta: Mapping[str, Any], name: str, sample: str, place: str = "KEY.json") -> str:
    """Return the text under ``name`` of a sample's metadata; UserError names ``sample`` and ``place`` if there is none."""
    value = meta.get(name)
    if not isinstance(value, str) or not value:
        raise UserError(f"{sample}: no text '{name}' in its metadata, expected it in {place}")
    return value


def json_text(meta: dict[str, Any], **options: Any) -> str:
    """Format metadata as JSON, without NaN and infinities; ``options`` are passed to :func:`json.dumps`."""
    return json.dumps(finite(meta), allow_nan=False, **options)


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
    """Return the number under one of LAION's names, in any case, lower case first; ``None`` if there is none."""
    return number(_lower_names(meta).get(name))


def column_name(column: str) -> str:
    """Return the name under which a column is stored: LAION's in lower case, others unchanged."""
    return column.lower() if column.lower() in LAION_NAMES else column


def json_value(value: Any) -> Any:
    """Convert a column's value for JSON: bytes to text, dates and times to ISO text, decimals to numbers.

    NaN and infinities become ``None``, also within lists and objects.
    """
    if isinstance(value, bytes):
        return clean_text(value)
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, decimal.Decimal):
        return number(str(value))
    return finite(value)


def _lower_names(meta: Mapping[str, Any]) -> dict[str, Any]:
    """Put LAION's names in lower case; of several spellings of one name, that in lower case counts, else the first."""
    named: dict[str, Any] = {}
    for name, value in meta.items():
        stored = column_name(name)
        if stored == name or stored not in named:
            named[stored] = value
    return named
