"""What training reads: packed codes with captions, or pictures, as batches that depend on (seed, epoch, sample) alone.

``batch(epoch, samples)`` of each class takes what :meth:`.order.BatchPlan.samples` gives. NumPy alone, no torch: batches
are made in a thread, and a second thread with torch operations has a second OpenMP pool, which on a CPU halves the speed
of training.
"""

from __future__ import annotations

import math
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import numpy as np

from .. import storage
from ..errors import UserError
from .codes import CodesReader, LRUCache
from .decode import UndecodableError, crop_square, decode_rgb, resize_shorter_edge
from .order import BatchPlan, Place, SampleOrder, sample_uniforms, split_epochs
from .shards import find_shards
from .tar_source import read_samples, require_captions

__all__ = [
    "BatchPlan",
    "CodesBatch",
    "CodesData",
    "ImageBatch",
    "ImageData",
    "Mixture",
    "Place",
    "Prefetcher",
    "SampleOrder",
]

T = TypeVar("T")


class CodesBatch(NamedTuple):
    """A generator's training batch."""

    codes: np.ndarray
    """uint8 0/1 ``[B, L, K]``."""
    captions: list[str]
    """Empty where the caption was dropped."""
    keys: list[str]


class CodesData:
    """Packed codes with captions: long or short by chance, dropped by chance (for guidance)."""

    def __init__(
        self, reader: CodesReader, seed: int, *, short_probability: float = 0.5, drop_probability: float = 0.1
    ) -> None:
        self.reader, self.seed = reader, seed
        self.short_probability, self.drop_probability = short_probability, drop_probability

    def __len__(self) -> int:
        return len(self.reader)

    def batch(self, epoch: int, samples: np.ndarray) -> CodesBatch:
        """The samples as they look in their epoch."""
        epochs, index = split_epochs(len(self), epoch, samples)
        chance = sample_uniforms(self.seed, epochs, index)
        dropped, short = chance[:, 0] < self.drop_probability, chance[:, 1] < self.short_probability
        captions = np.where(
            short, self.reader.column(index, "caption_short"), self.reader.column(index, "caption_long")
        )
        captions[dropped] = ""
        return CodesBatch(self.reader.codes(index), captions.tolist(), self.reader.column(index, "key"))


class ImageBatch(NamedTuple):
    """A tokenizer's training batch."""

    pixels: np.ndarray
    """uint8 ``[B, size, size, 3]``."""
    keys: list[str]


class ImageData:
    """Curated pictures for tokenizer training, cropped at a random place along the longer side.

    Shards are read once to be counted. Encoded bytes, and decoded pixels, each stay in memory up to ``cache_bytes``:
    a small set is decoded once, a large one again every time.
    """

    def __init__(self, pattern: str, size: int, seed: int, *, cache_bytes: int = 2 << 30) -> None:
        self.size, self.seed = size, seed
        self.urls = list(find_shards(pattern))
        self._shards = LRUCache(self._load, lambda shard: sum(len(image) for _, image in shard), cache_bytes)
        self._starts = np.cumsum([0, *(len(self._shards[i]) for i in range(len(self.urls)))])
        self._pixels = LRUCache(self._decode, lambda item: item[1].nbytes, cache_bytes)
        if not len(self):
            raise UserError(f"{pattern}: no usable picture in these shards")

    def __len__(self) -> int:
        return int(self._starts[-1])

    def batch(self, epoch: int, samples: np.ndarray) -> ImageBatch:
        """The samples as they look in their epoch."""
        epochs, index = split_epochs(len(self), epoch, samples)
        offsets = sample_uniforms(self.seed, epochs, index)[:, :2]
        items = [self._pixels[i] for i in index.tolist()]
        crops = [crop_square(item[1], self.size, (dx, dy)) for item, (dx, dy) in zip(items, offsets, strict=True)]
        return ImageBatch(np.stack(crops), [key for key, _ in items])

    def _load(self, shard: int) -> list[tuple[str, bytes]]:
        return list(_pictures(self.urls[shard]))

    def _decode(self, index: int) -> tuple[str, np.ndarray]:
        """(key, uint8 ``[H, W, 3]`` with the shorter edge at the size)."""
        shard = int(np.searchsorted(self._starts, index, side="right")) - 1
        key, data = self._shards[shard][index - int(self._starts[shard])]
        try:
            image = decode_rgb(data, at_least=2 * self.size)
        except UndecodableError as error:
            raise UserError(f"{self.urls[shard]}: sample {key}: {error}; curate the shards first") from None
        return key, np.asarray(resize_shorter_edge(image, self.size))


def require_pictures(pattern: str) -> None:
    """UserError unless :class:`ImageData` has something to read there: shards, captions, a usable picture."""
    urls = list(find_shards(pattern))
    require_captions(urls)
    if not any(True for url in urls for _ in _pictures(url)):
        raise UserError(f"{pattern}: no usable picture in these shards")


def _pictures(url: str) -> Iterator[tuple[str, bytes]]:
    """(key, encoded picture) of the samples of one shard that nothing is wrong with."""
    with storage.open_file(url) as stream:
        for row in read_samples(stream, url):
            if row["image"] and not row["problem"]:
                yield row["key"], row["image"]


class Data(Protocol):
    """What a mixture mixes."""

    def __len__(self) -> int: ...

    def batch(self, epoch: int, samples: np.ndarray) -> Any: ...


class Mixture:
    """Sources in fixed proportions (LAION : synthetic = 3 : 1), to a :class:`BatchPlan` like one source.

    Of every ``sum(weights)`` samples, ``weights[k]`` come from source k. An epoch of the mixture is one in which every
    source is used up at least once; shorter sources begin again in a new order, each of their samples once a pass.
    """

    def __init__(self, sources: Sequence[Data], weights: Sequence[int], seed: int) -> None:
        if len(sources) != len(weights) or min(weights, default=0) < 1:
            raise UserError(
                f"mixture of {len(sources)} sources: weights {list(weights)}, expected one whole number above 0 each"
            )
        self.sources, self.weights, self.seed = sources, weights, seed
        self._owner = np.repeat(np.arange(len(weights)), weights)
        self._ordinal = np.concatenate([np.arange(weight) for weight in weights])
        self._rounds = max(math.ceil(len(s) / weight) for s, weight in zip(sources, weights, strict=True))

    def __len__(self) -> int:
        return self._rounds * len(self._owner)

    def batch(self, epoch: int, samples: np.ndarray) -> Any:
        """A batch of the sources' type, in the order of ``samples``."""
        epochs, index = split_epochs(len(self), epoch, samples)
        rounds, slot = np.divmod(index, len(self._owner))
        rounds += epochs * self._rounds
        batches, places = [], []
        for number, source in enumerate(self.sources):
            mine = np.flatnonzero(self._owner[slot] == number)
            if not len(mine):
                continue
            passes, within = np.divmod(rounds[mine] * self.weights[number] + self._ordinal[slot[mine]], len(source))
            for once in np.unique(passes).tolist():
                now = passes == once
                batches.append(source.batch(once, SampleOrder(len(source), self.seed + number, once)[within[now]]))
                places.append(mine[now])
        return _joined(batches, np.argsort(np.concatenate(places)).tolist())


class Prefetcher(Generic[T]):
    """Runs ``make(step)`` for steps from ``start`` in a thread, a few ahead of the loop that iterates."""

    def __init__(self, make: Callable[[int], T], start: int, stop: int, depth: int = 4) -> None:
        self._queue: queue.Queue[tuple[T | None, BaseException | None]] = queue.Queue(depth)
        self._left = stop - start
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(make, start, stop), daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[T]:
        try:
            for _ in range(self._left):
                item, error = self._queue.get()
                if error is not None:
                    raise error
                yield item  # type: ignore[misc]
        finally:
            self.close()

    def close(self) -> None:
        """End the thread; what it has prepared is dropped. Leaving the loop does this too."""
        self._ended.set()
        while self._thread.is_alive():
            try:
                self._queue.get(timeout=0.05)
            except queue.Empty:
                continue

    def _run(self, make: Callable[[int], T], start: int, stop: int) -> None:
        try:
            for step in range(start, stop):
                if self._ended.is_set():
                    return
                self._queue.put((make(step), None))
        except BaseException as error:  # handed to the loop, which raises it
            self._queue.put((None, error))


def _joined(batches: Sequence[Any], order: list[int]) -> Any:
    """Batches of one NamedTuple type as one, rows rearranged by ``order``."""
    fields: list[Any] = []
    for values in zip(*batches, strict=True):
        if isinstance(values[0], np.ndarray):
            fields.append(np.concatenate(values)[order])
        else:
            rows = [row for value in values for row in value]
            fields.append([rows[i] for i in order])
    return type(batches[0])(*fields)
