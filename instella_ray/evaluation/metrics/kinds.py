"""The accumulators by the name under which their states are stored."""

from __future__ import annotations

from .base import Metric
from .bits import BitUsage
from .diversity import Diversity
from .frechet import Frechet
from .rates import RateMetric
from .samples import SampleMetric

KINDS: dict[str, type[Metric]] = {cls.kind: cls for cls in (SampleMetric, RateMetric, Frechet, BitUsage, Diversity)}
