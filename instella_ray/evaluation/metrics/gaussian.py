"""Mean and covariance of features, their files, and the Frechet distance between two of them.

``d = |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2))`` for means m and covariances C.
"""

from __future__ import annotations

import hashlib
import zipfile
import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.lib.npyio import NpzFile
from scipy import linalg

from ... import storage
from ...errors import UserError
from .moments import Sums

EXPECTED = "expected a whole .npz file with mu [D] and sigma [D, D]"
TOLERANCE = 1e-3
"""Share of the largest value by which a covariance may fail to be symmetric or positive semi-definite (float16's digits)."""


@dataclass(frozen=True)
class Gaussian:
    """Mean ``[D]`` and covariance ``[D, D]`` (divided by n - 1) of features, float64."""

    mean: np.ndarray
    covariance: np.ndarray
    count: int | None = None
    """Number of samples; None if unknown."""
    source: str = "computed"
    sha256: str | None = None
    """Hash of the mean and the covariance, by which they are the same in any file."""

    @classmethod
    def of(cls, sums: Sums) -> Gaussian:
        mean = sums.total / sums.count
        covariance = (sums.outer - sums.count * np.outer(mean, mean)) / (sums.count - 1)
        return cls(mean, (covariance + covariance.T) / 2, sums.count)

    def save(self, url: str, **more: np.ndarray) -> None:
        """Write an ``.npz`` file with pytorch-fid's names: ``mu``, ``sigma`` (and ``count``), and ``more`` arrays."""
        with storage.open_file(url, "wb") as stream:
            arrays = {"mu": self.mean, "sigma": self.covariance, "count": np.array(self.count or 0), **more}
            np.savez(stream, **arrays)  # type: ignore[arg-type]

    @classmethod
    def load(cls, url: str, *, width: int | None = None, source: str | None = None) -> Gaussian:
        """Load ``mu`` and ``sigma`` alone from an ``.npz`` file, which may have further arrays (ADM's are gigabytes).

        ``width``: expected number of features. ``source``: what to say they were computed from, in place of ``url``. Raises
        UserError for a file that is not statistics of such features.
        """
        found = read_arrays(url, ("mu", "sigma"), ("count",))
        mean, covariance = (_floats(url, name, found[name]) for name in ("mu", "sigma"))
        if mean.ndim != 1 or covariance.shape != (*mean.shape, *mean.shape):
            raise UserError(f"{url}: mu has shape {list(mean.shape)}, sigma {list(covariance.shape)}; {EXPECTED}")
        if width is not None and len(mean) != width:
            raise UserError(f"{url}: statistics of {len(mean)} features, the network has {width}")
        largest = float(np.abs(covariance).max(initial=0.0))
        if np.abs(covariance - covariance.T).max(initial=0.0) > TOLERANCE * largest:
            raise UserError(f"{url}: sigma is not symmetric, so no covariance")
        try:
            linalg.cholesky(covariance + TOLERANCE * max(largest, 1e-12) * np.eye(len(mean)), check_finite=False)
        except linalg.LinAlgError:
            raise UserError(f"{url}: sigma has negative eigenvalues, so no covariance") from None
        digest = hashlib.sha256(mean.tobytes() + covariance.tobytes()).hexdigest()
        return cls(mean, covariance, _count(url, found.get("count")), source or url, digest)

    def describe(self) -> dict[str, Any]:
        return {"source": self.source, "sha256": self.sha256, "count": self.count}


def read_arrays(url: str, names: tuple[str, ...], optional: tuple[str, ...] = ()) -> dict[str, np.ndarray]:
    """Read the arrays ``names`` of an ``.npz`` file, and no others; raises UserError for a file without them."""
    problem = f"{url}: no statistics with {' and '.join(names)}"
    try:
        with storage.open_file(url) as stream:
            archive = np.load(stream, allow_pickle=False)
            if not isinstance(archive, NpzFile):
                raise UserError(f"{problem} (a single array); {EXPECTED}")
            with archive:
                if not set(names) <= set(archive):
                    there = ", ".join(sorted(archive)[:8]) or "nothing"
                    raise UserError(f"{problem} (there is {there}); {EXPECTED}")
                return {name: archive[name] for name in (*names, *optional) if name in archive}
    except PermissionError:
        raise UserError(f"{url}: no permission to read it") from None
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error, RuntimeError) as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise UserError(f"{problem} (cut, damaged or no arrays of numbers: {reason}); {EXPECTED}") from None


def _floats(url: str, name: str, array: np.ndarray) -> np.ndarray:
    if array.dtype.kind not in "fiu":
        raise UserError(f"{url}: {name} is of type {array.dtype}; {EXPECTED} of numbers")
    values = np.ascontiguousarray(array, np.float64)
    if not values.size or not np.isfinite(values).all():
        raise UserError(f"{url}: {name} {'has NaN or infinite values' if values.size else 'is empty'}; {EXPECTED}")
    return values


def _count(url: str, array: np.ndarray | None) -> int | None:
    if array is None:
        return None
    if array.size != 1 or array.dtype.kind not in "fiu" or not np.isfinite(array).all() or array.item() < 0:
        raise UserError(f"{url}: count is no number of images")
    return int(array.item()) or None


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """Compute the Frechet distance.

    ``tr (C1 C2)^(1/2)`` is the sum of the singular values of ``R1^T R2`` for roots ``C = R R^T``, which are accurate even for
    singular covariances (fewer samples than dimensions): the distance of a set to itself is 0 up to rounding.
    """
    return distance_with_root(a, b, square_root(b.covariance))


def distance_with_root(a: Gaussian, b: Gaussian, root_b: np.ndarray) -> float:
    """Compute the Frechet distance with the :func:`square_root` of the covariance of ``b``, for many distances to it."""
    product = square_root(a.covariance).T @ root_b
    cross = linalg.svdvals(product, check_finite=False).sum() if product.size else 0.0
    shift = a.mean - b.mean
    return float(shift @ shift + np.trace(a.covariance) + np.trace(b.covariance) - 2 * cross)


def square_root(covariance: np.ndarray) -> np.ndarray:
    """Compute R ``[D, rank]`` with ``R R^T`` = ``covariance``, a positive semi-definite matrix."""
    values, vectors = linalg.eigh(covariance, check_finite=False)
    found = values > len(values) * np.finfo(np.float64).eps * values[-1]
    root: np.ndarray = vectors[:, found] * np.sqrt(values[found])
    return root
