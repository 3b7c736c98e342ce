"""Retries with exponential backoff; the caller defines which errors are retried."""

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
    """Return the error and its causes, each once, outermost first.

    Causes are ``__cause__`` and Ray's ``cause``; with ``context`` also ``__context__``, unless it is suppressed.
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
    """Return a random factor of 0.5 to 1.5, so that callers that failed together do not retry at the same time."""
    return random.uniform(0.5, 1.5)


@dataclass(frozen=True)
class RetryPolicy:
    """Retry policy: exponential backoff with jitter.

    The last error is raised unchanged if ``again`` returns False, no try is left, or the wait would exceed the deadline.
    """

    again: Callable[[BaseException], bool]
    """Returns whether to retry after an error."""
    tries: int
    """Maximum number of calls, at least 1."""
    first_wait_s: float
    """Wait before the second call in seconds, without jitter; doubles with each further call."""
    jitter: Callable[[int], float] = random_jitter
    """Returns a factor on the wait from the number of failures so far (1 and more)."""
    asked_wait_s: Callable[[BaseException], float] = lambda error: 0.0
    """Returns the minimum wait in seconds that an error requests, such as Retry-After."""
    clock: Callable[[], float] = time.monotonic
    """Clock of deadlines, in seconds."""

    def call(self, function: Callable[[], T]) -> T:
        """Return ``function()``, with retries."""
        return tenacity.Retrying(**self._options(math.inf))(function)

    def iterate(self, make: Callable[[], Iterator[T]]) -> Iterator[T]:
        """Iterate over ``make()``; after a failure, call it again and skip the items already yielded.

        ``make`` must yield the same items every time. Yielded items do not reset the number of tries.
        """
        given = 0
        for attempt in tenacity.Retrying(**self._options(math.inf)):
            with attempt:
                for item in islice(make(), given, None):
                    yield item
                    given += 1
                return

    async def call_async(self, function: Callable[[], Awaitable[T]], *, deadline: float = math.inf) -> T:
        """Return ``await function()``, with retries; no wait is started that would end after ``deadline`` of the clock."""
        async for attempt in tenacity.AsyncRetrying(**self._options(deadline)):
            with attempt:
                return await function()
        raise AssertionError("unreachable: every attempt returns or raises")

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
