"""What a filter is: it gives a sample named scores, and says for which reason, if any, scores cost it its place."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

from PIL import Image
from pydantic import Field

from ...config import Config


class Sample(NamedTuple):
    """What can be judged without reading a single pixel."""

    size: tuple[int, int]
    """Width and height, px."""
    caption: str
    meta: Mapping[str, Any]
    """The source's KEY.json, or the columns of its parquet file."""


class Scale(NamedTuple):
    """The axis of a score's histogram; scores outside count in its first or last bin."""

    low: float
    high: float
    log: bool = False


class Limits(NamedTuple):
    """What a score may be, both ends included; none is no limit."""

    minimum: float | None = None
    maximum: float | None = None

    def allow(self, value: float) -> bool:
        """Whether ``value`` lies within."""
        return (self.minimum is None or value >= self.minimum) and (self.maximum is None or value <= self.maximum)


Scores = Mapping[str, float]
Scorer = Callable[[Sequence[Image.Image]], Sequence[Scores]]
"""A loaded model: upright RGB pictures of any size in, the scores of each out."""


class Filter(Config, ABC):
    """One section of the filters' configuration. A score that is not there is not held against a sample."""

    scales: ClassVar[Mapping[str, Scale]]
    """The scores that it gives, and how the report draws them."""

    @abstractmethod
    def limits(self) -> Mapping[str, tuple[str, Limits]]:
        """Of each score with a limit: the ledger's reason, and the limit."""

    def reason(self, scores: Scores) -> str | None:
        """The ledger's reason to drop a sample with these scores; none lets it pass."""
        for name, (reason, limits) in self.limits().items():
            if name in scores and not limits.allow(scores[name]):
                return reason
        return None


class SampleFilter(Filter):
    """Judges by size, caption and metadata: asked before any pixel is decoded."""

    @abstractmethod
    def measure(self, sample: Sample) -> Scores:
        """The scores of ``sample``."""


class PictureFilter(Filter):
    """Judges by pixels, with a model on a pool of actors."""

    actors: int | None = Field(None, ge=1)
    """Actors that hold the model; none means one a GPU, or one for every two CPUs."""
    gpus_per_actor: float = Field(0.0, ge=0)
    """GPU share of each actor; 0 computes on the CPU."""
    batch_size: int = Field(32, ge=1)
    """Pictures a call of the model."""

    decode_size: ClassVar[int]
    """The model looks at no more than this (px): larger JPEGs may be decoded at a fraction of their size."""

    @abstractmethod
    def load(self, device: str) -> Scorer:
        """The model on ``cpu`` or ``cuda``; UserError where a package or a file is missing. Called once an actor."""
