"""Mergeable sums of features and their outer products by group, from which covariances are computed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np


class Sums(NamedTuple):
    """Number of samples, sum of features ``[D]`` and sum of outer products ``[D, D]``, float64."""

    count: int  # type: ignore[assignment]  # a tuple's own method has this name
    total: np.ndarray
    outer: np.ndarray

    @classmethod
    def of(cls, features: np.ndarray) -> Sums:
        rows = features.astype(np.float64)
        return cls(len(rows), rows.sum(0), rows.T @ rows)

    def plus(self, other: Sums) -> Sums:
        return Sums(self.count + other.count, self.total + other.total, self.outer + other.outer)

    def minus(self, other: Sums) -> Sums:
        return Sums(self.count - other.count, self.total - other.total, self.outer - other.outer)


class GroupMoments:
    """:class:`Sums` of every group.

    A group with few samples keeps its features, float32 ``[n, D]``, which need less memory than a ``[D, D]`` matrix. With
    more than D of them they are folded into its sums, so memory is bounded for any number of samples.
    """

    def __init__(self, number: int) -> None:
        self.number = number
        self._rows: dict[int, list[np.ndarray]] = {}
        self._folded: dict[int, Sums] = {}
        self._cache: dict[int, Sums] = {}

    def add(self, features: np.ndarray, groups: np.ndarray) -> None:
        """Add ``features [n, D]`` of samples in ``groups [n]``."""
        features = np.asarray(features, np.float32)
        self._cache.clear()
        for group in np.unique(groups).tolist():
            rows = self._rows.setdefault(group, [])
            rows.append(features[groups == group])
            if sum(map(len, rows)) > features.shape[1]:
                self._fold(group, Sums.of(np.concatenate(self._rows.pop(group))))

    def groups(self) -> list[int]:
        """Return the groups that have samples."""
        return sorted({*self._rows, *self._folded})

    def all(self, without: int | None = None) -> Sums | None:
        """Return the sums over all groups except ``without``; None if there are no samples."""
        if -1 not in self._cache:
            whole: Sums | None = None
            for group in self.groups():
                own = self._own(group)
                whole = own if whole is None else whole.plus(own)
            if whole is None:
                return None
            self._cache[-1] = whole
        whole = self._cache[-1]
        if without is None or without not in self.groups():
            return whole
        rest = whole.minus(self._own(without))
        return rest if rest.count else None

    def arrays(self) -> dict[str, np.ndarray]:
        """Return the state as numeric arrays; symmetric matrices are stored as upper triangles."""
        folded = sorted(self._folded.items())
        rows = [(group, part) for group, parts in sorted(self._rows.items()) for part in parts]
        width = next((len(s.total) for _, s in folded), next((part.shape[1] for _, part in rows), 0))
        upper = np.triu_indices(width)
        triangles = [sums.outer[upper] for _, sums in folded]
        return {
            "folded_groups": np.array([group for group, _ in folded], np.int64),
            "folded_counts": np.array([sums.count for _, sums in folded], np.int64),
            "folded_totals": np.array([sums.total for _, sums in folded]).reshape(len(folded), width),
            "folded_outers": np.array(triangles).reshape(len(folded), len(upper[0])),
            "row_groups": np.concatenate([np.full(len(p), g, np.int64) for g, p in rows] or [np.empty(0, np.int64)]),
            "rows": np.concatenate([part for _, part in rows] or [np.empty((0, width), np.float32)]),
        }

    def restore(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Add a state returned by :meth:`arrays`."""
        totals, triangles = arrays["folded_totals"], arrays["folded_outers"]
        upper = np.triu_indices(totals.shape[1])
        counts = zip(arrays["folded_groups"].tolist(), arrays["folded_counts"].tolist(), strict=True)
        for place, (group, count) in enumerate(counts):
            outer = np.zeros((totals.shape[1],) * 2)
            outer[upper] = triangles[place]
            self._fold(group, Sums(count, totals[place], outer + np.triu(outer, 1).T))
        if len(arrays["rows"]):
            self.add(arrays["rows"], arrays["row_groups"])
        self._cache.clear()

    def _fold(self, group: int, sums: Sums) -> None:
        self._folded[group] = self._folded[group].plus(sums) if group in self._folded else sums

    def _own(self, group: int) -> Sums:
        rows = self._rows.get(group)
        folded = self._folded.get(group)
        if rows is None:
            assert folded is not None
            return folded
        own = Sums.of(np.concatenate(rows))
        return own if folded is None else folded.plus(own)
