"""Intervals cover the truth about as often as they say, on data whose truth is known."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from instella_ray.evaluation import statistics
from instella_ray.evaluation.metrics.base import Batch, Metric, MetricResult
from instella_ray.evaluation.metrics.bits import BitUsage
from instella_ray.evaluation.metrics.features import Features
from instella_ray.evaluation.metrics.fid import frechet
from instella_ray.evaluation.metrics.frechet import Gaussian, frechet_distance
from instella_ray.evaluation.metrics.images import ImageSettings
from instella_ray.evaluation.metrics.moments import Sums

REPEATS = 400


def covered(interval: Callable[[np.random.Generator], tuple[float, float]], truth: float, seed: int) -> float:
    hits = 0
    for repeat in range(REPEATS):
        low, high = interval(np.random.default_rng([seed, repeat]))
        hits += low <= truth <= high
    return hits / REPEATS


def about(share: float, nominal: float, slack: float = 0.0) -> bool:
    """Within what chance allows (1 in 10,000), and ``slack`` for an approximation that is known to be one."""
    low, high = stats.binom.ppf((5e-5, 1 - 5e-5), REPEATS, nominal) / REPEATS
    return low - slack <= share <= high + slack


@pytest.mark.parametrize("confidence", [0.8, 0.95])
@pytest.mark.parametrize("count", [12, 60, 150])
def test_interval_of_a_mean_covers_it(count: int, confidence: float) -> None:
    def interval(rng: np.random.Generator) -> tuple[float, float]:
        values = rng.gamma(4.0, 0.5, count)
        return statistics.bootstrap_mean(values, confidence=confidence, seed=int(rng.integers(1 << 30)), resamples=600)

    assert about(covered(interval, 2.0, count), confidence, slack=0.03)


SMALL = (2, 3, 5, 7, 12, 30, 100)
DRAWS: dict[str, tuple[Callable[[np.random.Generator, int], np.ndarray], float]] = {
    "normal": (lambda rng, n: rng.normal(0, 1, n), 0.0),
    "uniform": (lambda rng, n: rng.random(n), 0.5),
    "heavy tails": (lambda rng, n: rng.standard_t(3, n), 0.0),
    "two values": (lambda rng, n: rng.beta(0.3, 0.3, n), 0.5),
    "skewed": (lambda rng, n: rng.gamma(4.0, 0.25, n), 1.0),
    "very skewed": (lambda rng, n: rng.exponential(1.0, n), 1.0),
    "log-normal": (lambda rng, n: rng.lognormal(0, 1, n), float(np.exp(0.5))),
}


def covers(share: float, given: int, least: float = 0.95) -> bool:
    """Whether so many of the ``given`` intervals hold the truth that each may well do so with at least ``least``."""
    return share >= float(stats.binom.ppf(1e-4, given, least)) / given


@pytest.mark.parametrize("name", DRAWS)
def test_intervals_of_a_mean_cover_it_for_few_groups_or_are_not_given(name: str) -> None:
    draw, truth = DRAWS[name]
    least = {"very skewed": 0.92, "log-normal": 0.88}.get(name, 0.94)
    for count in SMALL:
        bounds = [statistics.bootstrap_mean(draw(np.random.default_rng([count, i]), count)) for i in range(120)]
        given = [interval for interval in bounds if np.isfinite(interval.low)]
        assert bool(given) == (count >= statistics.FEWEST)
        held = sum(low <= truth <= high for low, high in given)
        assert not given or covers(held / len(given), len(given), least), (count, held)


@pytest.mark.parametrize("alike", [0.0, 0.5])
@pytest.mark.parametrize("share", [0.02, 0.5])
def test_intervals_of_a_rate_cover_it_for_few_prompts(share: float, alike: float) -> None:
    """One image a prompt, and four that are more or less alike."""
    for prompts in SMALL:
        for images in (1, 4):
            groups, held = [f"{i // images:03d}" for i in range(prompts * images)], 0
            for i in range(60):
                rng = np.random.default_rng([prompts, images, i])
                ease = (
                    rng.beta(share / alike, (1 - share) / alike, (prompts, 1))
                    if alike
                    else np.full((prompts, 1), share)
                )
                found = statistics.rate((rng.random((prompts, images)) < ease).reshape(-1), groups)
                held += found.low <= share <= found.high
            assert covers(held / 60, 60, 0.93), (prompts, images, held)


def test_intervals_of_a_mean_of_rates_cover_it_for_few_prompts() -> None:
    shares = (0.99, 0.78, 0.45, 0.12)
    for prompts in SMALL:
        held = 0
        for i in range(80):
            rng = np.random.default_rng([prompts, i])
            found = statistics.mean_of_rates([statistics.rate(rng.random(prompts) < share) for share in shares])
            held += found.low <= np.mean(shares) <= found.high
        assert covers(held / 80, 80), (prompts, held)


def test_intervals_of_paired_differences_cover_them_for_few_pairs() -> None:
    for pairs in SMALL:
        found = []
        for i in range(150):
            rng = np.random.default_rng([pairs, i])
            base = rng.normal(0, 1, pairs)
            found.append(statistics.paired_difference(base + rng.gamma(2, 0.1, pairs), base, resamples=1))
        given = [each for each in found if np.isfinite(each.low)]
        assert bool(given) == (pairs >= statistics.FEWEST)
        held = sum(each.low <= 0.2 <= each.high for each in given)
        assert not given or covers(held / len(given), len(given), 0.93), (pairs, held)


@pytest.mark.parametrize("kind", ["frechet", "bits"])
def test_jackknives_cover_for_few_images_or_give_no_interval(kind: str) -> None:
    """What images of that number give on average, by the metrics themselves."""
    counts = (5, 12, 20, 40, 100)

    def result(count: int, repeat: int) -> MetricResult:
        rng = np.random.default_rng([count, repeat])
        ids = [f"{repeat}/{i}" for i in range(count)]
        if kind == "bits":
            metric: Metric = BitUsage()
            metric.update(Batch(ids, codes=(rng.random((count, 2, 4)) < 0.2).astype(np.uint8)))
        else:
            rows = rng.gamma(3.0, 0.5, (count, 3))
            features = Features("rows", "test", None, None, lambda images: rows)
            metric = frechet(features, reference=Gaussian(np.full(3, 1.0), np.eye(3), 5000), images=ImageSettings())
            metric.update(Batch(ids, images=np.zeros((count, 1, 1, 3), np.uint8)))
        return metric.result()

    for count in counts:
        found = [result(count, repeat) for repeat in range(80)]
        truth = float(np.mean([each.value for each in found]))
        given = [each for each in found if np.isfinite(each.low)]
        assert bool(given) == (count >= statistics.FEWEST_LEFT_OUT)
        held = sum(each.low <= truth <= each.high for each in given)
        assert not given or covers(held / len(given), len(given), 0.92), (count, held)


def test_probability_of_being_less_covers_it() -> None:
    """Of two normal distributions half a deviation apart; ties count as half, and equal values have none but that."""
    truth = float(stats.norm.cdf(0.5 / np.sqrt(2)))
    for ours, theirs in ((4, 30), (20, 20), (60, 12)):
        held = 0
        for i in range(150):
            rng = np.random.default_rng([ours, i])
            found = statistics.probability_less(rng.normal(0, 1, ours), rng.normal(0.5, 1, theirs))
            held += found.low <= truth <= found.high
        assert covers(held / 150, 150), (ours, theirs, held)
    assert statistics.probability_less(np.ones(3), np.ones(4)).value == 0.5
    assert statistics.probability_less(np.array([1.0, 3.0]), np.array([2.0])).value == 0.5


def test_groups_that_agree_have_no_interval_but_rates_do() -> None:
    for count in (5, 50, 500):
        assert np.isnan(statistics.bootstrap_mean(np.full(count, 100.0 / 3))).all()
        assert statistics.rate(np.ones(count, bool)).low < 1
    assert np.isnan(statistics.jackknife(2.0, np.full(10, 2.0), np.full(10, 8))[:2]).all()


def test_bootstrap_draws_prompts_not_images() -> None:
    """Four images of a prompt that are nearly alike tell little more than one."""

    def interval(rng: np.random.Generator, grouped: bool) -> tuple[float, float]:
        values = (rng.normal(0, 1, (30, 1)) + rng.normal(0, 0.2, (30, 4))).reshape(-1)
        groups = [str(i // 4) for i in range(120)] if grouped else None
        return statistics.bootstrap_mean(values, groups, seed=int(rng.integers(1 << 30)), resamples=400)

    assert about(covered(lambda rng: interval(rng, True), 0.0, 1), 0.95, slack=0.01)
    assert covered(lambda rng: interval(rng, False), 0.0, 1) < 0.8


@pytest.mark.parametrize("share", [0.5, 0.9, 0.99])
def test_interval_of_a_rate_covers_it(share: float) -> None:
    """80 prompts, four images each, which agree more often than chance; close to 1 a bootstrap fails."""

    def images(rng: np.random.Generator) -> np.ndarray:
        ease = rng.beta(share * 3, (1 - share) * 3, (80, 1))
        return (rng.random((80, 4)) < ease).reshape(-1)

    groups = [f"{i // 4:03d}" for i in range(320)]
    got = covered(lambda rng: statistics.rate(images(rng), groups)[1:3], share, 2)
    assert about(got, 0.95, slack=0.03)
    if share == 0.99:
        naive = covered(lambda rng: statistics.bootstrap_mean(images(rng), groups, resamples=300), share, 2)
        assert naive < got - 0.03


@pytest.mark.parametrize("shares", [(0.99, 0.78, 0.66, 0.85, 0.45, 0.12), (1.0, 0.98, 0.97, 0.99, 0.96, 0.99)])
def test_interval_of_a_mean_of_rates_covers_it(shares: tuple[float, ...]) -> None:
    def interval(rng: np.random.Generator) -> tuple[float, float]:
        rates = [statistics.rate(rng.random(60) < share) for share in shares]
        return statistics.mean_of_rates(rates)[1:3]

    assert about(covered(interval, float(np.mean(shares)), 3), 0.95, slack=0.01)
    one = statistics.rate(np.arange(10) < 7)
    assert statistics.mean_of_rates([one]) == pytest.approx(one)


def test_jackknife_of_a_frechet_distance_covers_what_samples_of_that_size_give() -> None:
    size, width = 240, 5
    target = Gaussian(np.zeros(width), np.eye(width))

    def sums(rng: np.random.Generator) -> list[Sums]:
        rows = rng.normal(0.4, 1.2, (size, width)) @ np.diag([1, 1, 1, 0.5, 2.0])
        groups = rng.integers(0, 10, size)  # as a hash deals them out: unequal
        return [Sums.of(rows[groups == g]) for g in range(10)]

    def distance(parts: list[Sums]) -> float:
        whole = parts[0]
        for part in parts[1:]:
            whole = whole.plus(part)
        return frechet_distance(Gaussian.of(whole), target)

    def interval(rng: np.random.Generator) -> tuple[float, float]:
        parts = sums(rng)
        left_out = np.array([distance(parts[:i] + parts[i + 1 :]) for i in range(10)])
        return statistics.jackknife(distance(parts), left_out, np.array([p.count for p in parts]))[:2]

    truth = float(np.mean([distance(sums(np.random.default_rng([9, i]))) for i in range(1500)]))
    assert about(covered(interval, truth, 4), 0.95, slack=0.02)


def test_a_bootstrap_of_a_frechet_distance_would_miss_it() -> None:
    """Why there is a jackknife: samples drawn again have less spread, so their distance is larger every time."""
    rng = np.random.default_rng(0)
    target = Gaussian(np.zeros(30), np.eye(30))
    rows = rng.normal(size=(100, 30))
    value = frechet_distance(Gaussian.of(Sums.of(rows)), target)
    again = [frechet_distance(Gaussian.of(Sums.of(rows[rng.integers(0, 100, 100)])), target) for _ in range(100)]
    assert min(again) > value


def test_jackknife_of_a_mean_is_the_textbook_error_and_sees_no_bias() -> None:
    values = np.random.default_rng(0).normal(size=50)
    left_out = (values.sum() - values) / 49
    found = statistics.jackknife(float(values.mean()), left_out, np.ones(50))
    assert found.standard_error == pytest.approx(values.std(ddof=1) / np.sqrt(50))
    assert found.bias == pytest.approx(0, abs=1e-12)


def test_jackknife_sees_the_bias_of_a_plug_in_variance() -> None:
    values = np.random.default_rng(0).normal(size=40)
    left_out = np.array([np.delete(values, i).var() for i in range(40)])
    found = statistics.jackknife(float(values.var()), left_out, np.ones(40))
    assert values.var() - found.bias == pytest.approx(values.var(ddof=1))


def test_paired_difference_raises_few_false_alarms_and_sees_what_is_there() -> None:
    alarms = 0
    for repeat in range(REPEATS):
        rng = np.random.default_rng([5, repeat])
        ours, theirs = rng.normal(size=40), rng.normal(size=40)
        alarms += statistics.paired_difference(ours, theirs, seed=repeat, resamples=300).p_value < 0.05
    assert about(1 - alarms / REPEATS, 0.95)
    base = np.random.default_rng(0).normal(size=60)
    other = base + np.random.default_rng(1).normal(0, 0.1, 60)
    seen = statistics.paired_difference(other + 0.3, base, resamples=500)
    assert seen.value == pytest.approx(0.3, abs=0.03) and seen.low > 0 and seen.p_value < 0.01
    same = statistics.paired_difference(base, base, resamples=500)
    assert same.value == 0 and same.p_value == 1


@given(st.floats(0, 1), st.integers(1, 1000), st.booleans())
def test_wilson_stays_within_bounds_and_holds_the_share(share: float, size: int, corrected: bool) -> None:
    low, high = statistics.wilson(share, size, corrected=corrected)
    assert 0 <= low <= share <= high <= 1


def test_wilson_is_newcombes() -> None:
    """His tables of 1998: 81 of 263 and 0 of 20, by methods 3 and 4."""
    for hits, trials, plain, corrected in (
        (81, 263, (0.2553, 0.3662), (0.2535, 0.3682)),
        (0, 20, (0.0, 0.1611), (0.0, 0.2005)),
    ):
        assert statistics.wilson(hits / trials, trials) == pytest.approx(plain, abs=5e-5)
        assert statistics.wilson(hits / trials, trials, corrected=True) == pytest.approx(corrected, abs=5e-5)


def test_too_few_samples_give_no_interval() -> None:
    assert np.isnan(statistics.bootstrap_mean(np.array([1.0]))).all()
    assert np.isnan(statistics.bootstrap_mean(np.array([1.0, 2.0]), ["a", "a"])).all()
    assert np.isnan(statistics.jackknife(1.0, np.array([1.0]), np.array([3]))[:2]).all()
    assert np.isnan(statistics.rate(np.array([], bool))[:3]).all()
