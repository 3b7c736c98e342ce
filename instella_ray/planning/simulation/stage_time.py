"""Service time of a stage by batch size: measured, or from the FLOP model, with its source."""

from __future__ import annotations

from functools import cache
from typing import Literal

import numpy as np
from pydantic import Field, model_validator

from ...config import Config
from ...flops import (
    ACCELERATORS,
    AMD_OLMO_1B,
    bit_decode,
    bit_encode,
    generator_forward,
    generator_text,
    text_encoder_forward,
)
from ...models.bit import BITConfig
from ...models.generator import GeneratorConfig

TEXT_TOKENS = 128
Work = Literal["text_encoder", "text_projection", "diffusion_step", "encoder", "decoder"]


class StageTime(Config):
    """Seconds of one call by its number of items."""

    seconds: dict[int, float] | None = None
    """Measured seconds by batch size; interpolated linearly, and extrapolated beyond the largest."""
    work: Work | None = None
    """Work per item, instead of ``seconds``: FLOP of the paper's network, at ``mfu`` of the ``device``'s peak."""
    size: int = Field(512, ge=1)
    """Image size (pixels a side) of an encoder or decoder."""
    device: str = "mi300x"
    mfu: float = Field(0.118, gt=0, le=1)
    """Model FLOP utilization; the default is the paper's in training, from its 120 images/s on an MI300X."""
    fixed_s: float = Field(0.0, ge=0)
    """Constant seconds per call, in addition to ``work``."""
    source: str
    """Source of the figures."""

    @model_validator(mode="after")
    def _seconds_or_work(self) -> StageTime:
        if (self.seconds is None) == (self.work is None):
            raise ValueError("expected either seconds or work")
        if self.seconds is not None and (not self.seconds or min(self.seconds) < 1 or min(self.seconds.values()) < 0):
            raise ValueError("expected seconds of at least 0 by batch sizes of at least 1")
        if self.device not in ACCELERATORS:
            raise ValueError(f"device {self.device}: expected one of {', '.join(ACCELERATORS)}")
        return self

    def of(self, count: int) -> float:
        """Return the seconds of a call with ``count`` items."""
        if self.work is not None:
            return self.fixed_s + count * _flop(self.work, self.size) / (self.mfu * ACCELERATORS[self.device].peak)
        assert self.seconds is not None
        return _interpolated(tuple(sorted(self.seconds.items())), count)


@cache
def _flop(work: Work, size: int) -> float:
    """Compute the FLOP of an item; a diffusion step counts twice, with and without prompt."""
    bit, generator = BITConfig(), GeneratorConfig()
    if work == "text_encoder":
        return text_encoder_forward(AMD_OLMO_1B, TEXT_TOKENS)
    if work == "text_projection":
        return generator_text(generator, TEXT_TOKENS).forward
    if work == "diffusion_step":
        return 2 * (generator_forward(generator, TEXT_TOKENS).forward - generator_text(generator, TEXT_TOKENS).forward)
    return (bit_encode if work == "encoder" else bit_decode)(bit, size, size).forward


@cache
def _interpolated(known: tuple[tuple[int, float], ...], count: int) -> float:
    sizes, seconds = zip(*known, strict=True)
    if len(sizes) == 1:
        return float(seconds[0] * max(1.0, count / sizes[0]))
    if count <= sizes[-1]:
        return float(np.interp(count, sizes, seconds))
    slope = (seconds[-1] - seconds[-2]) / (sizes[-1] - sizes[-2])
    return float(seconds[-1] + max(0.0, slope) * (count - sizes[-1]))
