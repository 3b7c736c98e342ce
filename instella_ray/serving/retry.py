"""Calls that are made again when the replica working on them is lost.

Serve does not do that, because it cannot know that a call may be repeated. Ours may: the same seed gives the same bits
wherever it is run.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import TypeVar

from .ray_errors import is_loss
from .runner import EngineFailed

T = TypeVar("T")


def causes(error: BaseException) -> Iterator[BaseException]:
    """The exception that a stage raised inside what Ray made of it, each layer once, the innermost first."""
    seen: list[BaseException] = []
    waiting: list[BaseException | None] = [error]
    while waiting:
        current = waiting.pop()
        if isinstance(current, BaseException) and current not in seen:
            seen.append(current)
            waiting += [current.__cause__, getattr(current, "cause", None)]
    return reversed(seen)


def replica_failed(error: BaseException) -> bool:
    """True when the call may well succeed elsewhere: its replica, or one before it, died or broke."""
    return any(isinstance(cause, EngineFailed) or is_loss(cause) for cause in causes(error))


async def with_retries(
    call: Callable[[], Awaitable[T]],
    *,
    deadline: float = float("inf"),
    tries: int = 3,
    pause_s: float = 0.2,
    again: Callable[[BaseException], bool] = replica_failed,
    clock: Callable[[], float] = time.monotonic,
) -> T:
    """``await call()``, and again on an exception that ``again`` accepts: at most ``tries`` times in all.

    The pauses between tries double, for the loss to get known, and none is begun that would end after ``deadline``
    (in terms of ``clock``); the last exception is raised then.
    """
    for left in reversed(range(tries)):
        try:
            return await call()
        except Exception as error:
            if not left or not again(error) or clock() + pause_s > deadline:
                raise
        await asyncio.sleep(pause_s)
        pause_s *= 2
    raise AssertionError(f"tries {tries}: expected at least 1")
