"""Differences of a metric between two evaluations: their intervals, tests, correction for many tests, and verdicts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..errors import UserError
from .metrics.base import Metric, better
from .metrics.diversity import Diversity
from .metrics.rates import RateMetric
from .metrics.samples import SampleMetric
from .results import Json
from .statistics import JACKKNIFE, Interval, paired_difference

LEVEL = 0.05
PAIRED = (SampleMetric, RateMetric, Diversity)
"""Metrics with scores by sample or prompt."""
NOTE = (
    "95 % intervals. Paired: bootstrap of the differences over prompts, p from a sign-flip permutation test, and p after "
    "Holm's correction for all tests of a run. Unpaired: the difference's interval is made from those of both values, "
    "without p and correction"
)


@dataclass(frozen=True)
class Row:
    """Difference of a metric (or part of one) that two evaluations measured in the same way."""

    name: str
    a: Json
    """The baseline's result as JSON, with ``value``, ``low``, ``high`` and ``count``."""
    b: Json
    difference: float | None
    """Value in B minus value in A; None if one of them is unknown."""
    low: float | None = None
    high: float | None = None
    p_value: float | None = None
    """Two-sided p-value; None for an unpaired comparison."""
    adjusted: float | None = None
    """The p-value after Holm's correction."""
    how: str = ""
    verdict: str = ""

    def as_dict(self) -> Json:
        """Return plain JSON values."""
        sides = ({key: side[key] for key in ("value", "low", "high", "count")} for side in (self.a, self.b))
        return {**vars(self), **dict(zip("ab", sides, strict=True))}


def differences(
    a: Mapping[str, Any],
    b: Mapping[str, Any],
    metrics: Mapping[str, tuple[Metric, Metric]],
    same: set[str],
    labels: tuple[str, str],
    *,
    seeds: bool,
) -> list[Row]:
    """Compare results ``a`` and ``b`` (JSON by metric) of the comparable ``metrics``, with parts.

    Samples and groups named in ``same`` were asked for the same in both and are paired; ``seeds`` says whether their seeds
    are the same too. ``labels`` are the names of A and B in verdicts.
    """
    rows = [row for name, pair in metrics.items() for row in _rows(a[name], b[name], *pair, same, seeds)]
    tested = [number for number, row in enumerate(rows) if row.p_value is not None]
    adjusted = dict(zip(tested, holm([rows[number].p_value or 0.0 for number in tested]), strict=True))
    rows = [replace(row, adjusted=adjusted.get(number)) for number, row in enumerate(rows)]
    return [replace(row, verdict=verdict(row, labels)) for row in rows]


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjust p-values for the number of tests (Holm 1979), which bounds the chance of any false one under any dependence."""
    order = np.argsort(p_values, kind="stable")
    steps = np.asarray(p_values, np.float64)[order] * np.arange(len(order), 0, -1)
    adjusted = np.empty(len(order))
    adjusted[order] = np.minimum(np.maximum.accumulate(steps), 1.0) if len(order) else []
    return [float(p) for p in adjusted]


def unpaired_interval(a: Json, b: Json) -> Interval | None:
    """Combine the intervals of two independent results to one of the difference B - A; None if one has no interval.

    ``d - sqrt((b - low_b)^2 + (high_a - a)^2)`` to ``d + sqrt((high_b - b)^2 + (a - low_a)^2)``: the method of variance
    estimates recovery (Zou and Donner 2008), for Wilson's intervals Newcombe's (1998). It needs no standard errors and
    keeps the intervals' asymmetry. For samples of the same prompts it is wider than needed.
    """
    if None in (a["value"], a["low"], a["high"], b["value"], b["low"], b["high"]):
        return None
    (below_a, above_a), (below_b, above_b) = _reach(a), _reach(b)
    difference = b["value"] - a["value"]
    return Interval(
        float(difference - np.hypot(below_b, above_a)),
        float(difference + np.hypot(above_b, below_a)),
    )


def _reach(result: Json) -> tuple[float, float]:
    """Return the distances of an interval's ends from the value."""
    below, above = result["value"] - result["low"], result["high"] - result["value"]
    if result["settings"].get("interval") == JACKKNIFE:  # about symmetric, but cut at the ends of the value's range
        below = above = max(below, above)
    return below, above


def verdict(row: Row, labels: tuple[str, str]) -> str:
    """Say in words whether zero is within the difference's interval, and if not, which run is better or higher."""
    if row.difference is None:
        return "not measured"
    if row.difference == 0 and row.p_value in (None, 1):
        return "equal"
    if row.low is None or row.high is None:
        return "no interval"
    if row.low <= 0 <= row.high:
        return "within the interval"
    if row.p_value is not None and row.p_value >= LEVEL:
        return "not significant"
    way = better(row.name)
    higher = (row.difference > 0) == (way != "lower")
    said = f"{labels[1 if higher else 0]} {'higher' if way is None else 'better'}"
    return f"{said} before Holm" if row.adjusted is not None and row.adjusted >= LEVEL else said


def _rows(a: Json, b: Json, ours: Metric, theirs: Metric, same: set[str], seeds: bool) -> Iterator[Row]:
    """Yield the rows of a metric and of its parts."""
    parts = {part["name"]: part for part in b["parts"]}
    whole, others = _row(a, b), [_row(p, parts[p["name"]]) for p in a["parts"] if p["name"] in parts]
    if isinstance(ours, RateMetric) and isinstance(theirs, RateMetric):
        verdicts = ours.verdicts()
        names = sorted(same & set(verdicts) & set(theirs.verdicts()))
        sizes = Counter(verdicts[name].category for name in names)
        # The score is the unweighted mean over categories, so a sample is weighted by the inverse of its category's size.
        weights = {name: len(names) / len(sizes) / sizes[verdicts[name].category] for name in names}
        yield _paired(whole, ours, theirs, weights, seeds)
        for row in others:
            category = row.name.rpartition("/")[2]
            members = {name: 1.0 for name in names if verdicts[name].category == category}
            yield _paired(row, ours, theirs, members, seeds)
    elif isinstance(ours, SampleMetric | Diversity) and isinstance(theirs, SampleMetric | Diversity):
        shared = sorted(same & set(_scores(ours)) & set(_scores(theirs)))
        yield _paired(whole, ours, theirs, dict.fromkeys(shared, 1.0), seeds)
        yield from map(_unpaired, others)
    else:
        yield from map(_unpaired, (whole, *others))


def _row(a: Json, b: Json) -> Row:
    known = a["value"] is not None and b["value"] is not None
    return Row(a["name"], a, b, b["value"] - a["value"] if known else None)


def _scores(metric: SampleMetric | Diversity) -> dict[str, float]:
    """Return scores by sample (or prompt) name; empty if computing them needs a network that is not loaded."""
    try:
        return metric.scores()
    except UserError:
        return {}


def _paired(row: Row, ours: Any, theirs: Any, weights: Mapping[str, float], seeds: bool) -> Row:
    """Compute the weighted difference over the samples that both evaluations share.

    Only sums over a prompt enter, so samples of other seeds are compared as blocks: their order within a prompt is free.
    """
    if len(weights) < 2:
        return _unpaired(row)
    a, b, names = ours.scores(), theirs.scores(), list(weights)
    scale = np.array([weights[name] for name in names])
    groups = None if isinstance(ours, Diversity) else [ours.groups()[name] for name in names]
    found = paired_difference(scale * [b[name] for name in names], scale * [a[name] for name in names], groups)
    most = max(row.a["count"], row.b["count"])
    kind = "prompts" if isinstance(ours, Diversity) else "samples"
    how = f"paired over {len(names)}{f' of {most}' if kind == 'samples' and len(names) < most else ''} {kind}"
    low, high = (float(end) if np.isfinite(end) else None for end in (found.low, found.high))
    values: dict[str, Any] = {"difference": found.value, "low": low, "high": high, "p_value": found.p_value}
    return replace(row, **values, how=how if seeds else f"{how}, other seeds")


def _unpaired(row: Row) -> Row:
    interval = unpaired_interval(row.a, row.b)
    if interval is None:
        return replace(row, how="unpaired, no interval")
    return replace(row, low=interval.low, high=interval.high, how="unpaired")
