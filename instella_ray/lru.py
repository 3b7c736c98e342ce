"""Least-recently-used caches, limited in bytes."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
T = TypeVar("T")


class LRUCache(Generic[K, T]):
    """Least-recently-used cache of items, limited to ``limit`` bytes in total; the latest item is kept whatever its size.

    ``size(item)`` returns an item's size (bytes). Threads may share a cache; two of them may load the same item.
    """

    def __init__(self, size: Callable[[T], int], limit: int) -> None:
        self.size, self.limit = size, limit
        self.used = 0
        self.items: OrderedDict[K, T] = OrderedDict()
        self.lock = threading.Lock()

    def get(self, key: K, make: Callable[[], T]) -> T:
        """Return the item of ``key``, from ``make`` if it is not cached."""
        return self.many([key], lambda _: [make()])[0]

    def many(self, keys: Sequence[K], load: Callable[[list[K]], Iterable[T]]) -> list[T]:
        """Return the items of ``keys``; ``load(keys)`` returns those of all that are not cached, in one call."""
        with self.lock:
            found = {key: self.items[key] for key in keys if key in self.items}
        missing = [key for key in dict.fromkeys(keys) if key not in found]
        loaded = dict(zip(missing, load(missing) if missing else (), strict=True))
        with self.lock:
            for key, item in loaded.items():
                if key not in self.items:  # else another thread was faster
                    self.items[key] = item
                    self.used += self.size(item)
            for key in keys:
                if key in self.items:
                    self.items.move_to_end(key)
            while self.used > self.limit and len(self.items) > 1:
                self.used -= self.size(self.items.popitem(last=False)[1])
        return [found[key] if key in found else loaded[key] for key in keys]
