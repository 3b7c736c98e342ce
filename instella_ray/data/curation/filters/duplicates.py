"""Copies within the whole set: not a filter of one sample, but asked after all of them."""

from __future__ import annotations

from pydantic import Field

from ....config import Config


class DuplicateConfig(Config):
    """Of images that are the same to the byte, or nearly, the largest stays, of equals the first.

    The fingerprints of all kept images, about 100 bytes each, are compared in the driver's memory.
    """

    max_distance: int | None = Field(4, ge=0, le=12)
    """Near copies: perceptual hashes (64 bits) that differ in at most so many; null drops copies to the byte alone."""
    max_color_difference: int = Field(16, ge=0, le=255)
    """And in no cell of a 4 x 4 grid the mean red, green or blue by more than this (0 to 255)."""
