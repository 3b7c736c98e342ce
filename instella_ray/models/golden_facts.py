"""Schema of ``config.json`` in a folder of recorded tensors: settings that cannot be derived from tensor shapes.

Each section is validated separately, when a recorded tensor needs it.
"""

from __future__ import annotations

from pydantic import ConfigDict, Field

from ..config import Config
from .bit import AxisWidth


class RecordedFacts(Config):
    """Base of a section of ``config.json``; unknown keys, mostly prose, are ignored."""

    model_config = ConfigDict(extra="ignore")


class TokenizerFacts(RecordedFacts):
    axes_dims_rope: tuple[AxisWidth, AxisWidth, AxisWidth]
    downsample_idx: tuple[int, ...]
    upsample_idx: tuple[int, ...]


class TokenizerSection(RecordedFacts):
    bit: TokenizerFacts
    bae_scale: float | None
    """Extent of positions in pixels; null means integer positions."""


class SizesSection(RecordedFacts):
    sizes: dict[str, tuple[int, int]]
    """Height and width in pixels by name."""


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
