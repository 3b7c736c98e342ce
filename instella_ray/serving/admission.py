"""Admission control: limits the images in progress and rejects further requests immediately."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from .api_error import ApiError, overloaded

WINDOW = 64
LONGEST_RETRY_AFTER_S = 60.0


class Gate:
    """Limit on the number of images in progress; admits or rejects a request as a whole.

    Serve's own limit is only a second one. It is checked per image and before the text encoder has finished a prompt:
    it would admit a burst, reject part of a request, and reject an image that is being retried.
    """

    def __init__(
        self,
        capacity: float,
        clock: Callable[[], float] = time.monotonic,
        refusal: Callable[[float], ApiError] = overloaded,
    ) -> None:
        """``refusal`` makes the error of a rejected request, of the seconds after which it may be made again."""
        self.capacity, self.clock, self.refusal = capacity, clock, refusal
        self.largest = capacity
        """Images of the largest request, which is admitted even over the capacity while no other is in progress."""
        self.inside = 0
        """Number of images in progress."""
        self._finished: deque[float] = deque(maxlen=WINDOW)

    @contextmanager
    def enter(self, images: int) -> Iterator[None]:
        """Admit ``images`` for the duration of the block; raises :class:`.api_error.ApiError` 429 over the capacity."""
        excess = self.inside + images - self.capacity
        if excess > 0 and (self.inside or images > self.largest):
            raise self.refusal(self._seconds_for(excess))
        self.inside += images
        try:
            yield
        finally:
            self.inside -= images
            self._finished.extend([self.clock()] * min(images, WINDOW))

    def _seconds_for(self, images: float) -> float:
        """Estimate the seconds until ``images`` images have finished, from the rate of the last ``WINDOW`` ones."""
        if not self._finished:
            return 1.0
        pace_s = (self.clock() - self._finished[0]) / len(self._finished)
        return min(max(images * pace_s, 1.0), LONGEST_RETRY_AFTER_S)
