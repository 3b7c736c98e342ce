"""Histograms of scores on fixed axes: small, and mergeable over parts, machines and runs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from .filters.base import Scale, Scores

BINS = 40

Histograms = dict[str, list[int]]
"""Counts of :data:`BINS` bins by the score's name."""


def edges(scale: Scale) -> np.ndarray:
    """The ``BINS + 1`` ends of the bins, float64."""
    if scale.log:
        return np.geomspace(scale.low, scale.high, BINS + 1)
    return np.linspace(scale.low, scale.high, BINS + 1)


def histograms(scales: Mapping[str, Scale], scores: Sequence[Scores]) -> Histograms:
    """Counts of every score; what lies outside of its scale counts in the first or the last bin."""
    counts: Histograms = {}
    for name, scale in scales.items():
        values = np.array([row[name] for row in scores if name in row])
        bins = np.clip(np.searchsorted(edges(scale), values, side="right") - 1, 0, BINS - 1)
        counts[name] = np.bincount(bins, minlength=BINS).tolist()
    return counts


def merged(parts: Iterable[Histograms]) -> Histograms:
    """Their sum."""
    total: Histograms = {}
    for part in parts:
        for name, counts in part.items():
            total[name] = [a + b for a, b in zip(total.get(name, [0] * BINS), counts, strict=True)]
    return total
