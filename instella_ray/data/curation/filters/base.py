"""What a filter is: it gives a sample named scores, and says for which reason, if any, scores cost it its place."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self

from PIL import Image
from pydantic import Field

from ....config import Config
from ....packages import extra_import


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


class ScoreLimits(NamedTuple):
    """What a score may be, both ends included; none is no limit."""

    minimum: float | None = None
    maximum: float | None = None

    def allow(self, value: float) -> bool:
        """Whether ``value`` lies within."""
        return (self.minimum is None or value >= self.minimum) and (self.maximum is None or value <= self.maximum)


LONGEST = 4
"""Longer over shorter edge up to which images are shown to a model as they are."""
Scores = Mapping[str, float]
Scorer = Callable[[Sequence[Image.Image]], Sequence[Scores]]
"""A loaded model: upright RGB images of any size in, the scores of each out."""


class Filter(Config, ABC):
    """One section of the filters' configuration. A score that is not there is not held against a sample."""

    scales: ClassVar[Mapping[str, Scale]]
    """The scores that it gives, and how the report draws them."""
    requires: ClassVar[tuple[str, ...]] = ()
    """Modules that it needs of the extra ``curate``."""

    @property
    def label(self) -> str:
        """Its section of the configuration, for messages."""
        return "filters." + re.sub(r"(?<!^)(?=[A-Z])", "_", type(self).__name__).lower()

    def check(self) -> None:
        """UserError where something is missing that it needs: asked at the start of a job, before there are actors."""
        for module in self.requires:
            extra_import(module, self.label, "curate")

    @abstractmethod
    def limits(self) -> Mapping[str, tuple[str, ScoreLimits]]:
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


class ImageFilter(Filter):
    """Judges by pixels, with a model on a pool of actors."""

    actors: int | None = Field(None, ge=1)
    """Actors that hold the model; none means one a GPU, or one for every two CPUs."""
    gpus_per_actor: float = Field(0.0, ge=0)
    """GPU share of each actor; 0 computes on the CPU."""
    batch_size: int = Field(32, ge=1)
    """Images a call of the model."""

    decode_size: ClassVar[int]
    """The model looks at no more than this (px): what comes larger may be made smaller before (:func:`bounded`)."""
    files: ClassVar[tuple[str, ...]] = ()
    """Settings that may be the path of a local file."""

    def resolved(self) -> Self:
        """The same with local files by their absolute path: actors may run in other folders than the job."""
        given = {name: Path(str(getattr(self, name))) for name in self.files}
        return self.model_copy(update={name: str(path.absolute()) for name, path in given.items() if path.is_file()})

    @abstractmethod
    def load(self, device: str) -> Scorer:
        """The model on ``cpu`` or ``cuda``; UserError where a package or a file is missing. Called once an actor."""


def bounded(image: Image.Image, size: int) -> Image.Image:
    """The image, made smaller where its shorter edge is over ``size`` (px) or its longer one over ``LONGEST * size``."""
    scale = min(1, size / min(image.size), LONGEST * size / max(image.size))
    if scale == 1:
        return image
    width, height = (max(1, round(side * scale)) for side in image.size)
    return image.resize((width, height), Image.Resampling.BICUBIC, reducing_gap=3.0)
