"""Base of the metrics' configuration sections."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

from ..config import Config
from ..data.formats.patterns import Pattern
from .metrics.base import Metric
from .metrics.images import ImageSettings

Maker = Callable[[], Metric]
"""Factory of empty metrics; all metrics of one factory share its loaded network."""
N = TypeVar("N")


@dataclass(frozen=True)
class Tools:
    """Arguments of metric creation beyond the metric's own settings."""

    device: str = "cpu"
    references: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Descriptions of references, by metric and role."""
    per_prompt: int = 0
    """Images per prompt, for metrics that compute a prompt's value once it is complete; 0: unknown."""
    networks: dict[Hashable, Any] = field(default_factory=dict)
    """Loaded networks, which metrics share."""

    def network(self, key: Hashable, load: Callable[[], N]) -> N:
        """Return the network under ``key``, loaded once."""
        if key not in self.networks:
            self.networks[key] = load()
        found: N = self.networks[key]
        return found


class Section(Config):
    """Settings of one metric."""

    needs: ClassVar[frozenset[str]] = frozenset({"images"})
    """Required columns of :class:`.metrics.base.Batch`; ``groups`` means several images per prompt."""
    roles: ClassVar[tuple[str, ...]] = ()
    """Settings that name references: images to which the metric compares."""

    @abstractmethod
    def load(self, tools: Tools) -> Maker:
        """Load the metric's network and return its factory; raises UserError if weights or packages are missing."""

    def patterns(self) -> dict[str, Pattern]:
        """Return the references by role."""
        return {role: getattr(self, role) for role in self.roles}


class Images(Section):
    """Settings of a metric over images."""

    images: ImageSettings = ImageSettings()
