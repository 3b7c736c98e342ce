"""A bound on the images under way, so that a queue never grows: who does not fit is told so at once."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from .failures import overloaded

WINDOW = 64
LONGEST_RETRY_AFTER_S = 60.0


class Gate:
    """Lets requests in while there is room for all of their images.

    Serve's own bound comes second. It is checked image by image and before the text encoder is through with a
    prompt: it would let a burst pass, drop half a request, and drop an image that is on its second try.
    """

    def __init__(self, capacity: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.capacity, self.clock = capacity, clock
        self.inside = 0
        """Images under way."""
        self._left: deque[float] = deque(maxlen=WINDOW)

    @contextmanager
    def enter(self, images: int) -> Iterator[None]:
        """Room for ``images`` within; :class:`.failures.ApiError` 429 when there is not."""
        excess = self.inside + images - self.capacity
        if excess > 0:
            raise overloaded(self._seconds_for(excess))
        self.inside += images
        try:
            yield
        finally:
            self.inside -= images
            self._left.extend([self.clock()] * min(images, WINDOW))

    def _seconds_for(self, images: int) -> float:
        """How long so many images take to leave, at the pace of the last ones."""
        if not self._left:
            return 1.0
        pace_s = (self.clock() - self._left[0]) / len(self._left)
        return min(max(images * pace_s, 1.0), LONGEST_RETRY_AFTER_S)
