"""Settings of the benchmark of one GPU: its parts, their sizes, and how long it may take."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args

from pydantic import Field, model_validator

from ...config import Config, OutputPath
from ...models.bit import BITConfig
from ...models.discriminator import DiscriminatorConfig
from ...models.generator import GeneratorConfig
from ...training.losses import PerceptualConfig
from ..training_settings import RandomText

Part = Literal[
    "diffusion",
    "ar",
    "bits",
    "restart",
    "mixed",
    "stages",
    "training",
    "tokenizer",
    "compiled_sampling",
    "compiled_training",
    "precisions",
    "sharding",
    "loop",
]
PARTS: tuple[Part, ...] = get_args(Part)
"""All parts, the most valuable first, because the time may not suffice for all."""

TINY: dict[str, Any] = {
    "output": "runs/bench-gpu-tiny.json",
    "threads": 1,
    "repeats": 1,
    "width": 16,
    "heads": 2,
    "text": {"layers": 2, "width": 16, "heads": 2, "feed_forward": 32, "words": 100},
    "text_length": 6,
    "text_batch": 2,
    "bit": {
        "image_size": 32,
        "patch_size": 8,
        "num_tokens": 4,
        "bits_per_token": 6,
        **{"encoder_width": 32, "encoder_layers": 2, "encoder_heads": 1},
        **{"decoder_width": 32, "decoder_layers": 2, "decoder_heads": 1},
        "rope_axes": (8, 12, 12),
        "downsample_after": (),
        "upsample_after": (),
    },
    "buckets": (1, 2),
    "compiled_buckets": (1,),
    "steps": 2,
    "image_sizes": (32, 48),
    "decode_batch": 2,
    "mixed_images": 8,
    "mixed_steps": (1, 3),
    "micro_batches": (1, 2),
    "checkpointed_micro_batches": (2,),
    "micro_batch": 2,
    "training_steps": 1,
    "tokenizer_micro_batches": (2, 1),
    "perceptual": {"weights": "random", "size": 32, "crop": 32},
    "discriminator": {"weights": "random", "backbone": "vit_tiny_patch16_224", "size": 32},
    "loop_steps": 1,
}
"""Values with which the whole benchmark takes a minute on a CPU."""


class GpuBenchConfig(Config):
    """Benchmark of one GPU, with random weights. The default sizes are the paper's."""

    parts: tuple[Part, ...] = PARTS
    """Parts to measure, in this order."""
    output: OutputPath = "runs/bench-gpu.json"
    """Results. Parts that it has whole are not measured again."""
    part_limit_s: float = Field(120, gt=0)
    """Seconds after which a part is ended; its rows up to then are kept."""
    limit_s: float = Field(480, gt=0)
    """Seconds for all parts together."""
    tiny: bool = False
    """Small sizes for keys that are not set: a rehearsal, also without a GPU."""
    device: str = "auto"
    """``auto`` (the GPU if there is one), cuda, cuda:N or cpu."""
    threads: int = Field(8, ge=1)
    """CPU threads of PyTorch, and threads that write image files."""
    repeats: int = Field(3, ge=1)
    """Measured runs of each row, after one run to warm up."""
    width: int = Field(2048, ge=1)
    """Width of the generators."""
    heads: int = Field(16, ge=1)
    text: RandomText = RandomText(layers=16, width=2048, heads=16, feed_forward=8192)
    text_length: int = Field(128, ge=2)
    """Tokens of a prompt."""
    text_batch: int = Field(32, ge=1)
    """Prompts that are encoded together."""
    bit: BITConfig = BITConfig()
    buckets: tuple[int, ...] = Field((1, 2, 4, 8, 16, 32, 64), min_length=1)
    """Images that are generated together, ascending: powers of two, or three times one. The last is the number of slots."""
    compiled_buckets: tuple[int, ...] = Field((1, 64), min_length=1)
    """The same for ``torch.compile``, each in an engine of its own."""
    steps: int = Field(20, ge=1)
    """Steps of a diffusion image, with guidance."""
    image_sizes: tuple[int, ...] = Field((512, 768, 1024), min_length=1)
    """Sides of decoded images in pixels."""
    decode_batch: int = Field(8, ge=1)
    """Images that are decoded together."""
    mixed_images: int = Field(600, ge=8)
    """Images of mixed sizes and steps."""
    mixed_steps: tuple[int, int] = (10, 30)
    """Fewest and most steps of these."""
    micro_batches: tuple[int, ...] = (8, 32, 64, 128, 256)
    """Micro-batches of a generator without gradient checkpointing."""
    checkpointed_micro_batches: tuple[int, ...] = (128, 256, 512)
    """The same with checkpointing."""
    micro_batch: int = Field(64, ge=1)
    """Micro-batch in the comparisons of compilation and of sharding."""
    training_steps: int = Field(4, ge=1)
    """Measured steps of each row of training, after two to warm up."""
    tokenizer_micro_batches: tuple[int, int] = (32, 4)
    """Micro-batches of the tokenizer's first and third stage."""
    perceptual: PerceptualConfig = PerceptualConfig(weights="random")
    """Perceptual loss of the tokenizer."""
    discriminator: DiscriminatorConfig = DiscriminatorConfig(weights="random")
    """Discriminator of the tokenizer's third stage."""
    loop_steps: int = Field(2, ge=1)
    """Steps of a round in the comparison with a bare training loop, which has the batch ``micro_batch``."""

    @model_validator(mode="before")
    @classmethod
    def _tiny_sizes(cls, given: Any) -> Any:
        if not isinstance(given, Mapping) or not given.get("tiny"):
            return given
        return {**TINY, **given}

    @property
    def slots(self) -> int:
        """Slots of the engines."""
        return max(self.buckets)

    def generator(self, kind: Literal["diffusion", "ar"]) -> GeneratorConfig:
        """Return the sizes of a generator, which follow from those of text encoder and tokenizer."""
        return GeneratorConfig(
            kind=kind,
            num_tokens=self.bit.num_tokens,
            bits_per_token=self.bit.bits_per_token,
            width=self.width,
            layers=self.text.layers,
            heads=self.heads,
            text_width=self.text.width,
            zero_init=False,
        )
