"""Memory estimates of an endpoint's replicas: weights, slots, caches and activations of inference.

Weights and slots are exact; a test measures that activations are as much as the tensors that exist at a time. Workspace
of convolutions and fragmentation are not included.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..engine.draws import draws_ahead
from ..engine.modulations import CHUNK, LIMIT
from ..engine.slots import EngineOptions
from ..flops import TextEncoderSizes
from ..models.bit import BITConfig
from ..models.checkpoint import build_model
from ..models.generator import GeneratorConfig

CONTEXT = 1e9
"""Allowance for what the framework takes in each process (bytes): the device's context, kernels, libraries' workspace."""


class ReplicaMemory(NamedTuple):
    """Most memory of one replica, in bytes."""

    weights: float
    slots: float = 0.0
    """Joint keys and values, bits, draws and modulations of an engine's slots."""
    caches: float = 0.0
    """Limits of the caches of prompts and of schedules' modulations."""
    activations: float = 0.0
    """Activations of the largest pass or batch; recorded graphs share them."""
    loading: float = 0.0
    """Weights as loaded, in float32, beyond ``weights``; slots, caches and activations reuse their memory."""
    context: float = CONTEXT

    @property
    def total(self) -> float:
        """Most memory at a time."""
        return self.weights + max(self.loading, self.slots + self.caches + self.activations) + self.context


def text_encoder_replica(sizes: TextEncoderSizes, batch: int, tokens: int, size: int) -> ReplicaMemory:
    """Estimate a text encoder that encodes ``batch`` prompts of ``tokens`` at once, in values of ``size`` bytes."""
    # Hidden states of all layers, their stack and its padded copy; the outputs of one layer's matrices.
    features = 3 * sizes.layers * sizes.width
    outputs = sizes.matrix_weights / sizes.layers / sizes.width
    return ReplicaMemory(size * sizes.parameters, activations=size * batch * tokens * (features + outputs))


def generator_replica(cfg: GeneratorConfig, options: EngineOptions, size: int) -> ReplicaMemory:
    """Estimate a generator and its engine, in values of ``size`` bytes."""
    loaded = weight_bytes(cfg)
    weights = loaded // 4 * size
    if options.quantization != "none":
        # Attention and feed-forward have 12 width^2 weights of a byte each, and 9 width scales in float32.
        weights -= cfg.layers * (12 * cfg.width**2 * (size - 1) - 9 * cfg.width * 4)
    slots, bits = options.slots, cfg.bits_per_token
    positions = options.text_length + cfg.num_tokens
    joint = 2 * slots * (positions * 2 * cfg.layers * cfg.width * size + options.text_length)
    codes = slots * cfg.num_tokens * bits
    if cfg.kind == "diffusion":
        tokens, modulations = cfg.num_tokens, (6 * cfg.layers + 2) * cfg.width
        # Probabilities of the clean bits are float32. Chunks in use are kept beyond the cache's limit.
        tables = codes * (size + 4) + slots * modulations * size
        caches = options.prompt_cache_bytes + LIMIT + slots * CHUNK * modulations * size
    else:
        tokens, modulations = 1, 0
        tables, caches = codes * size, options.prompt_cache_bytes
    draws = slots * draws_ahead(tokens, bits) * tokens * bits * 4
    # Residual stream before and after attention, a norm's output, modulated twice, and the feed-forward around its GELU.
    row = tokens * (12 * cfg.width + bits) + modulations
    # Of the feed-forward: an int8 product in int32 and in float32, or its input twice in float32 before it is rounded.
    rounded = tokens * 4 * cfg.width * (4 + 4) if options.quantization != "none" else 0
    activations = 2 * slots * (row * size + rounded)
    return ReplicaMemory(weights, joint + tables + draws, caches, activations, loading=loaded - weights)


def decoder_replica(cfg: BITConfig, batch: int, edge: int, size: int) -> ReplicaMemory:
    """Estimate a tokenizer that decodes ``batch`` images of ``edge`` pixels, its products in values of ``size`` bytes.

    Weights stay in float32, since autocast converts those of a product when it is computed.
    """
    d, patches = cfg.decoder_width, (edge // cfg.patch_size) ** 2
    # In float32 the residual stream before and after attention, the grid it came from, and a norm's output; then two
    # copies of the latter by autocast, and SwiGLU's four of 4 d.
    block = (cfg.num_tokens + patches) * d * (4 * 4 + 2 * size * (size < 4) + 16 * size)
    # Copies of the pixels in float32 while they are scaled to bytes.
    image = max(block, _pixel_head(cfg, patches, size), 4 * 4 * 3 * edge**2)
    return ReplicaMemory(weight_bytes(cfg), activations=batch * image + 4 * d**2 * size * (size < 4))


def weight_bytes(cfg: BITConfig | GeneratorConfig, *parts: str) -> int:
    """Return the bytes in float32 of a model's weights and buffers, or of those whose names begin with ``parts``."""
    with torch.device("meta"):
        model = build_model(cfg.model_dump())
    return sum(tensor.nbytes for name, tensor in model.state_dict().items() if name.startswith(parts or ("",)))


def _pixel_head(cfg: BITConfig, patches: int, size: int) -> float:
    """Estimate the activations of the pixel head: input, output, and for the norm after a convolution both in float32."""
    given = patches * cfg.decoder_width * 4
    if cfg.pixel_head == "linear":
        return given + patches * size * 2 * 3 * cfg.patch_size**2
    most, channels, positions = 0.0, cfg.decoder_width, patches
    for _ in range(cfg.patch_size.bit_length() - 1):
        channels, positions = max(channels // 2, 16), 4 * positions
        most = max(most, positions * channels * (4 + 4 + size * (size < 4)))
    return given + most
