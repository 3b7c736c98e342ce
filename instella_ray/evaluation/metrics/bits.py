"""Bit usage metric: entropy of each code bit, entropy of whole codes, and dead bits.

With ``p`` the share of images that have a bit set and ``H(p) = -p log2 p - (1 - p) log2(1 - p)``: ``bit_usage`` is the
mean of H over all L x K bits (1: every bit is set in half of the images), ``codes_entropy`` its sum, an upper bound on the
bits of information in a code, reached when bits are independent (0 to L K). ``dead_bits`` is the share of bits that are
equal in all images.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from scipy.special import xlogy

from ...data.formats.codes import dead_bits
from ...errors import UserError
from .. import statistics
from .base import Batch, Info, Metric, MetricResult, text_array, version_of

GROUPS = 50
"""Number of jackknife groups (64 KiB each for 128 x 64 bits)."""


def entropy(shares: np.ndarray) -> np.ndarray:
    """Compute the entropy (bits) of Bernoulli variables with probabilities ``shares``."""
    return -(xlogy(shares, shares) + xlogy(1 - shares, 1 - shares)) / np.log(2)


class BitUsage(Metric):
    """Counts of set bits by group; intervals by the jackknife, since the bits of an image are not independent."""

    kind = "bits"

    def __init__(self, info: Info | None = None) -> None:
        about: dict[str, Any] = {"groups": GROUPS, "entropy": "plug-in, bits taken as independent"}
        super().__init__(info or Info("bit_usage", version_of("instella-ray"), settings=about))
        self.counts = np.zeros(int(self.info.settings["groups"]), np.int64)
        self.ones: np.ndarray | None = None
        """Number of images with each bit set, int64 ``[groups, L, K]``."""

    def update(self, batch: Batch) -> None:
        codes = np.asarray(batch.need("codes"))
        if codes.ndim != 3 or codes.dtype != np.uint8 or (codes > 1).any():
            raise UserError(f"metric bit_usage: expected uint8 0/1 [B, L, K], got {codes.dtype} {list(codes.shape)}")
        self._shape(codes.shape[1:])
        self.claim(batch.ids)
        groups = np.array([statistics.group_number(name, len(self.counts)) for name in batch.group_names], np.int64)
        assert self.ones is not None
        np.add.at(self.counts, groups, 1)
        for group in np.unique(groups):
            self.ones[group] += codes[groups == group].sum(0, dtype=np.int64)

    def result(self, confidence: float = 0.95, seed: int = 0) -> MetricResult:
        """Compute ``bit_usage``, with ``codes_entropy`` and ``dead_bits`` as parts.

        Dead bits have no interval, as resampling cannot estimate the rate of an event that was never observed; its
        settings have the rule of three instead (a bit constant over n images differs in fewer than 3/n of all, at 95 %).
        """
        count = int(self.counts.sum())
        about: dict[str, Any] = {"interval": statistics.JACKKNIFE, "confidence": confidence}
        if not count or self.ones is None:
            return self.make_result(*(float("nan"),) * 3, 0, **about)
        ones = self.ones.sum(0)
        usage = float(entropy(ones / count).mean())
        there = [g for g in np.flatnonzero(self.counts) if self.counts[g] < count]
        left_out = np.array([entropy((ones - self.ones[g]) / (count - self.counts[g])).mean() for g in there])
        found = statistics.jackknife(usage, left_out, self.counts[there], confidence=confidence)
        low, high = max(found.low, 0.0), min(found.high, 1.0)
        bits = ones.size
        dead = float(dead_bits(ones / count).mean())
        whole = self.make_result(usage * bits, low * bits, high * bits, count, **about, bits=bits)
        lost = self.make_result(dead, *statistics.UNKNOWN, count, interval=None, rule_of_three=min(1.0, 3 / count))
        parts = (
            MetricResult(**{**vars(whole), "name": "codes_entropy"}),
            MetricResult(**{**vars(lost), "name": "dead_bits"}),
        )
        return self.make_result(usage, low, high, count, parts=parts, **about, bits=bits)

    def arrays(self) -> dict[str, np.ndarray]:
        ones = np.zeros((len(self.counts), 0, 0), np.int64) if self.ones is None else self.ones
        return {"ids": text_array(sorted(self.ids)), "counts": self.counts, "ones": ones}

    def restore(self, arrays: Mapping[str, np.ndarray]) -> None:
        if arrays["ones"].size:
            self._shape(arrays["ones"].shape[1:])
        self.claim(arrays["ids"].tolist())
        self.counts = self.counts + arrays["counts"]
        if self.ones is not None and arrays["ones"].size:
            self.ones = self.ones + arrays["ones"]

    def _shape(self, shape: tuple[int, ...]) -> None:
        if self.ones is None:
            self.ones = np.zeros((len(self.counts), *shape), np.int64)
        elif self.ones.shape[1:] != shape:
            raise UserError(f"metric bit_usage: codes of {list(shape)} bits, expected {list(self.ones.shape[1:])}")
