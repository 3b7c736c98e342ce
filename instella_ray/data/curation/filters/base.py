"""Base classes of curation filters: a filter computes named scores of a sample, and drops it if they exceed limits."""

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
    """Data of a sample that is available without decoding its image."""

    size: tuple[int, int]
    """Width and height (px)."""
    caption: str
    meta: Mapping[str, Any]
    """Metadata: KEY.json of a tar, or the other columns of a parquet file."""


class Scale(NamedTuple):
    """Axis of the histogram of a score; values outside count in its first or last bin."""

    low: float
    high: float
    log: bool = False


class ScoreLimits(NamedTuple):
    """Allowed range of a score, bounds included; None: no bound."""

    minimum: float | None = None
    maximum: float | None = None

    def allow(self, value: float) -> bool:
        """Return whether ``value`` is within the limits."""
        return (self.minimum is None or value >= self.minimum) and (self.maximum is None or value <= self.maximum)

    def sides(self) -> dict[str, float]:
        """Return the bounds that are set, by name."""
        return {side: bound for side, bound in self._asdict().items() if bound is not None}


LONGEST = 4
"""Aspect ratio, longer over shorter edge, above which images are shrunk, cropped or padded for a model."""
Scores = Mapping[str, float]
Scorer = Callable[[Sequence[Image.Image]], Sequence[Scores]]
"""Loaded model: maps upright RGB images of any size to the scores of each."""


class Filter(Config, ABC):
    """Base class of filters, and of their sections in the configuration. Missing scores do not drop a sample."""

    scales: ClassVar[Mapping[str, Scale]]
    """Names of the scores, and their axes in the report."""
    requires: ClassVar[tuple[str, ...]] = ()
    """Required modules of the extra ``curate``."""

    @property
    def label(self) -> str:
        """Name of the configuration section, for messages."""
        return "filters." + re.sub(r"(?<!^)(?=[A-Z])", "_", type(self).__name__).lower()

    def check(self) -> None:
        """Raise UserError if a requirement is missing; called at the start of a job, before actors are created."""
        for module in self.requires:
            extra_import(module, self.label, "curate")

    @abstractmethod
    def limits(self) -> Mapping[str, tuple[str, ScoreLimits]]:
        """Map each score that has limits to its ledger reason and its limits."""

    def outside(self, scores: Scores) -> list[str]:
        """Return the names of the scores for which a sample is dropped, in the order of the limits."""
        return [
            name for name, (_, limits) in self.limits().items() if name in scores and not limits.allow(scores[name])
        ]

    def reason(self, scores: Scores) -> str | None:
        """Return the ledger reason to drop a sample with these scores; None: keep it."""
        return next((self.limits()[name][0] for name in self.outside(scores)), None)


class SampleFilter(Filter):
    """Filter by image size, caption and metadata, applied before the image is decoded."""

    @abstractmethod
    def measure(self, sample: Sample) -> Scores:
        """Return the scores of ``sample``."""


class ImageFilter(Filter):
    """Filter by pixels, with a model on a pool of actors."""

    actors: int | None = Field(None, ge=1)
    """Actors that run the model; null: one per GPU, or one per two CPUs."""
    gpus_per_actor: float = Field(0.0, ge=0)
    """GPUs per actor, fractions allowed; 0: run on the CPU."""
    batch_size: int = Field(32, ge=1)
    """Images per model call."""

    decode_size: ClassVar[int]
    """Input resolution of the model (px); larger images may be shrunk before (:func:`bounded`)."""
    files: ClassVar[tuple[str, ...]] = ()
    """Names of settings that may be paths of local files."""

    def resolved(self) -> Self:
        """Return a copy with absolute paths of local files, because actors run in other working directories."""
        given = {name: Path(str(getattr(self, name))) for name in self.files}
        return self.model_copy(update={name: str(path.absolute()) for name, path in given.items() if path.is_file()})

    @abstractmethod
    def load(self, device: str) -> Scorer:
        """Load the model on ``cpu`` or ``cuda``, once per actor; UserError if a package or a file is missing."""


def bounded(image: Image.Image, size: int) -> Image.Image:
    """Shrink an image until its shorter edge is at most ``size`` (px) and its longer one at most ``LONGEST * size``."""
    scale = min(1, size / min(image.size), LONGEST * size / max(image.size))
    if scale == 1:
        return image
    width, height = (max(1, round(side * scale)) for side in image.size)
    return image.resize((width, height), Image.Resampling.BICUBIC, reducing_gap=3.0)
