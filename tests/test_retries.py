"""One policy of waits for plain calls, for calls that are awaited, and for iterators."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest

from instella_ray.retries import RetryPolicy, random_jitter


class Passing(Exception):
    """An error of these tests that may pass, after the wait (s) that it asks for."""

    def __init__(self, wait_s: float = 0.0) -> None:
        super().__init__(wait_s)
        self.wait_s = wait_s


def may_pass(error: BaseException) -> bool:
    return isinstance(error, Passing)


POLICY = RetryPolicy(may_pass, tries=4, first_wait_s=1, jitter=lambda failures: 1.0)


class Failing:
    """Raises the errors one after another, then returns how often it was called."""

    def __init__(self, *errors: BaseException) -> None:
        self.errors, self.calls = errors, 0

    def __call__(self) -> int:
        self.calls += 1
        if self.calls <= len(self.errors):
            raise self.errors[self.calls - 1]
        return self.calls

    async def awaited(self) -> int:
        return self()


Way = Callable[[RetryPolicy, Failing], int]


def plain(policy: RetryPolicy, function: Failing) -> int:
    return policy.call(function)


def awaited(policy: RetryPolicy, function: Failing) -> int:
    return asyncio.run(policy.call_async(function.awaited))


def iterated(policy: RetryPolicy, function: Failing) -> int:
    return next(policy.iterate(lambda: iter([function()])))


WAYS = pytest.mark.parametrize("way", [plain, awaited, iterated])


@contextmanager
def waits(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    """The waits (s) that are begun, none of which takes any time."""
    slept: list[float] = []
    real = asyncio.sleep
    with monkeypatch.context() as patch:
        patch.setattr(time, "sleep", slept.append)
        patch.setattr(asyncio, "sleep", lambda seconds: slept.append(seconds) or real(0))
        yield slept


@WAYS
def test_waits_double_until_the_call_goes_through(way: Way, monkeypatch: pytest.MonkeyPatch) -> None:
    with waits(monkeypatch) as slept:
        assert way(POLICY, Failing(*[Passing()] * 3)) == 4
    assert slept == [1, 2, 4]


@WAYS
def test_the_last_error_is_raised_as_it_is_when_no_try_is_left(way: Way, monkeypatch: pytest.MonkeyPatch) -> None:
    errors = [Passing() for _ in range(4)]
    failing = Failing(*errors)
    with waits(monkeypatch) as slept, pytest.raises(Passing) as raised:
        way(POLICY, failing)
    assert raised.value is errors[3] and failing.calls == 4 and slept == [1, 2, 4]


@WAYS
@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt(), SystemExit(3), asyncio.CancelledError()])
def test_what_does_not_pass_is_raised_at_once(way: Way, error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    """What stops a program or a task is never asked about."""
    failing = Failing(error)
    everything = replace(POLICY, again=may_pass if isinstance(error, Exception) else lambda error: True)
    with waits(monkeypatch) as slept, pytest.raises(type(error)):
        way(everything, failing)
    assert failing.calls == 1 and slept == []


@WAYS
def test_a_wait_is_as_long_as_the_error_asks_for_at_least(way: Way, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = replace(POLICY, asked_wait_s=lambda error: error.wait_s)  # type: ignore[attr-defined]
    with waits(monkeypatch) as slept:
        assert way(policy, Failing(Passing(7), Passing(0.5), Passing())) == 4
    assert slept == [7, 2, 4]


@WAYS
def test_waits_are_spread_by_the_jitter(way: Way, monkeypatch: pytest.MonkeyPatch) -> None:
    with waits(monkeypatch) as slept:
        way(replace(POLICY, jitter=lambda failures: 0.5 + failures / 10), Failing(*[Passing()] * 3))
    assert slept == pytest.approx([0.6, 1.4, 3.2])
    factors = [random_jitter(1) for _ in range(200)]
    assert 0.5 <= min(factors) < 0.7 and 1.3 < max(factors) <= 1.5


@pytest.mark.parametrize(("deadline", "calls"), [(100.9, 1), (101, 2), (102.9, 2), (103, 3)])
def test_no_wait_is_begun_that_would_end_after_the_deadline(
    deadline: float, calls: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing = Failing(*[Passing()] * 9)
    with waits(monkeypatch) as slept, pytest.raises(Passing):
        policy = replace(POLICY, clock=lambda: 100 + sum(slept))
        asyncio.run(policy.call_async(failing.awaited, deadline=deadline))
    assert failing.calls == calls


def test_an_iterator_goes_on_behind_what_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    def flaky() -> Iterator[int]:
        made.append(1)
        yield from range(3 * len(made))
        if len(made) < 3:
            raise Passing

    with waits(monkeypatch) as slept:
        assert list(POLICY.iterate(flaky)) == list(range(9))
    assert len(made) == 3 and slept == [1, 2]


def test_an_iterator_that_is_left_is_closed_and_not_made_anew() -> None:
    made, closed = [], []

    def endless() -> Iterator[int]:
        made.append(1)
        try:
            yield from range(100)
        finally:
            closed.append(1)

    items = POLICY.iterate(endless)
    assert next(items) == 0
    items.close()  # type: ignore[attr-defined]
    assert len(made) == len(closed) == 1


def test_a_task_that_waits_for_its_next_try_can_be_cancelled() -> None:
    async def main() -> int:
        failing, failed = Failing(*[Passing()] * 9), asyncio.Event()

        async def call() -> int:
            failed.set()
            return failing()

        task = asyncio.create_task(replace(POLICY, first_wait_s=3600).call_async(call))
        await failed.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return failing.calls

    assert asyncio.run(main()) == 1
