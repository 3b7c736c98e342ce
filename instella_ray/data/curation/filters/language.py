"""Language filter of captions, by py3langid: naive Bayes over byte n-grams, 140 languages, no download."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any, ClassVar

from pydantic import Field

from ....errors import UserError
from .base import Sample, SampleFilter, Scale, ScoreLimits, Scores

MAX_CHARS = 2000
"""Characters of a caption that are classified: more do not improve the result, and captions may have any length."""


class Language(SampleFilter):
    """Keeps samples whose caption is in one of ``languages`` with a probability of at least ``minimum``."""

    scales: ClassVar[Mapping[str, Scale]] = {"language_probability": Scale(0, 1)}
    requires: ClassVar[tuple[str, ...]] = ("py3langid",)

    languages: tuple[str, ...] = Field(("en",), min_length=1)
    """ISO 639-1 codes."""
    minimum: float = Field(0.1, ge=0, le=1)
    """Minimum sum of the probabilities of ``languages``.

    Low, because the probability is spread over 140 languages: a short English caption gets 0.2 to 0.6 for English, a
    German one less than 0.01.
    """
    shortest: int = Field(20, ge=1)
    """Minimum number of letters, in bytes of UTF-8, of a caption with a score: one or two words cannot be classified."""

    def check(self) -> None:
        super().check()
        known = set(_identifier().labels)
        if unknown := [code for code in self.languages if code not in known]:
            raise UserError(f"{self.label}.languages {unknown[0]}: expected codes out of {' '.join(sorted(known))}")

    def limits(self) -> Mapping[str, tuple[str, ScoreLimits]]:
        return {"language_probability": ("language", ScoreLimits(minimum=self.minimum))}

    def measure(self, sample: Sample) -> Scores:
        text = sample.caption[:MAX_CHARS]
        if len("".join(filter(str.isalpha, text)).encode()) < self.shortest:
            return {}
        probabilities = dict(_identifier().rank(text))
        return {"language_probability": sum(probabilities[code] for code in set(self.languages))}


@lru_cache(1)
def _identifier() -> Any:
    """Load the model, once per process (2 s)."""
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
