"""Curation filters: each a small class with a typed configuration, and its own count in the ledger.

A filter looks at one sample and says whether it stays. Its ``name`` is the ledger's reason.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from PIL import Image

from ..config import Config


class Filter(Protocol):
    name: str

    def keeps(self, image: Image.Image, caption: str, meta: Mapping[str, Any]) -> bool: ...


class FilterConfig(Config):
    """Limits of every filter; none switches a filter off."""

    target_size: int | None = 512
    """Resolution to train for (px): pictures whose shorter edge is under half of it go (paper, section 4)."""
    max_aspect_ratio: float | None = 3.0
    """Longer over shorter edge."""
    max_watermark: float | None = 0.8
    """Upper limit of the metadata's ``pwatermark``, where it is given."""
    max_unsafe: float | None = 0.5
    """Upper limit of the metadata's ``punsafe``, where it is given."""
    min_caption_chars: int | None = 3
    """Shortest caption."""
    max_caption_chars: int | None = 2000
    """Longest caption."""


class ShorterEdge:
    """Shorter edge at least half the target resolution."""

    name = "small"

    def __init__(self, target_size: int) -> None:
        self.minimum = target_size / 2

    def keeps(self, image: Image.Image, caption: str, meta: Mapping[str, Any]) -> bool:
        return min(image.size) >= self.minimum


class AspectRatio:
    """Longer over shorter edge at most ``maximum``."""

    name = "aspect_ratio"

    def __init__(self, maximum: float) -> None:
        self.maximum = maximum

    def keeps(self, image: Image.Image, caption: str, meta: Mapping[str, Any]) -> bool:
        return max(image.size) <= self.maximum * min(image.size)


class MetadataScore:
    """A score that the metadata brings (LAION's watermark and NSFW probabilities) at most ``maximum``.

    Samples without the score stay: what is unknown is not held against them.
    """

    def __init__(self, name: str, field: str, maximum: float) -> None:
        self.name, self.field, self.maximum = name, field, maximum

    def keeps(self, image: Image.Image, caption: str, meta: Mapping[str, Any]) -> bool:
        value = meta.get(self.field)
        return not isinstance(value, int | float) or value <= self.maximum


class CaptionLength:
    """Length of the caption, in characters, within limits."""

    name = "caption_length"

    def __init__(self, minimum: int | None, maximum: int | None) -> None:
        self.minimum, self.maximum = minimum or 0, maximum or 10**9

    def keeps(self, image: Image.Image, caption: str, meta: Mapping[str, Any]) -> bool:
        return self.minimum <= len(caption) <= self.maximum


def build_filters(cfg: FilterConfig) -> list[Filter]:
    """The filters that ``cfg`` switches on, in the order they are asked."""
    filters: list[Filter] = []
    if cfg.target_size is not None:
        filters.append(ShorterEdge(cfg.target_size))
    if cfg.max_aspect_ratio is not None:
        filters.append(AspectRatio(cfg.max_aspect_ratio))
    if cfg.max_watermark is not None:
        filters.append(MetadataScore("watermark", "pwatermark", cfg.max_watermark))
    if cfg.max_unsafe is not None:
        filters.append(MetadataScore("unsafe", "punsafe", cfg.max_unsafe))
    if cfg.min_caption_chars is not None or cfg.max_caption_chars is not None:
        filters.append(CaptionLength(cfg.min_caption_chars, cfg.max_caption_chars))
    return filters
