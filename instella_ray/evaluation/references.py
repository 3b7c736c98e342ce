"""References of an evaluation's metrics: files of statistics, and images whose features are gathered once for all metrics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .. import storage
from ..data.formats.patterns import Pattern, pattern_text
from ..errors import UserError
from .feature_settings import FID, FeatureMetric, Reference
from .measure import States
from .metrics.base import Metric
from .metrics.feature_rows import FeatureRows, FeatureSet
from .metrics.features import WIDTHS
from .metrics.frechet import Frechet, Gaussian
from .metrics.images import ImageSettings
from .sections import Section

REFERENCE = "reference"
STATISTICS = ".npz"
ARRAYS = (".npy", ".pt", ".pth", ".pkl", ".pickle", ".mat", ".h5", ".hdf5", ".safetensors")
"""Endings of files that hold arrays, but not the statistics that are read here."""


@dataclass
class Gathering:
    """Reference images at one size, and the sections that gather their features in a single pass."""

    name: str
    """Name of its folder of states in the output folder."""
    pattern: Pattern
    images: ImageSettings
    size: int
    sections: dict[str, Reference] = field(default_factory=dict)

    @property
    def source(self) -> str:
        return pattern_text(self.pattern)

    def file(self, section: str) -> str:
        """Return the name of the file of a section's features or statistics."""
        return (
            f"{self.name}{STATISTICS}" if section == next(iter(self.sections)) else f"{self.name}-{section}{STATISTICS}"
        )

    def save(self, folder: str, units: Sequence[str]) -> None:
        """Merge the states of all units and write each section's file."""
        for section in self.sections:
            gathered = States(storage.join(folder, self.name)).merged("", units, section)
            if isinstance(gathered, FeatureRows):
                gathered.feature_set().save(storage.join(folder, self.file(section)))
            elif isinstance(gathered, Frechet):
                gathered.gaussian().save(storage.join(folder, self.file(section)))

    def stored(self, folder: str) -> bool:
        """Return whether all files are written."""
        return all(storage.exists(storage.join(folder, self.file(section))) for section in self.sections)


class References:
    """References of all metrics by their section's name and role.

    Raises UserError for a file of statistics that does not fit the metric's network, and for a reference that is none,
    before anything is measured.
    """

    def __init__(self, sections: Mapping[str, Section], folder: str) -> None:
        self.gatherings: list[Gathering] = []
        self._files: dict[str, dict[str, tuple[str, str, type[FeatureSet] | type[Gaussian]]]] = {}
        self._passes: dict[tuple[str, str], Gathering] = {}
        self._loaded: dict[tuple[str, type], FeatureSet | Gaussian] = {}
        for name, section in sections.items():
            for role, pattern in section.patterns().items():
                if isinstance(section, FeatureMetric):
                    self._add(folder, name, section, role, pattern)

    @property
    def statistics(self) -> dict[str, str]:
        """Return the sha256 of all given files of statistics, by path."""
        return {url: str(found.sha256) for (url, _), found in self._loaded.items() if isinstance(found, Gaussian)}

    def training(self) -> dict[str, Gathering]:
        """Return the pass over the training images of each metric that has some, by section."""
        return {name: gathering for (name, role), gathering in self._passes.items() if role == "training"}

    def attach(self, name: str, metric: Metric) -> None:
        """Attach its references to the merged metric of a section."""
        loaded = self.of(name)
        if isinstance(metric, Frechet) and isinstance(statistics := loaded.get("reference"), Gaussian):
            metric.attach(statistics)
        elif isinstance(metric, FeatureRows):
            metric.attach(**{role: found for role, found in loaded.items() if isinstance(found, FeatureSet)})

    def of(self, name: str) -> dict[str, FeatureSet | Gaussian]:
        """Load the references of a metric by role; each file is read once."""
        return {role: self._load(*file) for role, file in self._files.get(name, {}).items()}

    def describe(self) -> dict[str, dict[str, Any]]:
        """Return the descriptions of all references, by section and role."""
        return {name: {role: found.describe() for role, found in self.of(name).items()} for name in self._files}

    def _add(self, folder: str, name: str, section: FeatureMetric, role: str, pattern: Pattern) -> None:
        asker, source = f"metrics.{name}.{role}", pattern_text(pattern)
        files = self._files.setdefault(name, {})
        if source.lower().endswith(STATISTICS) and storage.kind(source) != "directory":
            if not isinstance(section, FID):
                raise UserError(f"{asker}: {source}: statistics; expected images (tars, parquet files or a folder)")
            files[role] = (source, source, Gaussian)
            self._loaded[source, Gaussian] = Gaussian.load(source, width=WIDTHS[section.network])
            return
        if source.lower().endswith(ARRAYS) and storage.kind(source) == "file":
            statistics = f", or an {STATISTICS} file with mu and sigma" if isinstance(section, FID) else ""
            raise UserError(f"{asker}: {source}: expected images (tars, parquet files or a folder){statistics}")
        if section.images.size is None:
            raise UserError(
                f"metrics.{name}.images.size: missing; a reference made of images needs it, for example 256"
            )
        gathering = self._gathering(pattern, section.images, section.images.size)
        self._passes[name, role] = gathering
        rows = not isinstance(section, FID)
        same = next((key for key, other in gathering.sections.items() if other.metric.key == section.key), name)
        rows = rows or (same in gathering.sections and gathering.sections[same].rows)
        gathering.sections[same] = Reference(images=section.images, metric=section, rows=rows)
        kind = Gaussian if isinstance(section, FID) else FeatureSet
        files[role] = (storage.join(folder, gathering.file(same)), source, kind)

    def _gathering(self, pattern: Pattern, images: ImageSettings, size: int) -> Gathering:
        """Return the pass over these images at this size, a new one if there is none yet; lossy formats do not count."""
        for found in self.gatherings:
            if (found.source, found.size, found.images.filter) == (pattern_text(pattern), size, images.filter):
                return found
        number = len(self.gatherings) + 1
        self.gatherings.append(Gathering(REFERENCE if number == 1 else f"{REFERENCE}-{number}", pattern, images, size))
        return self.gatherings[-1]

    def _load(self, url: str, source: str, kind: type[FeatureSet] | type[Gaussian]) -> FeatureSet | Gaussian:
        if (url, kind) not in self._loaded:
            self._loaded[url, kind] = kind.load(url, source=source)
        return self._loaded[url, kind]
