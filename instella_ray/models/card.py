"""Card of a generator: the section ``card`` of its ``config.yaml``, which tells its users what to ask it and how."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..config import Config, validate
from .sampling import SamplingConfig


class GeneratorCard(Config):
    """What the model knows, example prompts, and the sampling settings that stand for those a user leaves out."""

    about: str = ""
    """A sentence about what it draws."""
    prompts: tuple[str, ...] = ()
    sampling: SamplingConfig = SamplingConfig()

    @classmethod
    def of(cls, config: Mapping[str, Any], source: str) -> GeneratorCard:
        """Read the card of a model folder's ``config``, empty if it has none; UserError names ``source``."""
        return validate(cls, config.get("card") or {}, source)

    def defaults(self, own: SamplingConfig) -> SamplingConfig:
        """Return ``own`` sampling settings, with those of the card for the ones that were not set."""
        return self.sampling.model_copy(update=own.model_dump(include=own.model_fields_set))
