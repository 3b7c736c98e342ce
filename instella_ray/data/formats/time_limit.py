"""Time limit of an iterator, also of one that waits forever."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from concurrent.futures import Future
from threading import Thread
from typing import TypeVar, cast

T = TypeVar("T")
_END = object()


class OutOfTimeError(Exception):
    """Iterator that took too long."""


def within(items: Iterator[T], seconds: float) -> Iterator[T]:
    """Yield ``items``; OutOfTimeError once waiting for them has taken ``seconds``, which abandons their thread.

    Time between the items does not count.
    """
    if math.isinf(seconds):
        yield from items
        return
    left = seconds
    while True:
        began = time.monotonic()
        item = _next(items, left)
        if item is _END:
            return
        left = max(0.0, left - (time.monotonic() - began))
        yield cast(T, item)


def _next(items: Iterator[T], seconds: float) -> object:
    result: Future[object] = Future()

    def run() -> None:
        try:
            result.set_result(next(items, _END))
        except BaseException as error:
            result.set_exception(error)

    Thread(target=run, daemon=True).start()  # the interpreter does not wait for it
    try:
        return result.result(seconds)
    except TimeoutError:
        if result.done():  # an error of the iterator
            raise
        raise OutOfTimeError from None
