"""How sure a number is: bootstrap, jackknife and Wilson intervals for independent groups of images.

Images of one prompt resemble each other, so what is drawn again, left out or counted is the group (the prompt), never
the single image. All functions are pure: the same arrays in the same order give the same interval.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

BOOTSTRAP = "cluster bootstrap over groups, expanded percentile"
JACKKNIFE = "delete-a-group jackknife, Student t"
WILSON = "Wilson with the groups' effective size"


class Interval(NamedTuple):
    """A two-sided confidence interval; both ends nan where the data cannot tell."""

    low: float
    high: float


UNKNOWN = Interval(float("nan"), float("nan"))


class Totals(NamedTuple):
    """Sums over independent groups."""

    sums: np.ndarray
    """float64 ``[G]``, sum of the values of each group."""
    sizes: np.ndarray
    """int64 ``[G]``, number of values of each group."""


def totals(values: np.ndarray, groups: Sequence[str] | None = None) -> Totals:
    """Sum ``values [N]`` by group name (None: each value is a group of its own); groups in the order of names."""
    values = np.asarray(values, np.float64)
    if groups is None:
        return Totals(values, np.ones(len(values), np.int64))
    _, index = np.unique(np.asarray(groups, np.str_), return_inverse=True)
    return Totals(np.bincount(index, weights=values), np.bincount(index))


def bootstrap_mean(
    values: np.ndarray,
    groups: Sequence[str] | None = None,
    *,
    confidence: float = 0.95,
    seed: int = 0,
    resamples: int = 2000,
) -> Interval:
    """Interval of the mean of ``values [N]``: groups are drawn again, with replacement, as often as there are.

    The plain percentile interval is too narrow for few groups (by sqrt((n-1)/n) and z in place of t); the expanded
    one moves its quantiles out by just that (Hesterberg 2015, section 5.3).
    """
    sums, sizes = totals(values, groups)
    if len(sums) < 2:
        return UNKNOWN
    means = _resampled(sums, sizes, np.random.default_rng(seed), resamples)
    tail = _expanded_tail(len(sums), confidence)
    return Interval(*(float(q) for q in np.quantile(means, (tail, 1 - tail))))


class Difference(NamedTuple):
    """Of two runs on the same samples: mean of ours minus theirs, its interval, and a two-sided p-value."""

    value: float
    low: float
    high: float
    p_value: float
    count: int  # type: ignore[assignment]  # a tuple's own method has this name


def paired_difference(
    ours: np.ndarray,
    theirs: np.ndarray,
    groups: Sequence[str] | None = None,
    *,
    confidence: float = 0.95,
    seed: int = 0,
    resamples: int = 2000,
) -> Difference:
    """Compare ``ours [N]`` with ``theirs [N]``, sample by sample.

    The interval is :func:`bootstrap_mean` of the differences; the p-value comes from flipping the sign of each group's
    difference at random, which changes nothing where the two are alike: ``(1 + #{|flipped| >= |seen|}) / (1 + flips)``.
    """
    difference = np.asarray(ours, np.float64) - np.asarray(theirs, np.float64)
    interval = bootstrap_mean(difference, groups, confidence=confidence, seed=seed, resamples=resamples)
    sums, _ = totals(difference, groups)
    rng = np.random.default_rng([seed, 1])
    reached = 0
    for count in _chunks(resamples, len(sums)):
        flips = rng.integers(0, 2, (count, len(sums)), np.int8) * 2.0 - 1
        # A sum in another order differs in its last digits: those must not decide.
        reached += int((np.abs(flips @ sums) >= abs(sums.sum()) * (1 - 1e-12)).sum())
    return Difference(float(difference.mean()), *interval, (1 + reached) / (1 + resamples), len(difference))


class Jackknife(NamedTuple):
    """What leaving out each group in turn says about a statistic."""

    low: float
    high: float
    standard_error: float
    bias: float
    """Estimated distance of the statistic from its limit for infinitely many samples."""


def jackknife(value: float, left_out: np.ndarray, sizes: np.ndarray, *, confidence: float = 0.95) -> Jackknife:
    """Interval around ``value`` from the ``left_out [G]`` values without each group of ``sizes [G]`` samples.

    Groups may differ in size (Busing, Meijer and van der Leeden 1999): with ``h = n / sizes`` and pseudo-values
    ``p = h value - (h - 1) left_out``, the corrected value is ``c = G value - sum((1 - 1/h) left_out)`` and the
    variance ``mean((p - c)^2 / (h - 1))``. The interval is ``value -+ t(G - 1) sqrt(variance)``: it says how the
    statistic of *this many* samples varies, and leaves its bias, ``value - c``, where it is.
    """
    left_out, sizes = np.asarray(left_out, np.float64), np.asarray(sizes, np.float64)
    count = len(left_out)
    if count < 2:
        return Jackknife(*UNKNOWN, float("nan"), float("nan"))
    share = sizes.sum() / sizes
    corrected = count * value - ((1 - 1 / share) * left_out).sum()
    pseudo = share * value - (share - 1) * left_out
    error = float(np.sqrt(((pseudo - corrected) ** 2 / (share - 1)).mean()))
    reach = float(stats.t.ppf((1 + confidence) / 2, count - 1)) * error
    return Jackknife(value - reach, value + reach, error, float(value - corrected))


class Rate(NamedTuple):
    """A share of correct samples, its interval, and the size of a simple random sample that would vary as much."""

    value: float
    low: float
    high: float
    size: float


def rate(correct: np.ndarray, groups: Sequence[str] | None = None, *, confidence: float = 0.95) -> Rate:
    """Share of true values in ``correct [N]`` (bool) with Wilson's interval, which unlike a bootstrap stays honest when
    all or none are true.

    Its sample size is the effective one: the size of a simple random sample whose share would vary as much as the
    groups' shares do, between the number of groups and the number of values.
    """
    sums, sizes = totals(correct, groups)
    if not len(sums):
        return Rate(float("nan"), *UNKNOWN, 0.0)
    share = float(sums.sum() / sizes.sum())
    spread, size = share * (1 - share), float(len(sums))
    if spread > 0 and len(sums) > 1:
        residual = sums - share * sizes
        variance = len(sums) / (len(sums) - 1) * (residual**2).sum() / sizes.sum() ** 2
        most = float(sizes.sum())
        size = min(max(spread / variance, size), most) if variance > 0 else most
    return Rate(share, *wilson(share, size, confidence), size)


def wilson(share: float, size: float, confidence: float = 0.95) -> Interval:
    """Wilson's score interval of a ``share`` seen in ``size`` trials."""
    z = float(stats.norm.ppf((1 + confidence) / 2))
    centre = (share + z * z / (2 * size)) / (1 + z * z / size)
    half = z / (1 + z * z / size) * np.sqrt(share * (1 - share) / size + (z / (2 * size)) ** 2)
    # At share 0 and 1 the end is exact, and rounding must not put it past the share.
    return Interval(min(max(0.0, float(centre - half)), share), max(min(1.0, float(centre + half)), share))


def mean_of_rates(rates: Sequence[Rate], *, confidence: float = 0.95) -> Rate:
    """Unweighted mean of k independent rates, with Wilson's interval at the effective size of the mean.

    With ``q = (size share + 1/2) / (size + 1)``, the shares kept off 0 and 1, the mean's variance is
    ``v = sum(q (1 - q) / size) / k^2`` and its size ``mean(q) (1 - mean(q)) / v``.
    """
    if not rates:
        return Rate(float("nan"), *UNKNOWN, 0.0)
    shares, sizes = np.array([r.value for r in rates]), np.array([r.size for r in rates])
    inner = (sizes * shares + 0.5) / (sizes + 1)
    variance = (inner * (1 - inner) / sizes).sum() / len(rates) ** 2
    size = float(inner.mean() * (1 - inner.mean()) / variance)
    value = float(shares.mean())
    return Rate(value, *wilson(value, size, confidence), size)


def group_number(name: str, groups: int) -> int:
    """The group in [0, ``groups``) that ``name`` belongs to, the same on every machine and in every shard."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8]) % groups


def _resampled(sums: np.ndarray, sizes: np.ndarray, rng: np.random.Generator, resamples: int) -> np.ndarray:
    """Means of ``resamples`` draws of as many groups as there are."""
    means = []
    for count in _chunks(resamples, len(sums)):
        drawn = rng.integers(0, len(sums), (count, len(sums)), np.int32)
        means.append(sums[drawn].sum(1) / sizes[drawn].sum(1))
    return np.concatenate(means)


def _chunks(total: int, width: int) -> list[int]:
    """``total`` rows of ``width`` numbers in pieces that stay under 32 MiB."""
    step = max(1, (4 << 20) // max(width, 1))
    return [min(step, total - start) for start in range(0, total, step)]


def _expanded_tail(count: int, confidence: float) -> float:
    quantile = stats.t.ppf((1 - confidence) / 2, count - 1)
    return float(stats.norm.cdf(np.sqrt(count / (count - 1)) * quantile))
