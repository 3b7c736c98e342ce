"""What ``config.json`` in a folder of recorded numbers says: the facts that the shapes of tensors cannot tell.

Each section is read on its own, when a recorded tensor needs it.
"""

from __future__ import annotations

from pydantic import ConfigDict, Field

from ..config import Config
from .bit import AxisWidth


class RecordedFacts(Config):
    """A part of ``config.json``. The rest of it, prose for the most part, is of no interest here."""

    model_config = ConfigDict(extra="ignore")


class TokenizerFacts(RecordedFacts):
    axes_dims_rope: tuple[AxisWidth, AxisWidth, AxisWidth]
    downsample_idx: tuple[int, ...]
    upsample_idx: tuple[int, ...]


class TokenizerSection(RecordedFacts):
    bit: TokenizerFacts
    bae_scale: float | None
    """Null: integer positions everywhere."""


class SizesSection(RecordedFacts):
    sizes: dict[str, tuple[int, int]]
    """Height and width (px) by name."""


class SamplingFacts(RecordedFacts):
    num_sampling_steps: int = Field(ge=1)
    guidance_scale: float
    temp: float
    rho: float


class SamplingSection(RecordedFacts):
    sampling: SamplingFacts


class ARSamplingFacts(RecordedFacts):
    guidance_scale: float
    temp: float


class ARSamplingSection(RecordedFacts):
    ar_sampling: ARSamplingFacts
