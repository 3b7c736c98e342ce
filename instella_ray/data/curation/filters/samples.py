"""Filters that need no pixels: resolution, aspect ratio, caption length, and LAION's scores in the metadata."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from pydantic import Field

from ...formats.metadata import score
from .base import Sample, SampleFilter, Scale, ScoreLimits, Scores


class Resolution(SampleFilter):
    """Keeps images whose shorter edge is at least half the training resolution (paper, section 4)."""

    scales: ClassVar[Mapping[str, Scale]] = {"shorter_edge": Scale(16, 8192, log=True)}

    target_size: int = Field(512, ge=1)
    """Training resolution (px)."""

    def limits(self) -> Mapping[str, tuple[str, ScoreLimits]]:
        return {"shorter_edge": ("small", ScoreLimits(minimum=self.target_size / 2))}

    def measure(self, sample: Sample) -> Scores:
        return {"shorter_edge": min(sample.size)}


class AspectRatio(SampleFilter):
    """Keeps images whose longer edge is at most ``maximum`` times the shorter one."""

    scales: ClassVar[Mapping[str, Scale]] = {"aspect_ratio": Scale(1, 10)}

    maximum: float = Field(3.0, ge=1)

    def limits(self) -> Mapping[str, tuple[str, ScoreLimits]]:
        return {"aspect_ratio": ("aspect_ratio", ScoreLimits(maximum=self.maximum))}

    def measure(self, sample: Sample) -> Scores:
        return {"aspect_ratio": max(sample.size) / min(sample.size)}


class MetadataScore(SampleFilter):
    """Base class of filters by a number in the metadata; samples without it are kept."""

    field: ClassVar[str]
    """Name of the number in the metadata, and of the score."""

    def measure(self, sample: Sample) -> Scores:
        value = score(sample.meta, self.field)
        return {} if value is None else {self.field: value}


class Watermark(MetadataScore):
    """Keeps images whose watermark probability by LAION is at most ``maximum``."""

    field: ClassVar[str] = "pwatermark"
    scales: ClassVar[Mapping[str, Scale]] = {"pwatermark": Scale(0, 1)}

    maximum: float = Field(0.8, ge=0, le=1)

    def limits(self) -> Mapping[str, tuple[str, ScoreLimits]]:
        return {self.field: ("watermark", ScoreLimits(maximum=self.maximum))}


class Unsafe(MetadataScore):
    """Keeps images whose probability of unsafe content by LAION is at most ``maximum``."""

    field: ClassVar[str] = "punsafe"
    scales: ClassVar[Mapping[str, Scale]] = {"punsafe": Scale(0, 1)}

    maximum: float = Field(0.5, ge=0, le=1)

    def limits(self) -> Mapping[str, tuple[str, ScoreLimits]]:
        return {self.field: ("unsafe", ScoreLimits(maximum=self.maximum))}


class Similarity(MetadataScore):
    """Keeps images whose CLIP similarity to the caption by LAION is at least ``minimum``."""

    field: ClassVar[str] = "similarity"
    scales: ClassVar[Mapping[str, Scale]] = {"similarity": Scale(0, 0.6)}

    minimum: float = Field(0.28, ge=-1, le=1)

    def limits(self) -> Mapping[str, tuple[str, ScoreLimits]]:
        return {self.field: ("similarity", ScoreLimits(minimum=self.minimum))}


class CaptionLength(SampleFilter):
    """Keeps samples whose caption has ``minimum`` to ``maximum`` characters; null: no limit."""

    scales: ClassVar[Mapping[str, Scale]] = {"caption_chars": Scale(1, 10_000, log=True)}

    minimum: int | None = Field(3, ge=0)
    maximum: int | None = Field(2000, ge=1)

    def limits(self) -> Mapping[str, tuple[str, ScoreLimits]]:
        return {"caption_chars": ("caption_length", ScoreLimits(self.minimum, self.maximum))}

    def measure(self, sample: Sample) -> Scores:
        return {"caption_chars": len(sample.caption)}
