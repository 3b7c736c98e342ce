"""Confidence intervals: Student t, bootstrap, jackknife and Wilson intervals for independent groups of images.

Images of one prompt are correlated, so groups (prompts), not single images, are resampled, left out or counted. All
functions are deterministic: the same arrays in the same order give the same interval. There is none for fewer than
:data:`FEWEST` groups, nor where all groups agree, except for rates: no formula covers there whatever the distribution is.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

STUDENT = "Student t over groups, widened towards the skew"
BOOTSTRAP = "cluster bootstrap over groups, expanded percentile"
JACKKNIFE = "delete-a-group jackknife, Student t widened towards the skew"
WILSON = "Wilson with continuity correction and the groups' effective size"
FEWEST = 5
"""Smallest number of groups with an interval of a mean or of a jackknife."""
FEWEST_LEFT_OUT = 20
"""Smallest number of samples with an interval of a jackknife."""
FEW = 100
"""Number of groups up to which an interval of a mean is Student's; with more it is the bootstrap's."""
ROUNDING = 1e-12
"""Relative spread below which groups agree."""


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
    """Compute an interval of the mean of ``values [N]``: a cluster bootstrap of whole groups, or Student's for few of them.

    Unknown for fewer than :data:`FEWEST` groups, and if all agree.
    """
    sums, sizes = totals(values, groups)
    method = mean_method(len(sums))
    if method is None:
        return UNKNOWN
    mean = sums.sum() / sizes.sum()
    residuals = (sums - mean * sizes) * len(sums) / sizes.sum()
    if np.abs(residuals).max() <= ROUNDING * np.abs(sums / sizes).max():
        return UNKNOWN
    if method == STUDENT:
        return _skewed_student(float(mean), residuals, confidence)
    means = _resampled(sums, sizes, np.random.default_rng(seed), resamples)
    tail = _expanded_tail(len(sums), confidence)
    return Interval(*(float(q) for q in np.quantile(means, (tail, 1 - tail))))


def mean_method(groups: int) -> str | None:
    """Return how an interval of a mean over so many groups is computed; None below :data:`FEWEST`.

    A percentile bootstrap covers too rarely with few groups and for skewed values. With many it needs no formula for the
    skew; its plain interval is too narrow by sqrt((n-1)/n) and z in place of t, for which the expanded percentile interval
    corrects its quantiles (Hesterberg 2015, section 5.3).
    """
    return None if groups < FEWEST else STUDENT if groups <= FEW else BOOTSTRAP


def student_mean(values: np.ndarray, *, confidence: float = 0.95) -> Interval:
    """Compute Student's interval of the mean of ``values [N]``, which must be about normal.

    For paired differences between runs of a few seeds, where :func:`bootstrap_mean` has too few groups. Unknown for fewer
    than two values, and if all agree.
    """
    from scipy import stats

    values = np.asarray(values, np.float64)
    spread = float(values.std(ddof=1)) if len(values) > 1 else 0.0
    if spread <= ROUNDING * np.abs(values).max(initial=0.0):
        return UNKNOWN
    reach = float(stats.t.ppf((1 + confidence) / 2, len(values) - 1)) * spread / np.sqrt(len(values))
    return Interval(float(values.mean() - reach), float(values.mean() + reach))


def _skewed_student(mean: float, residuals: np.ndarray, confidence: float) -> Interval:
    """Compute Student's interval, with the end on the side of the skew moved outwards by a correction for it.

    Johnson's (1978) and Hall's (1992) correction is ``skewness (1 + 2 t^2) / (6 sqrt(n))`` standard errors. Applied twice,
    as the skewness of few values is estimated much too small, and to one end only, as its sign is uncertain too.
    """
    from scipy import stats

    count = len(residuals)
    error = float(np.sqrt((residuals**2).sum() / (count - 1) / count))
    reach = float(stats.t.ppf((1 + confidence) / 2, count - 1))
    skewness = float(stats.skew(residuals, bias=False))
    shift = 2 * skewness * (1 + 2 * reach**2) / (6 * np.sqrt(count)) * error
    return Interval(mean - reach * error + min(shift, 0.0), mean + reach * error + max(shift, 0.0))


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
    variance ``mean((p - c)^2 / (h - 1))``. The interval is Student's around ``value``, as that of a mean: it describes the
    variation of the statistic over samples of the same size, and is not corrected for the bias ``value - c``.
    """
    left_out, sizes = np.asarray(left_out, np.float64), np.asarray(sizes, np.float64)
    count = len(left_out)
    if count < 2:
        return Jackknife(*UNKNOWN, float("nan"), float("nan"))
    share = sizes.sum() / sizes
    corrected = count * value - ((1 - 1 / share) * left_out).sum()
    deviations = (share * value - (share - 1) * left_out - corrected) / np.sqrt(share - 1)
    error = float(np.sqrt((deviations**2).mean()))
    known = count >= FEWEST and sizes.sum() >= FEWEST_LEFT_OUT and error > ROUNDING * abs(value)
    interval = _skewed_student(value, deviations * np.sqrt(count - 1), confidence) if known else UNKNOWN
    return Jackknife(*interval, error, float(value - corrected))


class Rate(NamedTuple):
    """Rate of correct samples, its interval, and its effective sample size."""

    value: float
    low: float
    high: float
    size: float
    freedom: float = np.inf
    """Degrees of freedom of the size's estimate; infinite if each sample is its own group."""


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
    spread, size, freedom = share * (1 - share), float(len(sums)), np.inf
    if spread > 0 and len(sums) > 1:
        residual = sums - share * sizes
        variance = len(sums) / (len(sums) - 1) * (residual**2).sum() / sizes.sum() ** 2
        most = float(sizes.sum())
        size = min(max(spread / variance, size), most) if variance > 0 else most
        freedom = len(sums) - 1.0 if most > len(sums) else np.inf
    return Rate(share, *wilson(share, size, confidence, freedom, corrected=True), size, freedom)


def wilson(
    share: float, size: float, confidence: float = 0.95, freedom: float = np.inf, *, corrected: bool = False
) -> Interval:
    """Compute Wilson's score interval of a ``share`` observed in ``size`` trials.

    ``freedom``: that of Student's quantile, for a size that was estimated. ``corrected``: with continuity correction
    (Newcombe 1998, method 4), without which it covers 85 to 90 % at some shares of few trials.
    """
    from scipy import stats

    z, step = float(stats.t.ppf((1 + confidence) / 2, freedom)), float(corrected)
    centre, spread = 2 * size * share + z * z, 4 * size * share * (1 - share) + z * z - step / size
    below, above = (step + z * np.sqrt(max(spread + side * step * (4 * share - 2), 0.0)) for side in (1, -1))
    low, high = (centre - below) / (2 * (size + z * z)), (centre + above) / (2 * (size + z * z))
    # At share 0 and 1 a bound equals the share; rounding and the correction must not move it beyond.
    low, high = (low if share > 0 else 0.0), (high if share < 1 else 1.0)
    return Interval(float(min(max(0.0, low), share)), float(max(min(1.0, high), share)))


def probability_less(
    ours: np.ndarray, theirs: np.ndarray, groups: Sequence[str] | None = None, *, confidence: float = 0.95
) -> Rate:
    """Compute the probability that a value of ``ours [N]`` is less than one of ``theirs [M]``; ties count as half.

    Both are samples. Wilson's interval at the effective size of DeLong et al.'s (1988) variance, with ``groups`` of ours.
    """
    if not len(ours) or not len(theirs):
        return Rate(float("nan"), *UNKNOWN, 0.0)
    wins = _share_above(ours, theirs)
    share, losses = float(wins.mean()), _share_above(theirs, ours)
    sums, sizes = totals(wins, groups)
    least, spread = float(min(len(sums), len(theirs))), share * (1 - share)
    size = least
    if spread > 0 and least > 1:
        residual = sums - share * sizes
        variance = len(sums) / (len(sums) - 1) * (residual**2).sum() / len(wins) ** 2 + losses.var(ddof=1) / len(losses)
        size = max(spread / variance, least) if variance > 0 else least
    freedom = max(least - 1, 1.0)
    return Rate(share, *wilson(share, size, confidence, freedom, corrected=True), size, freedom)


def _share_above(values: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Compute for each value the share of ``others`` that are greater; equal ones count as half."""
    ordered = np.sort(others)
    below, up_to = (np.searchsorted(ordered, values, side) for side in ("left", "right"))
    return np.asarray(1 - (below + up_to) / (2 * len(ordered)))


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
    value, freedom = float(shares.mean()), float(sum(r.freedom for r in rates))
    return Rate(value, *wilson(value, size, confidence, freedom, corrected=True), size, freedom)


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
