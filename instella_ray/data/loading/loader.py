"""What training reads, as batches that depend on (seed, epoch, sample) alone: packed codes with captions, and mixtures.

``batch(epoch, samples)`` of each class takes what :meth:`.order.BatchPlan.samples` gives for its ``order(epoch)``. NumPy
alone, no torch: batches are made in a thread, and a second thread with torch operations has a second OpenMP pool, which on
a CPU halves the speed of training.
"""

from __future__ import annotations

import math
import queue
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import numpy as np

from ...errors import UserError
from ..formats.codes import CodesReader
from .order import EpochOrder, FileOrder, sample_uniforms, split_epochs

T = TypeVar("T")
CAPTIONS = ("caption_long", "caption_short")


class CodesBatch(NamedTuple):
    """A generator's training batch."""

    codes: np.ndarray
    """uint8 0/1 ``[B, L, K]``."""
    captions: list[str]
    """Empty where the caption was dropped."""
    keys: list[str]


class CaptionChoice(NamedTuple):
    """Which of its captions a sample is trained with."""

    short: float = 0.5
    """Chance of the short one."""
    dropped: float = 0.1
    """Chance of none, for guidance."""

    def choose(self, chance: np.ndarray, long: Sequence[str], short: Sequence[str]) -> list[str]:
        """A caption each of ``long [N]`` and ``short [N]``, or '', by uniforms ``chance [N, 2]``."""
        captions = np.where(chance[:, 1] < self.short, np.array(short, object), np.array(long, object))
        captions[chance[:, 0] < self.dropped] = ""
        return captions.tolist()


class CodesData:
    """Packed codes with captions: long or short by chance, dropped by chance (for guidance).

    The samples of ``window`` files are mixed at a time, and held in memory: 70 MB for 64 files of a thousand.
    """

    def __init__(
        self,
        reader: CodesReader,
        seed: int,
        captions: CaptionChoice = CaptionChoice(),
        *,
        window: int = 64,
    ) -> None:
        self.reader, self.seed, self.captions = reader, seed, captions
        self.order: Callable[[int], EpochOrder] = lru_cache(2)(
            lambda epoch: FileOrder(reader.starts, seed, epoch, window)
        )

    def __len__(self) -> int:
        return len(self.reader)

    def batch(self, epoch: int, samples: np.ndarray) -> CodesBatch:
        """The samples as they look in their epoch."""
        epochs, index = split_epochs(len(self), epoch, samples)
        chance = sample_uniforms(self.seed, epochs, index)
        captions = self.captions.choose(chance[:, :2], *(self.reader.column(index, name) for name in CAPTIONS))
        return CodesBatch(self.reader.codes(index), captions, self.reader.column(index, "key"))

    def long_captions(self, index: np.ndarray) -> list[str]:
        """Of the samples at ``index``."""
        return self.reader.column(index, CAPTIONS[0])


class Data(Protocol):
    """What a mixture mixes."""

    def __len__(self) -> int: ...

    def order(self, epoch: int) -> EpochOrder: ...

    def batch(self, epoch: int, samples: np.ndarray) -> Any: ...


class _AsTheyAre:
    def __getitem__(self, index: np.ndarray) -> np.ndarray:
        return np.asarray(index, np.int64)


class Mixture:
    """Sources in fixed proportions (LAION : synthetic = 3 : 1), to a :class:`BatchPlan` like one source.

    Of every ``sum(weights)`` samples, ``weights[k]`` come from source k. An epoch of the mixture is one in which every
    source is used up at least once; shorter sources begin again in a new order, each of their samples once a pass. Each
    source keeps to its own order, so that its files are read as if it were alone.
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

    def order(self, epoch: int) -> EpochOrder:
        """The numbers as they are: the sources' orders do the mixing."""
        return _AsTheyAre()

    def batch(self, epoch: int, samples: np.ndarray) -> Any:
        """A batch of the sources' type, in the order of ``samples``."""
        epochs, index = split_epochs(len(self), epoch, samples)
        rounds, slot = np.divmod(index, len(self._owner))
        # Every round begins elsewhere, or ranks that take every n-th sample would see some sources only.
        turn = sample_uniforms(self.seed, epochs, rounds)[:, 0] * len(self._owner)
        slot = (slot + turn.astype(np.int64)) % len(self._owner)
        rounds += epochs * self._rounds
        batches, places = [], []
        for number, source in enumerate(self.sources):
            mine = np.flatnonzero(self._owner[slot] == number)
            if not len(mine):
                continue
            passes, within = np.divmod(rounds[mine] * self.weights[number] + self._ordinal[slot[mine]], len(source))
            for once in np.unique(passes).tolist():
                now = passes == once
                batches.append(source.batch(once, source.order(once)[within[now]]))
                places.append(mine[now])
        return _joined(batches, np.argsort(np.concatenate(places)).tolist())


class Prefetcher(Generic[T]):
    """Runs ``make(step)`` for steps from ``start`` in a thread, a few ahead of the loop that iterates."""

    def __init__(self, make: Callable[[int], T], start: int, stop: int, depth: int = 4) -> None:
        self._queue: queue.Queue[tuple[T | None, BaseException | None]] = queue.Queue(depth)
        self._left = stop - start
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(make, start, stop), name="loader", daemon=True)
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
        elif isinstance(values[0], Mapping):
            fields.append({key: np.concatenate([value[key] for value in values])[order] for key in values[0]})
        else:
            rows = [row for value in values for row in value]
            fields.append([rows[i] for i in order])
    return type(batches[0])(*fields)
