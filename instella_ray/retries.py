"""Calls that are made again when they fail: how often, and after which waits. Which failures count, the caller says."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeVar

import tenacity

T = TypeVar("T")


def causes(error: BaseException, *, context: bool = False) -> list[BaseException]:
    """The error and those behind it, each once, the outermost first.

    Behind an error is what it was raised from, and what Ray holds as its ``cause``; with ``context`` also what was being
    handled when it was raised, where nobody said that the two have nothing to do with each other.
    """
    found: list[BaseException] = []
    waiting: list[BaseException | None] = [error]
    while waiting:
        current = waiting.pop()
        if not isinstance(current, BaseException) or current in found:
            continue
        found.append(current)
        handled = current.__context__ if context and not current.__suppress_context__ else None
        waiting += [handled, current.__cause__, getattr(current, "cause", None)]
    return found


def random_jitter(failures: int) -> float:
    """A factor of 0.5 to 1.5: those that failed together do not come back together."""
    return random.uniform(0.5, 1.5)


@dataclass(frozen=True)
class RetryPolicy:
    """Exponential backoff with jitter.

    The last error is raised, as it is, when ``again`` refuses it, no try is left, or the wait would pass the deadline.
    """

    again: Callable[[BaseException], bool]
    """Whether the call may succeed after this error."""
    tries: int
    """In all, at least 1."""
    first_wait_s: float
    """Wait before the second try (s), about; it doubles with each further one."""
    jitter: Callable[[int], float] = random_jitter
    """A factor of the wait, by the number of failures so far (1 and more)."""
    asked_wait_s: Callable[[BaseException], float] = lambda error: 0.0
    """The least wait that the error itself asks for (s)."""
    clock: Callable[[], float] = time.monotonic
    """What deadlines are in terms of (s)."""

    def call(self, function: Callable[[], T]) -> T:
        """Return ``function()``."""
        return tenacity.Retrying(**self._options(math.inf))(function)

    def iterate(self, make: Callable[[], Iterator[T]]) -> Iterator[T]:
        """Iterate over ``make()``; after a failure it is made anew and goes on behind what was given.

        ``make`` has to give the same items every time. Items that arrive do not restore tries.
        """
        given = 0
        for attempt in tenacity.Retrying(**self._options(math.inf)):
            with attempt:
                for item in islice(make(), given, None):
                    yield item
                    given += 1
                return

    async def call_async(self, function: Callable[[], Awaitable[T]], *, deadline: float = math.inf) -> T:
        """Return ``await function()``; no wait is begun that would end after ``deadline``, in terms of the clock."""
        async for attempt in tenacity.AsyncRetrying(**self._options(deadline)):
            with attempt:
                return await function()
        raise AssertionError("a try either returns or raises")

    def _options(self, deadline: float) -> dict[str, Any]:
        def wait(state: tenacity.RetryCallState) -> float:
            backoff = self.first_wait_s * 2 ** (state.attempt_number - 1) * self.jitter(state.attempt_number)
            return max(backoff, self.asked_wait_s(_error(state)))

        def stop(state: tenacity.RetryCallState) -> bool:
            return state.attempt_number >= self.tries or self.clock() + state.upcoming_sleep > deadline

        def again(error: BaseException) -> bool:
            return isinstance(error, Exception) and self.again(error)

        return {"wait": wait, "stop": stop, "retry": tenacity.retry_if_exception(again), "reraise": True}


def _error(state: tenacity.RetryCallState) -> BaseException:
    assert state.outcome is not None
    error = state.outcome.exception()
    assert error is not None
    return error
