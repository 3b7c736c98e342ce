"""Text features by prompt: each prompt is encoded once, however many images of it are requested."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable
from contextvars import Context

import numpy as np

from ..lru import LRUCache

Encode = Callable[[str], Awaitable[np.ndarray]]


class PromptFeatures:
    """LRU cache of text features (:class:`..lru.LRUCache`); concurrent requests with the same prompt share one call.

    A cached prompt saves a request the call of the text encoder stage. The features of a prompt must not depend on the
    call.
    """

    def __init__(self, encode: Encode, max_bytes: int = 256 << 20) -> None:
        self.encode = encode
        self.cache: LRUCache[str, np.ndarray] = LRUCache(lambda features: features.nbytes, max_bytes)
        self._calls: dict[str, asyncio.Task[np.ndarray]] = {}
        self._waiting: Counter[str] = Counter()

    async def __call__(self, prompt: str) -> np.ndarray:
        """Return the features of ``prompt``, float32 ``[layers, T, width]``; raises what the call raises.

        The call is cancelled when nobody waits for it any more.
        """
        if prompt in self.cache.items:
            return self.cache.many([prompt], lambda _: ())[0]
        if prompt not in self._calls:
            # In a context of its own: Serve cancels the calls of a request whose client leaves, and others may wait.
            self._calls[prompt] = asyncio.create_task(self._call(prompt), context=Context())
        call = self._calls[prompt]
        self._waiting[prompt] += 1
        try:
            return await asyncio.shield(call)
        finally:
            self._waiting[prompt] -= 1
            if not self._waiting[prompt]:
                del self._waiting[prompt]
                call.cancel()

    async def _call(self, prompt: str) -> np.ndarray:
        try:
            features = await self.encode(prompt)
        finally:
            del self._calls[prompt]
        return self.cache.get(prompt, lambda: features)
