"""Confidence intervals: bootstrap, jackknife and Wilson intervals for independent groups of images.

Images of one prompt are correlated, so groups (prompts), not single images, are resampled, left out or counted. All
functions are deterministic: the same arrays in the same order give the same interval.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

BOOTSTRAP = "cluster bootstrap over groups, expanded percentile"
JACKKNIFE = "delete-a-group jackknife, Student t"
WILSON = "Wilson with the groups' effective size"


class Interval(NamedTuple):
    """Two-sided confidence interval; both bounds are nan if there is too little data."""

    low: float
    high: float


UNKNOWN = Interval(float("nan"), float("nan"))


class Totals(NamedTuple):
    """Sums over independent groups."""

    sums: np.ndarray
    """Sum of the values of each group, float64 ``[G]``."""
    sizes: np.ndarray
    """Number of values of each group, int64 ``[G]``."""


def totals(values: np.ndarray, groups: Sequence[str] | None = None) -> Totals:
    """Sum ``values [N]`` by group name (None: each value is its own group); groups are sorted by name."""
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
    """Compute a cluster bootstrap interval of the mean of ``values [N]``, resampling whole groups with replacement.

    The plain percentile interval is too narrow for few groups (by sqrt((n-1)/n) and z in place of t); the expanded
    percentile interval corrects its quantiles for that (Hesterberg 2015, section 5.3). Unknown for fewer than two groups.
    """
    sums, sizes = totals(values, groups)
    if len(sums) < 2:
        return UNKNOWN
    means = _resampled(sums, sizes, np.random.default_rng(seed), resamples)
    tail = _expanded_tail(len(sums), confidence)
    return Interval(*(float(q) for q in np.quantile(means, (tail, 1 - tail))))


class Difference(NamedTuple):
    """Mean paired difference of two runs on the same samples, its interval, and a two-sided p-value."""

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
    """Compare ``ours [N]`` with ``theirs [N]``, sample by sample; the difference is ours minus theirs.

    The interval is :func:`bootstrap_mean` of the differences. The p-value is that of a sign-flip permutation test over
    groups, whose null hypothesis is a symmetric difference: ``(1 + #{|flipped| >= |observed|}) / (1 + flips)``.
    """
    difference = np.asarray(ours, np.float64) - np.asarray(theirs, np.float64)
    interval = bootstrap_mean(difference, groups, confidence=confidence, seed=seed, resamples=resamples)
    sums, _ = totals(difference, groups)
    rng = np.random.default_rng([seed, 1])
    reached = 0
    for count in _chunks(resamples, len(sums)):
        flips = rng.integers(0, 2, (count, len(sums)), np.int8) * 2.0 - 1
        # The order of summation changes the last digits, so compare with a tolerance.
        reached += int((np.abs(flips @ sums) >= abs(sums.sum()) * (1 - 1e-12)).sum())
    return Difference(float(difference.mean()), *interval, (1 + reached) / (1 + resamples), len(difference))


class Jackknife(NamedTuple):
    """Jackknife estimates of a statistic: interval, standard error and bias."""

    low: float
    high: float
    standard_error: float
    bias: float
    """Estimated difference of the statistic from its limit for infinitely many samples."""


def jackknife(value: float, left_out: np.ndarray, sizes: np.ndarray, *, confidence: float = 0.95) -> Jackknife:
    """Compute a delete-a-group jackknife interval around ``value``.

    ``left_out [G]`` are the statistic's values without each group, ``sizes [G]`` the groups' numbers of samples. Groups
    may differ in size (Busing, Meijer and van der Leeden 1999): with ``h = n / sizes`` and pseudo-values
    ``p = h value - (h - 1) left_out``, the corrected value is ``c = G value - sum((1 - 1/h) left_out)`` and the
    variance ``mean((p - c)^2 / (h - 1))``. The interval is ``value -+ t(G - 1) sqrt(variance)``: it describes the variation
    of the statistic over samples of the same size, and is not corrected for the bias ``value - c``.
    """
    left_out, sizes = np.asarray(left_out, np.float64), np.asarray(sizes, np.float64)
    count = len(left_out)
    if count < 2:
        return Jackknife(*UNKNOWN, float("nan"), float("nan"))
    share = sizes.sum() / sizes
    corrected = count * value - ((1 - 1 / share) * left_out).sum()
    pseudo = share * value - (share - 1) * left_out
    error = float(np.sqrt(((pseudo - corrected) ** 2 / (share - 1)).mean()))
    from scipy import stats  # here, because the import takes a second of each training process

    reach = float(stats.t.ppf((1 + confidence) / 2, count - 1)) * error
    return Jackknife(value - reach, value + reach, error, float(value - corrected))


class Rate(NamedTuple):
    """Rate of correct samples, its interval, and its effective sample size."""

    value: float
    low: float
    high: float
    size: float


def rate(correct: np.ndarray, groups: Sequence[str] | None = None, *, confidence: float = 0.95) -> Rate:
    """Compute the rate of true values in ``correct [N]`` (bool) with Wilson's interval.

    Unlike a bootstrap, Wilson's interval has the right coverage if all or none are true. It uses the effective sample
    size: the size of a simple random sample with the same variance of the rate, between the number of groups and the
    number of values.
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
    """Compute Wilson's score interval of a ``share`` observed in ``size`` trials."""
    from scipy import stats

    z = float(stats.norm.ppf((1 + confidence) / 2))
    centre = (share + z * z / (2 * size)) / (1 + z * z / size)
    half = z / (1 + z * z / size) * np.sqrt(share * (1 - share) / size + (z / (2 * size)) ** 2)
    # At share 0 and 1 a bound equals the share; rounding must not move it beyond.
    return Interval(min(max(0.0, float(centre - half)), share), max(min(1.0, float(centre + half)), share))


def mean_of_rates(rates: Sequence[Rate], *, confidence: float = 0.95) -> Rate:
    """Compute the unweighted mean of k independent rates, with Wilson's interval at the mean's effective sample size.

    With the shares shrunk away from 0 and 1, ``q = (size share + 1/2) / (size + 1)``, the mean's variance is
    ``v = sum(q (1 - q) / size) / k^2`` and its effective size ``mean(q) (1 - mean(q)) / v``.
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
    """Map ``name`` to a group number in [0, ``groups``), the same on every machine and in every shard."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8]) % groups


def _resampled(sums: np.ndarray, sizes: np.ndarray, rng: np.random.Generator, resamples: int) -> np.ndarray:
    """Compute the means of ``resamples`` bootstrap resamples of the groups."""
    means = []
    for count in _chunks(resamples, len(sums)):
        drawn = rng.integers(0, len(sums), (count, len(sums)), np.int32)
        means.append(sums[drawn].sum(1) / sizes[drawn].sum(1))
    return np.concatenate(means)


def _chunks(total: int, width: int) -> list[int]:
    """Split ``total`` rows of ``width`` numbers into chunks of less than 32 MiB."""
    step = max(1, (4 << 20) // max(width, 1))
    return [min(step, total - start) for start in range(0, total, step)]


def _expanded_tail(count: int, confidence: float) -> float:
    from scipy import stats

    quantile = stats.t.ppf((1 - confidence) / 2, count - 1)
    return float(stats.norm.cdf(np.sqrt(count / (count - 1)) * quantile))
