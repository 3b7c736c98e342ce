"""Selection of the images in a report: a fixed sample of prompts, and the best and worst images by each score."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

from pydantic import Field

from ..config import Config
from .measure import Record
from .metrics.base import Metric, better
from .metrics.memorisation import Memorisation
from .metrics.rates import RateMetric
from .metrics.samples import SampleMetric


class ShowConfig(Config):
    """Images in the report."""

    prompts: int = Field(24, ge=0)
    """Prompts in the grid, spread over categories and selected by a hash of their ids, so that all runs show the same."""
    extremes: int = Field(8, ge=0)
    """Number of best and of worst images by each score."""
    size: int = Field(256, ge=16)
    """Largest side of a thumbnail (pixels)."""
    most: int = Field(600, ge=0)
    """Largest number of images in the report; a sweep shows fewer of each setting."""


class Shown(Config):
    """An image with its score."""

    id: str
    score: float
    reason: str = ""


class ShownNearest(Config):
    """An image with its nearest training image."""

    id: str
    training: str
    """Id of the training image."""
    distance: float
    held_out_nearer: float
    """Share of the held-out images that are nearer to a training image."""


class Selection(Config):
    """Images of a setting to show."""

    grid: tuple[str, ...]
    verdicts: dict[str, str]
    """Reason by id of each grid image that the first rate metric evaluated; '' for a correct image."""
    best: dict[str, tuple[Shown, ...]]
    """Best images by metric."""
    worst: dict[str, tuple[Shown, ...]]
    """Worst images by metric."""
    nearest: dict[str, tuple[ShownNearest, ...]]
    """Images of the grid, and the nearest of all, by metric of memorisation; the nearest first."""

    @property
    def ids(self) -> set[str]:
        shown = [s for part in (self.best, self.worst) for column in part.values() for s in column]
        near = {s.id for column in self.nearest.values() for s in column}
        return {*self.grid, *near, *(s.id for s in shown)}


def choose_images(
    records: Sequence[Record], metrics: Mapping[str, Metric], show: ShowConfig, settings: int
) -> Selection:
    """Select a fixed sample of prompts, the best and worst images by each score, and the nearest to training images.

    They are those of one of ``settings`` settings.
    """
    scored = {name: m for name, m in metrics.items() if isinstance(m, SampleMetric | RateMetric)}
    compared = {name: m for name, m in metrics.items() if isinstance(m, Memorisation)}
    wanted = show.prompts + show.extremes * (2 * len(scored) + len(compared))
    share = min(1.0, show.most / max(1, settings * wanted))
    extremes, prompts = int(show.extremes * share), int(show.prompts * share)
    ends = {name: best_and_worst(metric, extremes) for name, metric in scored.items()}
    best, worst = ({name: pair[side] for name, pair in ends.items()} for side in (0, 1))
    grid = tuple(_grid(records, prompts))
    scored_verdicts = next((m.verdicts() for m in scored.values() if isinstance(m, RateMetric)), {})
    verdicts = {name: scored_verdicts[name].reason for name in grid if name in scored_verdicts}
    nearest = {name: _nearest(metric, grid, extremes) for name, metric in compared.items()}
    return Selection(grid=grid, verdicts=verdicts, best=best, worst=worst, nearest=nearest)


def _grid(records: Sequence[Record], count: int) -> list[str]:
    """Select one image per prompt, equally many prompts per category, in the order of the hashes of their ids."""
    first: dict[str, tuple[str, str]] = {}
    for record in records:
        for name, group, category in zip(record.ids, record.groups, record.categories, strict=True):
            place = first.setdefault(group, (name, category or ""))
            first[group] = min(place, (name, category or ""))
    by_category: dict[str, list[str]] = {}
    for group in sorted(first, key=_name_hash):
        name, category = first[group]
        by_category.setdefault(category, []).append(name)
    each = -(-count // max(1, len(by_category)))
    return [name for _, names in sorted(by_category.items()) for name in names[:each]]


def _nearest(metric: Memorisation, grid: Sequence[str], extremes: int) -> tuple[ShownNearest, ...]:
    """Select the ``extremes`` images that are nearest to training images, and those of the grid."""
    shown = [found for place, found in enumerate(metric.nearest()) if place < extremes or found.id in grid]
    return tuple(ShownNearest(**vars(found)) for found in shown)


def _ranked(metric: SampleMetric | RateMetric) -> list[Shown]:
    """Sort images from best to worst; ties are ordered by the hash of their ids."""
    reasons = {k: v.reason for k, v in metric.verdicts().items()} if isinstance(metric, RateMetric) else {}
    sign = 1 if better(metric.info.name) == "lower" else -1
    rows = sorted(metric.scores().items(), key=lambda row: (sign * row[1], _name_hash(row[0])))
    return [Shown(id=name, score=value, reason=reasons.get(name, "")) for name, value in rows]


def best_and_worst(metric: SampleMetric | RateMetric, count: int) -> tuple[tuple[Shown, ...], tuple[Shown, ...]]:
    """Return the best and worst images; for a rate metric correct and incorrect ones."""
    ranked = _ranked(metric)
    if isinstance(metric, RateMetric):
        right, wrong = ([s for s in ranked if s.score == score] for score in (1, 0))
        return tuple(right[:count]), tuple(wrong[:count])
    return tuple(ranked[:count]), tuple(ranked[::-1][:count])


def _name_hash(name: str) -> bytes:
    return hashlib.sha256(name.encode()).digest()
