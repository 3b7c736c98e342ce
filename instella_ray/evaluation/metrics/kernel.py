"""Kernel distances between sets of features (squared MMD): KID and CMMD.

``MMD^2 = mean k(x, x') + mean k(y, y') - 2 mean k(x, y)`` over images x and reference images y. KID (Binkowski et al. 2018)
has the kernel ``(x.y / D + 1)^3`` over FID's features and the unbiased estimate, which leaves out x = x': unlike FID it
does not depend on the number of images, and may be negative. It is computed over all pairs, of which torch-fidelity and
clean-fid average random subsets. CMMD (Jayasumana et al. 2024) has ``exp(-|x - y|^2 / (2 10^2))`` over normalized CLIP
embeddings, all pairs, times 1000, as its authors' code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from .. import statistics
from .base import MetricResult
from .feature_rows import FeatureRows

GROUPS = 50
"""Number of jackknife groups."""
BLOCK = 4 << 20
"""Number of kernel values computed at a time."""

Kernel = Callable[[np.ndarray, np.ndarray], np.ndarray]


def cubic(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Compute KID's kernel of ``x [N, D]`` and ``y [M, D]``, float64 ``[N, M]``."""
    return np.asarray((x @ y.T / x.shape[1] + 1) ** 3)


def gaussian(x: np.ndarray, y: np.ndarray, width: float = 10.0) -> np.ndarray:
    """Compute CMMD's kernel of ``x [N, D]`` and ``y [M, D]``, float64 ``[N, M]``."""
    squares = (x**2).sum(1)[:, None] + (y**2).sum(1) - 2 * x @ y.T
    return np.exp(-np.maximum(squares, 0) / (2 * width**2))


KERNELS: dict[str, Kernel] = {"cubic": cubic, "gaussian, sigma 10": gaussian}


class KernelDistance(FeatureRows):
    """Squared MMD of images to reference images; the settings have its ``kernel``, ``unbiased`` and ``scale``.

    The interval is a jackknife's over the images, for fixed reference images.
    """

    kind = "kernel"

    def result(self, confidence: float = 0.95, seed: int = 0) -> MetricResult:
        x = self.rows()
        if len(x) < 2:
            return self.unknown(len(x), "a kernel distance needs two")
        y, settings = self.reference(), self.info.settings
        kernel, unbiased, scale = KERNELS[settings["kernel"]], settings["unbiased"], settings["scale"]
        numbers = self.jackknife_groups(GROUPS)
        sizes = np.bincount(numbers)
        within, across = _group_sums(kernel, x, numbers), _group_sums(kernel, x, numbers, y)[:, 0]
        if unbiased:
            within = within - np.diag(np.bincount(numbers, weights=_diagonal(kernel, x)))
        there = _total(kernel, y, unbiased)

        def distance(pairs: float, cross: float, count: int) -> float:
            among = pairs / (count * (count - 1)) if unbiased else pairs / count**2
            return float(scale * (among + there - 2 * cross / (count * len(y))))

        value = distance(within.sum(), across.sum(), len(x))
        left_out = [
            distance(within.sum() - 2 * within[g].sum() + within[g, g], across.sum() - across[g], len(x) - sizes[g])
            for g in range(len(sizes))
            if len(x) - sizes[g] >= 2
        ]
        about: dict[str, Any] = {"interval": statistics.JACKKNIFE, "confidence": confidence}
        if len(left_out) < len(sizes):
            return self.make_result(value, *statistics.UNKNOWN, len(x), **about)
        found = statistics.jackknife(value, np.array(left_out), sizes, confidence=confidence)
        return self.make_result(value, found.low, found.high, len(x), **about)


def _group_sums(kernel: Kernel, x: np.ndarray, numbers: np.ndarray, y: np.ndarray | None = None) -> np.ndarray:
    """Sum kernel values by the groups of ``x`` and, without ``y``, by groups on both sides: ``[G, G]``, else ``[G, 1]``."""
    groups = int(numbers.max()) + 1
    columns = np.ones((len(y), 1)) if y is not None else np.eye(groups)[numbers]
    sums = np.zeros((groups, columns.shape[1]))
    other = x if y is None else y
    for rows in blocks(len(x), len(other)):
        np.add.at(sums, numbers[rows], kernel(x[rows], other) @ columns)
    return sums


def _diagonal(kernel: Kernel, x: np.ndarray) -> np.ndarray:
    return np.array([float(kernel(row[None], row[None])[0, 0]) for row in x])


def _total(kernel: Kernel, y: np.ndarray, unbiased: bool) -> float:
    """Compute the mean kernel value among the reference images."""
    total = sum(float(kernel(y[rows], y).sum()) for rows in blocks(len(y), len(y)))
    if unbiased:
        return (total - _diagonal(kernel, y).sum()) / (len(y) * (len(y) - 1))
    return total / len(y) ** 2


def blocks(rows: int, columns: int) -> Iterator[slice]:
    """Yield slices of ``rows`` such that each with ``columns`` values a row has at most :data:`BLOCK` values."""
    step = max(1, BLOCK // max(columns, 1))
    yield from (slice(start, start + step) for start in range(0, rows, step))
