"""Training datasets of packed codes with captions, mixtures of datasets, and prefetching.

Samples depend only on (seed, epoch, sample). ``batch(epoch, samples)`` of each dataset takes the samples that
:meth:`.order.BatchPlan.samples` returns for its ``order(epoch)``. Uses NumPy and not torch: batches are built in a
thread, and torch operations in a second thread start a second OpenMP pool, which halves the speed of training on CPUs.
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
    """Training batch of a generator."""

    codes: np.ndarray
    """uint8 0/1 ``[B, L, K]``."""
    captions: list[str]
    """Captions; empty if dropped for guidance."""
    keys: list[str]
    tokens: list[list[int]] | None = None
    """Token ids of the captions, which the training task adds."""


class CaptionChoice(NamedTuple):
    """Random choice between the long, the short and no caption of a sample."""

    short: float = 0.5
    """Probability of the short caption, if the caption is not dropped."""
    dropped: float = 0.1
    """Probability of no caption, for classifier-free guidance."""

    def choose(self, chance: np.ndarray, long: Sequence[str], short: Sequence[str]) -> list[str]:
        """Choose from ``long [N]`` and ``short [N]``, or '' if dropped, by uniforms ``chance [N, 2]`` in [0, 1)."""
        captions = np.where(chance[:, 1] < self.short, np.array(short, object), np.array(long, object))
        captions[chance[:, 0] < self.dropped] = ""
        return captions.tolist()


class CodesData:
    """Dataset of packed codes, with a randomly chosen caption per sample (:class:`CaptionChoice`).

    Samples of ``window`` files are shuffled together, and held in memory: 70 MB for 64 files of a thousand samples.
    """

    def __init__(
        self,
        reader: CodesReader,
        seed: int,
        captions: CaptionChoice = CaptionChoice(),
        *,
        window: int = 64,
    ) -> None:
        self.reader, self.seed, self.captions, self.window = reader, seed, captions, window
        self.order: Callable[[int], EpochOrder] = lru_cache(2)(
            lambda epoch: FileOrder(reader.starts, seed, epoch, window)
        )

    def __len__(self) -> int:
        return len(self.reader)

    def batch(self, epoch: int, samples: np.ndarray) -> CodesBatch:
        """Return the batch of ``samples``, counted from ``epoch``, with the random choices of their epochs."""
        epochs, index = split_epochs(len(self), epoch, samples)
        chance = sample_uniforms(self.seed, epochs, index)
        captions = self.captions.choose(chance[:, :2], *(self.reader.column(index, name) for name in CAPTIONS))
        return CodesBatch(self.reader.codes(index), captions, self.reader.column(index, "key"))

    def with_seed(self, seed: int) -> CodesData:
        """Return the same samples, with captions chosen by another seed."""
        return CodesData(self.reader, seed, self.captions, window=self.window)

    @property
    def starts(self) -> np.ndarray:
        """Number of the first sample of each file, and of all samples."""
        return self.reader.starts

    def column(self, index: np.ndarray, name: str) -> list[str]:
        """Return the values of ``key``, ``caption_long`` or ``caption_short`` of the samples at ``index``."""
        return self.reader.column(index, name)


class Data(Protocol):
    """Dataset that a :class:`Mixture` can use as a source."""

    def __len__(self) -> int: ...

    def order(self, epoch: int) -> EpochOrder: ...

    def batch(self, epoch: int, samples: np.ndarray) -> Any: ...


class _IdentityOrder:
    def __getitem__(self, index: np.ndarray) -> np.ndarray:
        return np.asarray(index, np.int64)


class Mixture:
    """Dataset that mixes sources in fixed proportions (such as LAION : synthetic = 3 : 1).

    Of every ``sum(weights)`` samples, ``weights[k]`` come from source k. In an epoch of the mixture, every source is
    used completely at least once; shorter sources repeat, in a new order in each pass. Each source is read in its usual
    order, so that mixing does not change the access to its files. Raises UserError for weights that are not one
    positive integer per source.
    """

    def __init__(self, sources: Sequence[Data], weights: Sequence[int], seed: int) -> None:
        if len(sources) != len(weights) or min(weights, default=0) < 1:
            raise UserError(
                f"mixture of {len(sources)} sources: weights {list(weights)}, expected one positive integer per source"
            )
        self.sources, self.weights, self.seed = sources, weights, seed
        self._owner = np.repeat(np.arange(len(weights)), weights)
        self._ordinal = np.concatenate([np.arange(weight) for weight in weights])
        self._rounds = max(math.ceil(len(s) / weight) for s, weight in zip(sources, weights, strict=True))

    def __len__(self) -> int:
        return self._rounds * len(self._owner)

    def order(self, epoch: int) -> EpochOrder:
        """Return the identity order: the orders of the sources shuffle the samples."""
        return _IdentityOrder()

    def batch(self, epoch: int, samples: np.ndarray) -> Any:
        """Build a batch of the sources' batch type, in the order of ``samples``."""
        epochs, index = split_epochs(len(self), epoch, samples)
        rounds, slot = np.divmod(index, len(self._owner))
        # Rounds start at random slots: otherwise ranks, which take every n-th sample, might see only some sources.
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
    """Iterator over ``make(step)`` for steps ``start`` to ``stop - 1``, computed in a thread up to ``depth`` steps ahead."""

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
        """Stop the thread and discard prefetched items; also called when the iteration ends."""
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
        except BaseException as error:  # raised again by the iterating thread
            self._queue.put((None, error))


def _joined(batches: Sequence[Any], order: list[int]) -> Any:
    """Concatenate batches of one NamedTuple type, and reorder the rows by ``order``."""
    fields: list[Any] = []
    for values in zip(*batches, strict=True):
        if isinstance(values[0], np.ndarray):
            fields.append(np.concatenate(values)[order])
        elif values[0] is None:
            fields.append(None)
        elif isinstance(values[0], Mapping):
            fields.append({key: np.concatenate([value[key] for value in values])[order] for key in values[0]})
        else:
            rows = [row for value in values for row in value]
            fields.append([rows[i] for i in order])
    return type(batches[0])(*fields)
