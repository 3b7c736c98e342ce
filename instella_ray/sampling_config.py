"""How pictures are sampled, as a configuration: what previews, the endpoint and the demo write in their YAML."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from .config import Config

Sampler = Literal["posterior", "simplified"]
Guidance = Annotated[float, Field(allow_inf_nan=False)]
Temperature = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class SamplingConfig(Config):
    """The fields of :class:`.sampling.SamplingParams` but the seed, with the same defaults."""

    num_inference_steps: int = Field(20, ge=1)
    guidance_scale: Guidance = 7.5
    """The paper's alpha; 0 is without guidance."""
    temperature: Temperature = 1.0
    """0 is greedy."""
    rho: float = Field(1.0, gt=0, allow_inf_nan=False)
    """Exponent of the time grid."""
    sampler: Sampler = "simplified"
    """``posterior`` is the paper's Alg. 1, ``simplified`` its Alg. 2."""
    final_draw: bool = False
    """Draw the last step's bits (the paper) in place of a threshold at 0.5 (the release)."""
