"""Text features by prompt: each prompt is encoded once, however many images of it are requested."""

from __future__ import annotations

import asyncio
from collections import Counter, OrderedDict
from collections.abc import Awaitable, Callable
from contextvars import Context

import numpy as np

Encode = Callable[[str], Awaitable[np.ndarray]]


class PromptFeatures:
    """LRU cache of text features, limited to ``max_bytes``; concurrent requests with the same prompt share one call.

    A cached prompt saves a request the call of the text encoder stage. The features of a prompt must not depend on the
    call.
    """

    def __init__(self, encode: Encode, max_bytes: int = 256 << 20) -> None:
        self.encode, self.max_bytes = encode, max_bytes
        self.bytes = 0
        self._features: OrderedDict[str, np.ndarray] = OrderedDict()
        self._calls: dict[str, asyncio.Task[np.ndarray]] = {}
        self._waiting: Counter[str] = Counter()

    async def __call__(self, prompt: str) -> np.ndarray:
        """Return the features of ``prompt``, float32 ``[layers, T, width]``; raises what the call raises.

        The call is cancelled when nobody waits for it any more.
        """
        if (found := self._features.get(prompt)) is not None:
            self._features.move_to_end(prompt)
            return found
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
        self._features[prompt] = features
        self.bytes += features.nbytes
        while self.bytes > self.max_bytes:
            self.bytes -= self._features.popitem(last=False)[1].nbytes
        return features
