"""How much memory a training worker needs: states by how they are sharded, activations by what the backward pass keeps.

Activations are counted from the tensors that PyTorch's plain kernels save, which a test measures; fused kernels save
somewhat less. The allocator's fragments and the libraries' own buffers (a few GB on a GPU) are not part of it.
"""

from __future__ import annotations

from typing import NamedTuple

from ..models.bit import BITConfig
from ..models.generator import GeneratorConfig
from ..training.learner import BUCKET
from ..training.settings import Sharding


class Bytes(NamedTuple):
    """Bytes a value: of what matrix products keep, and of what norms keep, which are always computed in float32."""

    product: int
    norm: int
    cast: int
    """Of a further product that reads the same float32 value: autocast makes each a copy of its own."""

    @classmethod
    def of(cls, bf16: bool) -> Bytes:
        """Under autocast to bfloat16, or in plain float32."""
        return cls(2, 4, 2) if bf16 else cls(4, 4, 0)


class Memory(NamedTuple):
    """Bytes on one worker at the height of a step."""

    weights: float
    gradients: float
    optimizer: float
    """AdamW's two moments, and with ZeRO-2 another copy of the weights that they belong to."""
    ema: float
    buffers: float
    """What is gathered or reduced, and bfloat16 copies of the weights under autocast."""
    frozen: float
    """Networks that do not learn, and the cache of text features."""
    inputs: float
    """The step's text features or images."""
    activations: float

    @property
    def total(self) -> float:
        return sum(self)


def states(parameters: float, sharding: Sharding, world: int, *, bf16: bool) -> Memory:
    """Weights, gradients, AdamW and EMA of ``parameters`` weights on each of ``world`` workers; all else is 0.

    All are float32. With ZeRO-2 each worker holds its share of the weights once more, in the form that the optimizer
    changes, and the whole average; with FSDP2 a share of that too.
    """
    n = parameters
    copies = 2 * n if bf16 else 0
    if sharding == "zero2":
        # Gradients live in two buckets until they are reduced, one that fills and one on its way; after that a share.
        buckets = 2 * 4 * min(BUCKET, n)
        return Memory(4 * n, 4 * n / world, 12 * n / world, 4 * n, copies + buckets, 0, 0, 0)
    if sharding == "fsdp2":
        share = 4 * n / world
        return Memory(share, share, 2 * share, share, copies / 8, 0, 0, 0)
    # DistributedDataParallel reduces gradients in buckets beside them.
    return Memory(4 * n, 4 * n, 8 * n, 4 * n, copies + (4 * n if world > 1 else 0), 0, 0, 0)


def generator_activations(
    cfg: GeneratorConfig, text_tokens: int, *, bf16: bool, gradient_checkpointing: bool = False
) -> float:
    """Bytes that the backward pass of one sample keeps; with checkpointing each block keeps its input and its text."""
    size, d, n, t = Bytes.of(bf16), cfg.width, cfg.num_tokens, text_tokens
    # Text: its features, their projection, keys before and after their norm, and its part of the joined keys and values.
    text = t * (size.product * (cfg.text_width + 4 * d) + size.norm * d)
    # Image: inputs of q, k, v, of the output and of the feed-forward; q, the image's keys and values, attention's output;
    # feed-forward before and after GELU; both sides of the norms of q and k.
    image = n * d * (size.product * (3 + 4 + 8) + size.cast * 2 + (size.norm + size.product) * 2)
    if cfg.kind == "diffusion":
        # Two layer norms keep input and output in float32, each gate what it multiplies.
        image += n * d * (size.norm * 4 + size.product * 2) + size.product * 8 * d
    else:
        # The learned split token makes the residual stream, and so both RMS norms, float32; the mask becomes a bias.
        image += n * d * size.norm * 4 + size.product * n * (n + t)
    ends = n * (size.product * d + size.norm * 2 * d + size.norm * 4 * cfg.bits_per_token)
    if not gradient_checkpointing:
        return cfg.layers * (text + image) + ends
    kept = size.product * (n * d + t * (2 * d + cfg.text_width))
    return cfg.layers * kept + text + image + ends


def tokenizer_activations(
    cfg: BITConfig, input_size: int, output_size: int, *, bf16: bool, frozen_encoder: bool = False
) -> float:
    """Bytes that the backward pass of one image keeps, without the networks that losses bring."""
    size = Bytes.of(bf16)
    # Two norms (learned tokens make the residual stream float32) and the inputs of their five products; q and k before and
    # after their norms and turned by RoPE; v, attention's output twice, as heads and as columns; SwiGLU's four.
    block = size.norm * 4 + size.product * 2 + size.cast * 3
    block += (size.norm + 2 * size.product) * 2 + size.product * (3 + 16)
    total = 0.0
    patches = (input_size // cfg.patch_size) ** 2
    if not frozen_encoder:
        total += size.norm * 3 * input_size**2
        for i in range(cfg.encoder_layers):
            total += block * (cfg.num_tokens + patches) * cfg.encoder_width
            if i in cfg.downsample_after:
                total += size.product * patches * cfg.encoder_width
                patches //= 4
    patches = (output_size // cfg.patch_size) ** 2 // 4 ** len(cfg.upsample_after)
    for i in range(cfg.decoder_layers):
        total += block * (cfg.num_tokens + patches) * cfg.decoder_width
        if i in cfg.upsample_after:
            total += size.product * patches * cfg.decoder_width
            patches *= 4
    ends = (size.norm + 2 * size.product) * patches * cfg.decoder_width
    return total + ends + size.norm * 3 * 3 * output_size**2
