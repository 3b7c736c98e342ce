"""Storage of metric states: saving, and loading as the metric's class."""

from __future__ import annotations

import numpy as np

from ... import storage
from ...errors import UserError
from .base import Metric
from .bits import BitUsage
from .diversity import Diversity
from .feature_rows import FeatureRows
from .frechet import Frechet
from .kernel import KernelDistance
from .memorisation import Memorisation
from .neighbours import Coverage, Precision
from .rates import RateMetric
from .samples import SampleMetric

ACCUMULATORS: tuple[type[Metric], ...] = (
    *(SampleMetric, RateMetric, Frechet, BitUsage, Diversity),
    *(FeatureRows, KernelDistance, Precision, Coverage, Memorisation),
)
KINDS: dict[str, type[Metric]] = {cls.kind: cls for cls in ACCUMULATORS}
"""Accumulator classes by the ``kind`` in their stored states."""


def save_state(url: str, metric: Metric) -> None:
    """Save a metric's state atomically."""
    with storage.open_file(url, "wb") as stream:
        np.savez(stream, **metric.state())  # type: ignore[arg-type]


def load_state(url: str) -> Metric:
    """Load a stored metric, which can merge and give results; raises UserError for a file that is not a metric state."""
    with storage.open_file(url) as stream:
        try:
            with np.load(stream, allow_pickle=False) as archive:
                state = {name: archive[name] for name in archive.files}
        except (ValueError, OSError, EOFError) as error:
            raise UserError(f"{url}: not the state of a metric ({error})") from None
    kind = str(state.get("kind"))
    if kind not in KINDS:
        raise UserError(f"{url}: not the state of a metric (kind {kind}, expected one of {', '.join(KINDS)})")
    return KINDS[kind].from_state(state)
