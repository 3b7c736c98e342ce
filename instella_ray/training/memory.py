"""Memory estimates of a training worker: weights, gradients and optimizer state by sharding, and activations.

Activations are the tensors that PyTorch's non-fused kernels save for the backward pass, which a test measures; fused
kernels save somewhat less. Allocator fragmentation and library buffers (a few GB on a GPU) are not included.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch

from ..flops import TextEncoderSizes
from ..models.bit import BITConfig
from ..models.checkpoint import build_model
from ..models.generator import GeneratorConfig
from .learner import BUCKET
from .settings import Sharding, TrainConfig

USABLE = 0.9
"""Share of a GPU's memory that a run may need; the rest is reserved for the allocator and libraries."""
FEATURE_CACHE = float(1 << 30)
"""Capacity (bytes) of :class:`..models.text_encoder.TextFeatureCache`."""
Checkpointing = bool | Literal["auto"]
"""Gradient checkpointing; auto: where a micro-batch does not fit the GPU without."""


class Bytes(NamedTuple):
    """Bytes per saved value."""

    product: int
    """Inputs of matrix products."""
    norm: int
    """Inputs and outputs of norms, which are always computed in float32."""
    cast: int
    """Additional product that reads the same float32 value, since autocast makes a copy for each."""

    @classmethod
    def of(cls, bf16: bool) -> Bytes:
        """Return the sizes under autocast to bfloat16, or in float32."""
        return cls(2, 4, 2) if bf16 else cls(4, 4, 0)


class Memory(NamedTuple):
    """Peak memory of a training step on one worker, in bytes."""

    weights: float
    gradients: float
    optimizer: float
    """AdamW's two moments, and with ZeRO-2 a copy of the weights of this worker's partition."""
    ema: float
    buffers: float
    """Communication buffers, and bfloat16 copies of the weights under autocast."""
    frozen: float
    """Frozen networks and the text feature cache."""
    inputs: float
    """Text features or images of the step."""
    activations: float

    @property
    def total(self) -> float:
        return sum(self)


def states(parameters: float, sharding: Sharding, world: int, *, bf16: bool) -> Memory:
    """Estimate weights, gradients, AdamW state and EMA of ``parameters`` weights on each of ``world`` workers, in bytes.

    All are float32; the other fields are 0. With ZeRO-2 each worker has an additional copy of its partition of the
    weights for the optimizer, and the complete EMA; with FSDP2 the EMA is sharded too.
    """
    n = parameters
    copies = 2 * n if bf16 else 0
    if sharding == "zero2":
        # Gradients are in two buckets until reduced, one being filled and one being sent; afterwards only a share is kept.
        buckets = 2 * 4 * min(BUCKET, n)
        return Memory(4 * n, 4 * n / world, 12 * n / world, 4 * n, copies + buckets, 0, 0, 0)
    if sharding == "fsdp2":
        share = 4 * n / world
        return Memory(share, share, 2 * share, share, copies / 8, 0, 0, 0)
    # DistributedDataParallel reduces gradients in additional buckets.
    return Memory(4 * n, 4 * n, 8 * n, 4 * n, copies + (4 * n if world > 1 else 0), 0, 0, 0)


def generator_memory(
    model: GeneratorConfig,
    text: TextEncoderSizes,
    text_tokens: int,
    train: TrainConfig,
    *,
    world: int,
    bf16: bool,
    tokenizer: BITConfig | None = None,
    gradient_checkpointing: bool = False,
) -> Memory:
    """Estimate the peak memory of one of ``world`` workers of a generator run, in bytes.

    With a ``tokenizer`` images are encoded online.
    """
    size, share = 2 if bf16 else 4, train.global_batch // world
    micro = train.micro_batch_size or share
    features = text.layers * text_tokens * model.text_width
    # Features of all micro-batches; for the current one also a copy without padding, and one in the weights' dtype.
    inputs = micro * features * (size * (share // micro) + (size + 4 if bf16 else 4))
    each = generator_activations(model, text_tokens, bf16=bf16, gradient_checkpointing=gradient_checkpointing)
    frozen = size * (text.parameters + (parameter_count(tokenizer) if tokenizer else 0)) + FEATURE_CACHE
    held = states(parameter_count(model), train.sharding, world, bf16=bf16)
    return held._replace(frozen=frozen, inputs=inputs, activations=micro * each)


def choose_checkpointing(asked: Checkpointing, without: Memory, device_memory: float | None) -> tuple[bool, str]:
    """Return whether to recompute, and the reason in words.

    ``without`` is the memory without recomputation; ``device_memory`` in bytes, None where it is not a GPU's.
    """
    if asked != "auto":
        return asked, "as set"
    if device_memory is None:
        return False, "auto: not on a GPU"
    usable = USABLE * device_memory
    needed = f"{without.total / 1e9:.0f} GB without, {usable / 1e9:.0f} GB usable"
    return without.total > usable, f"auto: {needed}"


def parameter_count(cfg: BITConfig | GeneratorConfig) -> int:
    """Return the number of weights of a model."""
    with torch.device("meta"):
        model = build_model(cfg.model_dump())
    return sum(p.numel() for p in model.parameters())


def generator_activations(
    cfg: GeneratorConfig, text_tokens: int, *, bf16: bool, gradient_checkpointing: bool = False
) -> float:
    """Estimate the activation memory of one sample in bytes; with checkpointing each block keeps only its inputs."""
    size, d, n, t = Bytes.of(bf16), cfg.width, cfg.num_tokens, text_tokens
    # Text: features, their projection, keys before and after the norm, and the text's part of the joint keys and values.
    text = t * (size.product * (cfg.text_width + 4 * d) + size.norm * d)
    # Image: inputs of q, k, v, of the output and of the feed-forward; q, the image's keys and values, attention output;
    # feed-forward before and after GELU; inputs and outputs of the norms of q and k.
    image = n * d * (size.product * (3 + 4 + 8) + size.cast * 2 + (size.norm + size.product) * 2)
    if cfg.kind == "diffusion":
        # Two layer norms keep input and output in float32, each gate its factors.
        image += n * d * (size.norm * 4 + size.product * 2) + size.product * 8 * d
    else:
        # The learned split token makes the residual stream and therefore both RMS norms float32; the mask becomes a bias.
        image += n * d * size.norm * 4 + size.product * n * (n + t)
    ends = n * (size.product * d + size.norm * 2 * d + size.norm * 4 * cfg.bits_per_token)
    if hidden := cfg.bit_head_width:
        # Of each bit: the head's state before and after GELU, and the bits before it.
        ends += n * cfg.bits_per_token * (size.product * 2 * hidden + size.norm * cfg.bits_per_token)
    if not gradient_checkpointing:
        return cfg.layers * (text + image) + ends
    # The residual stream is float32.
    kept = size.norm * n * d + size.product * t * (2 * d + cfg.text_width)
    return cfg.layers * kept + text + image + ends


def tokenizer_activations(
    cfg: BITConfig, input_size: int, output_size: int, *, bf16: bool, frozen_encoder: bool = False
) -> float:
    """Estimate the activation memory of one image in bytes, without the networks of the losses."""
    size = Bytes.of(bf16)
    # Two norms (learned tokens make the residual stream float32) and the inputs of their five products; q and k before and
    # after their norms and after RoPE; v; attention output in two layouts; SwiGLU's four.
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
