"""Configuration of the curation filters, one section per filter; ``null`` disables a filter."""

from __future__ import annotations

from ....config import Config
from .aesthetic import Aesthetic
from .base import Filter, ImageFilter, SampleFilter, Scale, ScoreLimits, Scores
from .duplicates import DuplicateConfig
from .language import Language
from .nsfw import Nsfw
from .samples import AspectRatio, CaptionLength, Resolution, Similarity, Unsafe, Watermark
from .text import Text


class FilterConfig(Config):
    """Filters in the order in which they are applied; the first that drops a sample gives the ledger reason."""

    resolution: Resolution | None = Resolution()
    aspect_ratio: AspectRatio | None = AspectRatio()
    watermark: Watermark | None = Watermark()
    unsafe: Unsafe | None = Unsafe()
    similarity: Similarity | None = None
    caption_length: CaptionLength | None = CaptionLength()
    language: Language | None = None
    nsfw: Nsfw | None = None
    aesthetic: Aesthetic | None = None
    text: Text | None = None
    duplicates: DuplicateConfig | None = None

    def sections(self) -> dict[str, Filter]:
        """Return the enabled filters of single samples, by name."""
        found = {name: getattr(self, name) for name in type(self).model_fields}
        return {name: section for name, section in found.items() if isinstance(section, Filter)}

    def scales(self) -> dict[str, Scale]:
        """Return the axes of all scores of the enabled filters."""
        return {name: scale for section in self.sections().values() for name, scale in section.scales.items()}

    def limits(self) -> dict[str, ScoreLimits]:
        """Return the limits of the scores of the enabled filters that have some."""
        return {name: limits for section in self.sections().values() for name, (_, limits) in section.limits().items()}

    def outside(self, scores: Scores) -> set[str]:
        """Return the names of the scores for which a filter drops a sample."""
        return {name for section in self.sections().values() for name in section.outside(scores)}

    def of_samples(self) -> list[SampleFilter]:
        """Return the enabled filters that need no pixels."""
        return [section for section in self.sections().values() if isinstance(section, SampleFilter)]

    def of_images(self) -> dict[str, ImageFilter]:
        """Return the enabled filters with a model, by name."""
        return {name: section for name, section in self.sections().items() if isinstance(section, ImageFilter)}
