"""Splits a dataset into samples to train on and held-out ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, Protocol

import numpy as np

from ...errors import UserError
from .order import EpochOrder, FileOrder, split_epochs


class ColumnData(Protocol):
    """Dataset with texts of each sample."""

    def __len__(self) -> int: ...

    def order(self, epoch: int) -> EpochOrder: ...

    def batch(self, epoch: int, samples: np.ndarray) -> Any: ...

    def column(self, index: np.ndarray, name: str) -> Sequence[str]:
        """Return the values of ``name`` (such as ``key``) of the samples at ``index``."""


class FileData(ColumnData, Protocol):
    """Dataset of samples in files, of which :class:`Span` takes a part."""

    seed: int
    window: int
    """Number of files whose samples are shuffled together."""

    @property
    def starts(self) -> np.ndarray:
        """Number of the first sample of each file, and of all samples, ``[files + 1]``."""

    def with_seed(self, seed: int) -> Any:
        """Return the same samples, with the random choices of another seed."""


class Span:
    """Samples ``start`` to ``stop - 1`` of a dataset, in an order of their own, with the dataset's random choices."""

    def __init__(self, data: FileData, start: int, stop: int) -> None:
        self.data, self.start, self.stop = data, start, stop
        starts = np.unique(np.clip(data.starts, start, stop)) - start
        self.order: Callable[[int], EpochOrder] = lru_cache(2)(
            lambda epoch: FileOrder(starts, data.seed, epoch, data.window)
        )

    def __len__(self) -> int:
        return self.stop - self.start

    def column(self, index: np.ndarray, name: str) -> Sequence[str]:
        """Return the values of ``name`` of the samples at ``index``."""
        return self.data.column(self.start + np.asarray(index), name)

    def batch(self, epoch: int, samples: np.ndarray, *options: Any) -> Any:
        """Return the batch of ``samples``, counted from ``epoch``; ``options`` are the dataset's own."""
        later, index = split_epochs(len(self), 0, samples)
        return self.data.batch(epoch, later * int(self.data.starts[-1]) + self.start + index, *options)


def split_off(data: FileData, count: int, seed: int) -> tuple[Span, Span]:
    """Split the last ``count`` samples off: returns those to train on, and the held-out ones with choices of ``seed``.

    The last ones rather than random ones, because they are in few files, which is fast to read; all views of an image
    come on one side, as far as they follow each other. The split depends on nothing but the data, so that no sample is
    trained on after the run's seed has changed. UserError if nothing would be left.
    """
    total = int(data.starts[-1])
    boundary = total - count
    while boundary > 0 and len(set(data.column(np.array([boundary - 1, boundary]), "key"))) == 1:
        boundary -= 1
    if boundary < 1:
        raise UserError(f"train.held_out.samples {count}: the data has {total} samples, none would be left to train on")
    return Span(data, 0, boundary), Span(data.with_seed(seed), boundary, total)
