"""The filters of a curation, a section each; ``null`` switches one off."""

from __future__ import annotations

from ....config import Config
from .aesthetic import Aesthetic
from .base import Filter, ImageFilter, SampleFilter, Scale
from .duplicates import DuplicateConfig
from .language import Language
from .nsfw import Nsfw
from .samples import AspectRatio, CaptionLength, Resolution, Similarity, Unsafe, Watermark
from .text import Text


class FilterConfig(Config):
    """Asked in this order; the first that refuses a sample gives the ledger its reason."""

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
        """The filters that are on, by name."""
        found = {name: getattr(self, name) for name in type(self).model_fields}
        return {name: section for name, section in found.items() if isinstance(section, Filter)}

    def scales(self) -> dict[str, Scale]:
        """The axes of all scores that these filters give."""
        return {name: scale for section in self.sections().values() for name, scale in section.scales.items()}

    def of_samples(self) -> list[SampleFilter]:
        """Those that need no pixels."""
        return [section for section in self.sections().values() if isinstance(section, SampleFilter)]

    def of_images(self) -> dict[str, ImageFilter]:
        """Those with a model."""
        return {name: section for name, section in self.sections().items() if isinstance(section, ImageFilter)}
