"""Deterministic order of samples as a function of (seed, epoch), and the batches of each rank; computed, not stored."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import numpy as np

from ...errors import UserError
from ...models import philox


class EpochOrder(Protocol):
    """Order of the samples of one epoch."""

    def __getitem__(self, index: np.ndarray) -> np.ndarray:
        """Return the sample numbers, int64 ``[N]``, at positions ``index [N]``."""


class SampleOrder:
    """Pseudo-random permutation of ``range(count)`` for one (seed, epoch), evaluated at any index without storing it.

    ``part`` distinguishes several permutations of the same (seed, epoch).

    A six-round Feistel network permutes the next power of four; values outside the range are permuted again until they
    fall inside ("cycle walking"), which keeps it a permutation.
    """

    def __init__(self, count: int, seed: int, epoch: int, part: int | None = None) -> None:
        self.count = count
        # Networks of a few bits mix poorly, so small counts use a larger range too.
        self.half_bits = max(4, (max(count - 1, 1).bit_length() + 1) // 2)
        names = [seed & (2**63 - 1), epoch, 0x0DE2, *(() if part is None else (1 + part,))]
        keys = np.random.default_rng(names).integers(0, 2**32, 6, np.uint64)
        self.keys = [np.uint64(key) for key in keys]

    def __getitem__(self, index: np.ndarray) -> np.ndarray:
        """Return the sample numbers, int64 ``[N]``, at positions ``index [N]`` (0 to count - 1)."""
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
    """Permutation of samples that needs only ``window`` files at a time: files are in pseudo-random order, and the
    samples of every ``window`` consecutive files are shuffled together.

    A sample is equally likely at any position. With at most ``window`` files it is one :class:`SampleOrder` over all.
    """

    def __init__(self, starts: np.ndarray, seed: int, epoch: int, window: int) -> None:
        """``starts [files + 1]`` are the numbers of the first sample of each file, and the number of all samples."""
        files, (self.seed, self.epoch) = len(starts) - 1, (seed, epoch)
        self.whole = SampleOrder(int(starts[-1]), seed, epoch) if files <= window else None
        permuted = SampleOrder(files, seed, epoch, 0)[np.arange(files)]
        self.first = np.asarray(starts)[permuted]
        self.ends = np.cumsum(np.diff(starts)[permuted])
        # Position in the epoch at which each window starts; np.unique removes empty windows.
        self.windows = np.unique(np.concatenate([[0], self.ends[window - 1 :: window], self.ends[-1:]]))

    def __getitem__(self, index: np.ndarray) -> np.ndarray:
        """Return the sample numbers, int64 ``[N]``, at positions ``index [N]``."""
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
    """Position of a global batch in the data."""

    epoch: int
    offset: int
    """Number of samples of this epoch before the batch."""


class BatchPlan:
    """Assignment of samples to ranks and steps.

    Epochs follow each other without a gap: a global batch may span two epochs, so every batch is full and every sample
    is used exactly once per epoch. Global batch s is the same set of samples for any number of ranks, and is computed
    without the batches before it, so a run may stop at any step and resume with another number of workers.
    """

    def __init__(
        self, count: int, global_batch: int, order: Callable[[int], EpochOrder], rank: int = 0, world_size: int = 1
    ) -> None:
        """``order(epoch)`` returns the permutation of ``range(count)`` of an epoch.

        Raises UserError if ``global_batch`` is not a multiple of ``world_size``, or ``count`` is 0.
        """
        if global_batch % world_size:
            raise UserError(f"global batch {global_batch}: not a multiple of {world_size} workers")
        if count < 1:
            raise UserError("no samples to train on")
        self.count, self.global_batch, self.order = count, global_batch, order
        self.rank, self.world_size = rank, world_size

    def place(self, step: int) -> Place:
        """Return the position of the first sample of global step ``step``."""
        return Place(*divmod(step * self.global_batch, self.count))

    def positions(self) -> np.ndarray:
        """Return the positions of this rank's samples in a global batch, int64 ``[global_batch / world_size]``."""
        return np.arange(self.rank, self.global_batch, self.world_size)

    def samples(self, step: int) -> np.ndarray:
        """Return this rank's sample numbers at global step ``step``, int64 ``[global_batch / world_size]``.

        They count from the epoch of :meth:`place`: numbers of ``count`` and above belong to later epochs.
        """
        first, start = self.place(step)
        epochs, index = np.divmod(start + self.positions(), self.count)
        samples = np.empty_like(index)
        for epoch in np.unique(epochs).tolist():
            now = epochs == epoch
            samples[now] = self.order(first + epoch)[index[now]] + epoch * self.count
        return samples


def split_epochs(count: int, epoch: int, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Split samples counted from ``epoch`` into (epochs, sample numbers below ``count``), int64 ``[N]`` each."""
    later, index = np.divmod(np.asarray(samples, np.int64), count)
    return epoch + later, index


def sample_uniforms(seed: int, epochs: np.ndarray, samples: np.ndarray) -> np.ndarray:
    """Return uniform random numbers per sample, float64 ``[N, 4]`` in [0, 1), that depend only on (seed, epoch, sample)."""
    index, epoch, low = np.asarray(samples, np.int64), np.asarray(epochs, np.int64), philox.MASK
    # The last counter word is never 0 here, so that the draws differ from those of rng.uniforms.
    counter = (index & low, (index >> 32) & low, np.zeros_like(index), epoch + 1)
    key = (np.array(seed & low), np.array((seed >> 32) & low))
    return np.stack(philox.philox(counter, key), axis=1) / 2.0**32
