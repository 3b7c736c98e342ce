"""Verdicts on claims, from the results of their arms."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ...evaluation.statistics import UNKNOWN, Interval, student_mean
from .arms import arm_steps
from .settings import METRICS, Claim, ClaimArm, ClaimsBench

HOLDS, FAILS, UNDECIDED = "holds", "fails", "undecided"
CONFIDENCE = 0.95


class ClaimVerdict(NamedTuple):
    """Outcome of a claim."""

    claim: Claim
    proposed: tuple[float, ...]
    """Value of the metric for each seed."""
    baseline: tuple[float, ...]
    interval: Interval
    """Of the mean of :attr:`differences`."""
    verdict: str

    @property
    def differences(self) -> np.ndarray:
        """Differences of the arms, float64 ``[seeds]``, positive where the proposed one is better."""
        sign = 1 if METRICS[self.claim.metric].higher_is_better else -1
        return sign * (np.array(self.proposed) - np.array(self.baseline))


def judge(claim: Claim, proposed: Sequence[float], baseline: Sequence[float]) -> ClaimVerdict:
    """Compare the arms' values, paired by seed.

    The claim holds if the interval of the mean difference lies above ``-margin``, and fails if it lies below.
    """
    found = ClaimVerdict(claim, tuple(proposed), tuple(baseline), UNKNOWN, UNDECIDED)
    low, high = interval = student_mean(found.differences, confidence=CONFIDENCE)
    verdict = HOLDS if low > -claim.margin else FAILS if high < -claim.margin else UNDECIDED
    return found._replace(interval=interval, verdict=verdict)


def verdict_of(cfg: ClaimsBench, claim: Claim, folder: str) -> ClaimVerdict:
    """Judge ``claim`` from the results in ``folder``."""
    arms = (claim.proposed, claim.baseline)
    return judge(claim, *([_value(cfg, claim, arm, folder, seed) for seed in cfg.seeds] for arm in arms))


def _value(cfg: ClaimsBench, claim: Claim, arm: ClaimArm, folder: str, seed: int) -> float:
    result = arm_steps(cfg, folder, claim, arm, seed)[-1].result()
    assert result is not None, "all steps have been run"
    found = result[claim.metric]
    return float(found[str(claim.size or cfg.sizes[0])] if claim.metric == "psnr" else found)
