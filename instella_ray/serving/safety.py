"""What a safety checker says."""

from __future__ import annotations


class Flagged(Exception):
    """A checker refuses to show the picture."""
