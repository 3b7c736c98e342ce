"""Configuration of deduplication, which runs over the whole dataset after all filters of single samples."""

from __future__ import annotations

from pydantic import Field

from ....config import Config


class DuplicateConfig(Config):
    """Drops exact and near duplicates: of each group the largest image is kept, or the first of equals.

    The fingerprints of all kept images, about 100 bytes each, are compared in the memory of the driver.
    """

    max_distance: int | None = Field(4, ge=0, le=12)
    """Maximum number of differing bits of the 64-bit perceptual hashes of near duplicates; null: drop only exact ones."""
    max_color_difference: int = Field(16, ge=0, le=255)
    """Maximum difference of mean red, green or blue (0 to 255) in any cell of a 4 x 4 grid, of near duplicates."""
