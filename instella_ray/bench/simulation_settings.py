"""Settings of the simulation suite, which are read without simpy."""

from __future__ import annotations

from pydantic import Field

from ..config import Config
from ..models.bit import BITConfig
from .serving import DEMO_BIT, ServingBench


class SimulationBench(Config):
    """Systems to predict and measure."""

    graph: ServingBench = ServingBench()
    """Models and slots; its loads are not used."""
    in_flight: tuple[int, ...] = (2, 8, 16)
    open_share: float = Field(0.7, gt=0, lt=1)
    """Request rate of the open loop, as a share of the measured throughput of the largest closed loop."""
    seconds: float = Field(10.0, gt=0)
    rounds: int = Field(2, ge=1)
    repeats: int = Field(15, ge=1)
    """Calls of a stage in isolation, of which the median is used."""
    tokenizers: dict[str, BITConfig] = Field(
        default_factory=lambda: {"small": DEMO_BIT.model_copy(update={"image_size": 256})}
    )
    shards: tuple[int, int] = (6, 30)
    """Shards of a small and a large encoding job, whose time difference excludes the startup."""
    images_per_shard: int = Field(64, ge=1)
    trained: dict[str, BITConfig] = Field(
        default_factory=lambda: {
            "small": DEMO_BIT,
            "larger": DEMO_BIT.model_copy(update={"encoder_layers": 12, "decoder_layers": 12}),
        }
    )
    """Tokenizers to train from images: one whose training is limited by decoding, and one that is not."""
    training_steps: int = Field(160, ge=8)
    global_batch: int = Field(8, ge=1)
