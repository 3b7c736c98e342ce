"""The order of samples: a function of (seed, epoch) alone, computed where it is needed and stored nowhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import numpy as np

from ...errors import UserError
from ...models import philox


class EpochOrder(Protocol):
    """Sample numbers by their place in one epoch."""

    def __getitem__(self, index: np.ndarray) -> np.ndarray:
        """Sample numbers, int64 ``[N]``, at places ``index [N]``."""


class SampleOrder:
    """A pseudo-random permutation of ``range(count)`` for one (seed, epoch), read at any index without storing it.

    ``part`` tells several permutations of one (seed, epoch) apart.

    A six-round Feistel network permutes the next power of four; values outside the range walk on until they fall
    inside ("cycle walking"), which keeps it a permutation.
    """

    def __init__(self, count: int, seed: int, epoch: int, part: int | None = None) -> None:
        self.count = count
        # Networks of a few bits hardly mix, so small sets walk through a larger range too.
        self.half_bits = max(4, (max(count - 1, 1).bit_length() + 1) // 2)
        names = [seed & (2**63 - 1), epoch, 0x0DE2, *(() if part is None else (1 + part,))]
        keys = np.random.default_rng(names).integers(0, 2**32, 6, np.uint64)
        self.keys = [np.uint64(key) for key in keys]

    def __getitem__(self, index: np.ndarray) -> np.ndarray:
        """Sample numbers, int64 ``[N]``, at places ``index [N]`` (0 to count - 1) of the order."""
        values = self._permute(np.asarray(index, np.uint64))
        while (outside := values >= self.count).any():
            values[outside] = self._permute(values[outside])
        return values.astype(np.int64)

    def _permute(self, values: np.ndarray) -> np.ndarray:
        bits, mask = np.uint64(self.half_bits), np.uint64((1 << self.half_bits) - 1)
        left, right = values >> bits, values & mask
        for key in self.keys:
            mixed = (right ^ key) * np.uint64(0x9E3779B97F4A7C15)
            mixed = (mixed ^ (mixed >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
            left, right = right, left ^ ((mixed >> np.uint64(32)) & mask)
        return (left << bits) | right


class FileOrder:
    """A permutation that reads files a few at a time: all in pseudo-random order, and the samples of every ``window``
    files that follow one another in it mixed with each other.

    So each sample is as likely here as there, while only ``window`` files need be at hand at once. With no more files
    than that it is one :class:`SampleOrder` over all.
    """

    def __init__(self, starts: np.ndarray, seed: int, epoch: int, window: int) -> None:
        """``starts [files + 1]``: the number of each file's first sample, and of all samples."""
        files, (self.seed, self.epoch) = len(starts) - 1, (seed, epoch)
        self.whole = SampleOrder(int(starts[-1]), seed, epoch) if files <= window else None
        permuted = SampleOrder(files, seed, epoch, 0)[np.arange(files)]
        self.first = np.asarray(starts)[permuted]
        self.ends = np.cumsum(np.diff(starts)[permuted])
        # Where in the epoch each window begins; those without a sample are none.
        self.windows = np.unique(np.concatenate([[0], self.ends[window - 1 :: window], self.ends[-1:]]))

    def __getitem__(self, index: np.ndarray) -> np.ndarray:
        """Sample numbers, int64 ``[N]``, at places ``index [N]`` of the order."""
        index = np.asarray(index, np.int64)
        if self.whole is not None:
            return self.whole[index]
        windows = np.searchsorted(self.windows, index, side="right") - 1
        mixed = np.empty_like(index)
        for number in np.unique(windows).tolist():
            start, count = self.windows[number], int(np.diff(self.windows)[number])
            here = windows == number
            mixed[here] = start + SampleOrder(count, self.seed, self.epoch, 1 + number)[index[here] - start]
        files = np.searchsorted(self.ends, mixed, side="right")
        return self.first[files] + mixed - np.concatenate([[0], self.ends])[files]


class Place(NamedTuple):
    """Where a global batch stands in the data."""

    epoch: int
    offset: int
    """Samples of this epoch that come before it."""


class BatchPlan:
    """Which samples each rank reads at each step.

    The epochs follow one another without a gap: a global batch may end one and begin the next, so every batch is full
    and every sample is used exactly once an epoch. Global batch s is the same set of samples on any number of ranks,
    and is computed without the batches before it; so a run may stop at any step and go on, on other workers.
    """

    def __init__(
        self, count: int, global_batch: int, order: Callable[[int], EpochOrder], rank: int = 0, world_size: int = 1
    ) -> None:
        """``order(epoch)`` gives an epoch's permutation of ``range(count)``."""
        if global_batch % world_size:
            raise UserError(f"global batch {global_batch}: not a multiple of {world_size} workers")
        if count < 1:
            raise UserError("no samples to train on")
        self.count, self.global_batch, self.order = count, global_batch, order
        self.rank, self.world_size = rank, world_size

    def place(self, step: int) -> Place:
        """The place of the first sample of global step ``step``."""
        return Place(*divmod(step * self.global_batch, self.count))

    def positions(self) -> np.ndarray:
        """Places in every global batch, int64 ``[global_batch / world_size]``, of this rank's samples."""
        return np.arange(self.rank, self.global_batch, self.world_size)

    def samples(self, step: int) -> np.ndarray:
        """Sample numbers, int64 ``[global_batch / world_size]``, of this rank at global step ``step``.

        Counted from the epoch of :meth:`place`: numbers of ``count`` and above belong to the epochs after it.
        """
        first, start = self.place(step)
        epochs, index = np.divmod(start + self.positions(), self.count)
        samples = np.empty_like(index)
        for epoch in np.unique(epochs).tolist():
            now = epochs == epoch
            samples[now] = self.order(first + epoch)[index[now]] + epoch * self.count
        return samples


def split_epochs(count: int, epoch: int, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(epochs, sample numbers under ``count``), int64 ``[N]`` each, of samples counted from ``epoch``."""
    later, index = np.divmod(np.asarray(samples, np.int64), count)
    return epoch + later, index


def sample_uniforms(seed: int, epochs: np.ndarray, samples: np.ndarray) -> np.ndarray:
    """Float64 ``[N, 4]`` in [0, 1): what is random about a sample depends on (seed, epoch, sample) alone."""
    index, epoch, low = np.asarray(samples, np.int64), np.asarray(epochs, np.int64), philox.MASK
    # The last word of the counter is never 0 here, which sets these draws apart from those of rng.uniforms.
    counter = (index & low, (index >> 32) & low, np.zeros_like(index), epoch + 1)
    key = (np.array(seed & low), np.array((seed >> 32) & low))
    return np.stack(philox.philox(counter, key), axis=1) / 2.0**32
