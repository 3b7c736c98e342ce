"""Limits of whoever makes a request: rate, images in progress and models of an API key."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from .admission import Gate
from .api_error import rate_limited
from .keys import ANONYMOUS, ApiKey

MINUTE_S = 60.0


@dataclass(frozen=True)
class Caller:
    """Maker of a request: the name of the API key, and what it may use."""

    name: str
    models: tuple[str, ...] | None
    """Models that it may use. None: all."""
    images: Gate
    """Images that it has in progress."""

    def may_use(self, model: str) -> bool:
        return self.models is None or model in self.models


class RequestWindow:
    """Limit on the requests of any 60 seconds, exact to the request."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self._admitted: deque[float] = deque()

    def admit(self, limit: int) -> None:
        """Admit a request; raises ApiError 429 with the seconds until one would be admitted, and does not count it."""
        now = self.clock()
        while self._admitted and self._admitted[0] <= now - MINUTE_S:
            self._admitted.popleft()
        if len(self._admitted) >= limit:
            raise rate_limited(f"{limit} requests a minute", self._admitted[-limit] + MINUTE_S - now)
        self._admitted.append(now)


class CallerLimits:
    """Limits of all API keys in one of ``replicas`` processes of the ingress.

    Each process holds its share, rounded up, as :meth:`.config.ServeArgs.share` of the endpoint's images: no request
    waits for another process. A request of more images than the share, and at most the key's limit, is admitted while
    the key has none in progress here.
    """

    def __init__(self, replicas: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.replicas, self.clock = replicas, clock
        self._states: dict[str, tuple[RequestWindow, Gate]] = {}

    def caller(self, key: ApiKey | None, *, counted: bool) -> Caller:
        """Return the caller with ``key``; None has no limits.

        Raises ApiError 429 if a request that is ``counted`` exceeds the key's rate.
        """
        if key is None:
            return Caller(ANONYMOUS, None, self._gate())
        window, gate = self._states.setdefault(key.name, (RequestWindow(self.clock), self._gate()))
        # Set for each request, because the entry may have changed.
        gate.largest = key.concurrent_images or math.inf
        gate.capacity = math.ceil(gate.largest / self.replicas) if key.concurrent_images else math.inf
        if counted and key.requests_per_minute:
            window.admit(math.ceil(key.requests_per_minute / self.replicas))
        return Caller(key.name, key.models, gate)

    def _gate(self) -> Gate:
        return Gate(math.inf, self.clock, lambda wait_s: rate_limited("images in progress", wait_s))
