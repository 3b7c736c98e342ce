"""Verdicts on claims, from the results of their arms."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from ...evaluation.statistics import UNKNOWN, Interval, student_mean
from .arms import Trial
from .settings import METRICS, ClaimsBench, PaperClaim

HOLDS, FAILS, UNDECIDED, UNMEASURED = "holds", "fails", "undecided", "not measured"
CONFIDENCE = 0.95


class ClaimVerdict(NamedTuple):
    """Outcome of a claim."""

    claim: PaperClaim
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

    @property
    def arms(self) -> list[tuple[str, float]]:
        """Name and mean value of both arms, nan without values."""
        both = ((self.claim.proposed, self.proposed), (self.claim.baseline, self.baseline))
        return [(arm.name, mean(values)) for arm, values in both]


def mean(values: Sequence[float] | np.ndarray) -> float:
    """Return the mean of ``values``, nan if there are none."""
    return float(np.mean(values)) if len(values) else float("nan")


def judge(claim: PaperClaim, values: Sequence[tuple[float, float]]) -> ClaimVerdict:
    """Compare ``values`` of the proposed arm and the baseline, a pair a seed.

    The claim holds if the interval of the mean difference lies above ``-margin``, and fails if it lies below.
    """
    proposed, baseline = ([pair[arm] for pair in values] for arm in (0, 1))
    found = ClaimVerdict(claim, tuple(proposed), tuple(baseline), UNKNOWN, UNDECIDED if values else UNMEASURED)
    low, high = interval = student_mean(found.differences, confidence=CONFIDENCE)
    verdict = HOLDS if low > -claim.margin else FAILS if high < -claim.margin else found.verdict
    return found._replace(interval=interval, verdict=verdict)


def verdicts_of(cfg: ClaimsBench, trials: Sequence[Trial]) -> list[ClaimVerdict]:
    """Judge the claims of ``cfg`` from the seeds of which both arms have results."""
    found: dict[str, list[tuple[float, float]]] = {claim.name: [] for claim in cfg.claims}
    for trial in trials:
        results = [steps[-1].result() for steps in (trial.proposed, trial.baseline)]
        if None not in results:
            proposed, baseline = (_value(cfg, trial.claim, result) for result in results)
            found[trial.claim.name].append((proposed, baseline))
    return [judge(claim, found[claim.name]) for claim in cfg.claims]


def _value(cfg: ClaimsBench, claim: PaperClaim, result: Any) -> float:
    found = result[claim.metric]
    return float(found[str(claim.size or cfg.sizes[0])] if claim.metric == "psnr" else found)
