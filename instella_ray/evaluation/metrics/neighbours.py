"""Precision and recall, density and coverage: shares of images within the neighbourhoods of others' features.

The neighbourhood of an image is the ball around its features that reaches to its k-th nearest neighbour of the same set.

- Precision (Kynkaanniemi et al. 2019): share of images within the neighbourhood of any reference image. Recall: share of
  reference images within that of any image. F-score: their harmonic mean. k = 3.
- Density (Naeem et al. 2020): mean number of reference images' neighbourhoods that an image is within, divided by k.
  Coverage: share of reference images with an image in their neighbourhood. k = 5.

Intervals hold for fixed reference images: Wilson's of precision, that of a mean of density, jackknives of the others.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from .. import statistics
from .base import MetricResult
from .feature_rows import FeatureRows
from .kernel import blocks

GROUPS = 10
"""Number of jackknife groups."""


class Precision(FeatureRows):
    """Precision of images, with ``recall`` and ``f_score`` as parts."""

    kind = "precision_recall"

    def result(self, confidence: float = 0.95, seed: int = 0) -> MetricResult:
        x, k = self.rows(), int(self.info.settings["neighbours"])
        if len(x) <= k:
            return self.unknown(len(x), f"{k} neighbours need at least {k + 1}")
        y = self.reference()
        numbers = self.jackknife_groups(GROUPS)
        reach = nearest_distances(y, y, np.zeros(len(y), np.int64), k, itself=False)[:, 0, -1]
        inside = np.concatenate([(distances(x[rows], y) <= reach).any(1) for rows in blocks(len(x), len(y))])
        nearest = nearest_distances(x, x, numbers, k, itself=False)
        recalled = _recalled(y, x, numbers, nearest)
        precision, recalls = float(inside.mean()), recalled.mean(1)
        rest = [inside[numbers != group] for group in range(len(recalls) - 1)]
        without = [float(part.mean()) if len(part) else float("nan") for part in rest]
        scores = np.array([_f_score(*pair) for pair in zip((precision, *without), recalls, strict=True)])
        found = statistics.rate(inside, self.groups(), confidence=confidence)
        about: dict[str, Any] = {"interval": statistics.WILSON, "confidence": confidence}
        parts = tuple(
            _jackknifed(self, name, values, numbers, confidence)
            for name, values in (("recall", recalls), ("f_score", scores))
        )
        return self.make_result(*found[:3], len(x), parts=parts, **about)


class Coverage(FeatureRows):
    """Coverage of the reference images, with ``density`` as a part."""

    kind = "density_coverage"

    def result(self, confidence: float = 0.95, seed: int = 0) -> MetricResult:
        x, k = self.rows(), int(self.info.settings["neighbours"])
        if not len(x):
            return self.unknown(0, "none")
        y = self.reference()
        numbers = self.jackknife_groups(GROUPS)
        reach = nearest_distances(y, y, np.zeros(len(y), np.int64), k, itself=False)[:, 0, -1]
        counts = np.concatenate([(distances(x[rows], y) < reach).sum(1) for rows in blocks(len(x), len(y))])
        nearest = nearest_distances(y, x, numbers, 1)[:, :, 0]
        covered = [(_without(nearest, group).min(1, initial=np.inf) < reach).mean() for group in _left_out(numbers)]
        groups = self.groups()
        interval = statistics.bootstrap_mean(counts / k, groups, confidence=confidence, seed=seed)
        about: dict[str, Any] = {"interval": statistics.mean_method(len(set(groups))), "confidence": confidence}
        density = self.make_result(float(counts.mean() / k), *interval, len(x), **about)
        part = replace(density, name=_named(self, "density"))
        whole = _jackknifed(self, "coverage", np.array(covered), numbers, confidence)
        return replace(whole, parts=(part,))


def _named(metric: FeatureRows, part: str) -> str:
    """Name a part like its metric, whose name states the features unless they are FID's."""
    features = metric.info.name.partition("_")[2]
    return f"{part}_{features}" if features else part


def _jackknifed(
    metric: FeatureRows, name: str, values: np.ndarray, numbers: np.ndarray, confidence: float
) -> MetricResult:
    """Make the result of a value in [0, 1] from the ``values`` of all images and without each group."""
    about: dict[str, Any] = {"interval": statistics.JACKKNIFE, "confidence": confidence}
    found = statistics.jackknife(float(values[0]), values[1:], np.bincount(numbers), confidence=confidence)
    low, high = max(found.low, 0.0), min(found.high, 1.0)
    return replace(metric.make_result(float(values[0]), low, high, len(numbers), **about), name=_named(metric, name))


def _f_score(precision: float, recall: float) -> float:
    return 2 * precision * recall / max(precision + recall, 1e-5)


def _left_out(numbers: np.ndarray) -> range:
    """Return the groups to leave out in turn, first none (-1)."""
    return range(-1, int(numbers.max()) + 1)


def _without(by_group: np.ndarray, group: int) -> np.ndarray:
    """Remove a group from ``[N, G, ...]``; -1 removes none."""
    return by_group if group < 0 else np.delete(by_group, group, 1)


def _recalled(y: np.ndarray, x: np.ndarray, numbers: np.ndarray, nearest: np.ndarray) -> np.ndarray:
    """Return which reference images are within a neighbourhood of ``x``, ``[1 + G, M]``: of all and without each group."""
    k, groups = nearest.shape[2], _left_out(numbers)
    reach = [np.sort(_without(nearest, group).reshape(len(x), -1), axis=1)[:, k - 1 : k] for group in groups]
    # A neighbourhood that has fewer than k others left, or whose centre is left out, reaches nowhere.
    reach = [
        np.where(np.isfinite(r[:, 0]) & (numbers != g), r[:, 0], -1.0) if r.size else np.full(len(x), -1.0)
        for g, r in zip(groups, reach, strict=True)
    ]
    found = np.zeros((len(reach), len(y)), bool)
    for rows in blocks(len(y), len(x)):
        apart = distances(y[rows], x)
        for place, r in enumerate(reach):
            found[place, rows] = (apart <= r).any(1)
    return found


def distances(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Compute Euclidean distances of ``x [N, D]`` and ``y [M, D]``, float64 ``[N, M]``."""
    squares = (x**2).sum(1)[:, None] + (y**2).sum(1) - 2 * x @ y.T
    return np.sqrt(np.maximum(squares, 0))


def nearest_rows(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Find the nearest ``y [M, D]`` of each ``x [N, D]``, of several the first: its row, int64 ``[N]``, and its distance."""
    rows, apart = np.empty(len(x), np.int64), np.empty(len(x))
    for part in blocks(len(x), len(y)):
        among = distances(x[part], y)
        rows[part] = among.argmin(1)
        apart[part] = among.min(1)
    return rows, apart


def nearest_distances(x: np.ndarray, y: np.ndarray, numbers: np.ndarray, k: int, *, itself: bool = True) -> np.ndarray:
    """Compute the k smallest distances of each x to the y of each group ``numbers [M]``, sorted, ``[N, G, k]``.

    Infinite where a group has fewer than k. ``itself=False`` leaves out the distance of each x to the y of its own row.
    """
    order = np.argsort(numbers, kind="stable")
    ends = np.cumsum(np.bincount(numbers))
    found = np.full((len(x), len(ends), k), np.inf)
    for rows in blocks(len(x), len(y)):
        apart = distances(x[rows], y)
        if not itself:
            apart[np.arange(len(apart)), np.arange(len(x))[rows]] = np.inf
        apart = apart[:, order]
        for group, end in enumerate(ends):
            part = apart[:, ends[group - 1] if group else 0 : end]
            kept = min(k, part.shape[1])
            found[rows, group, :kept] = np.sort(np.partition(part, kept - 1, axis=1)[:, :kept], axis=1)
    return found
