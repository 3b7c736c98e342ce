"""FLOP counts of the networks and peak FLOP/s of accelerators, for MFU and ``instella-ray plan``.

A multiply-add counts as 2 FLOP. Like in ``torch.utils.flop_counter``, matrix products, convolutions and attention are
counted, elementwise operations are not. Masked attention counts in full, because it is computed.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

from torch import nn

from .models.bit import BITConfig
from .models.bit_layers import WORD_WIDTH
from .models.generator import GeneratorConfig


class Work(NamedTuple):
    """FLOP of one forward pass, with those that its backward pass saves."""

    forward: float
    saved: float = 0.0
    """FLOP of gradients that are not computed: of the inputs of layers that read data, and of the search for words."""

    @property
    def backward(self) -> float:
        """FLOP of the backward pass: weight and input gradients, each as much as the forward pass."""
        return 2 * self.forward - self.saved

    def __add__(self, other: tuple[Any, ...]) -> Work:
        """Return the FLOP of both."""
        return Work(*(a + b for a, b in zip(self, other, strict=True)))


class TrainingFlops(NamedTuple):
    """FLOP of training on one sample."""

    forward: float
    """Forward pass of the trained networks."""
    backward: float
    frozen: float = 0.0
    """Forward passes of the frozen networks: text encoder, tokenizer."""
    recomputed: float = 0.0
    """Forward FLOP recomputed by gradient checkpointing."""

    @property
    def model(self) -> float:
        """Model FLOP, without recomputation; the basis of MFU."""
        return self.forward + self.backward + self.frozen

    @property
    def hardware(self) -> float:
        """Hardware FLOP, with recomputation; the basis of HFU."""
        return self.model + self.recomputed


class TextEncoderSizes(NamedTuple):
    """Sizes that determine the FLOP of a language model's forward pass."""

    layers: int
    width: int
    attention_width: int
    """Number of heads times head width."""
    matrix_weights: int
    """Elements of all weight matrices, without embeddings and LM head."""
    parameters: int
    """All parameters, embeddings included."""

    @classmethod
    def of(cls, model: nn.Module, layers: int | None = None) -> TextEncoderSizes:
        """Return the sizes of a Transformers ``model`` without LM head, on any device including meta.

        ``layers`` restricts them to the first layers.
        """
        cfg: Any = model.config
        matrices = sum(
            p.numel()
            for module in model.modules()
            if not isinstance(module, nn.Embedding)
            for p in module.parameters(recurse=False)
            if p.ndim == 2
        )
        total = sum(p.numel() for p in model.parameters())
        count = layers or cfg.num_hidden_layers
        head = getattr(cfg, "head_dim", None) or cfg.hidden_size // cfg.num_attention_heads
        kept = matrices * count // cfg.num_hidden_layers
        return cls(count, cfg.hidden_size, cfg.num_attention_heads * head, kept, total - matrices + kept)


AMD_OLMO_1B = TextEncoderSizes(16, 2048, 2048, 16 * (4 * 2048**2 + 3 * 2048 * 8192), 1_176_764_416)
"""The paper's text encoder, for plans without hub access: 16 layers, feed-forward 8192, vocabulary of 50,304."""


class DeviceWork(NamedTuple):
    """Arithmetic and memory traffic of a computation."""

    flop: float
    bytes: float
    """Bytes that must be read and written at least: weights and caches, without activations."""


class Accelerator(NamedTuple):
    """Accelerator with peak FLOP/s and memory."""

    label: str
    """Part of the device name that PyTorch reports."""
    peak: float
    """Peak dense bf16 FLOP/s."""
    memory: float
    """Bytes."""
    bandwidth: float
    """Peak bytes/s of the memory."""
    source: str

    def least_seconds(self, work: DeviceWork) -> tuple[float, str]:
        """Return the fewest seconds that ``work`` can take, and what bounds it: ``compute`` or ``memory``."""
        return max((work.flop / self.peak, "compute"), (work.bytes / self.bandwidth, "memory"))


ACCELERATORS = {
    "mi300x": Accelerator("AMD Instinct MI300X", 1307.4e12, 192e9, 5.3e12, "AMD Instinct MI300X data sheet"),
    "mi325x": Accelerator("AMD Instinct MI325X", 1307.4e12, 256e9, 6.0e12, "AMD Instinct MI325X data sheet"),
    "mi350x": Accelerator("AMD Instinct MI350X", 2306.9e12, 288e9, 8.0e12, "AMD Instinct MI350X data sheet"),
    "mi355x": Accelerator("AMD Instinct MI355X", 2516.6e12, 288e9, 8.0e12, "AMD Instinct MI355X data sheet"),
    "h100pcie": Accelerator("NVIDIA H100 PCIe", 756e12, 80e9, 2.0e12, "NVIDIA H100 data sheet, without sparsity"),
    "h100": Accelerator("NVIDIA H100", 989.4e12, 80e9, 3.35e12, "NVIDIA H100 SXM data sheet, without sparsity"),
    "h200": Accelerator("NVIDIA H200", 989.4e12, 141e9, 4.8e12, "NVIDIA H200 SXM data sheet, without sparsity"),
    "a100": Accelerator("NVIDIA A100", 312e12, 80e9, 2.039e12, "NVIDIA A100 data sheet, without sparsity"),
}
"""Peaks, memory and its bandwidth from the vendors' data sheets. CPUs are not included."""


def find_accelerator(device_name: str) -> Accelerator | None:
    """Return the entry for PyTorch's device name (``NVIDIA H100 80GB HBM3``); None if it is not in the table."""
    if "NVL" in device_name:  # slower variants with the same names
        return None
    return next((found for found in ACCELERATORS.values() if found.label in device_name), None)


def linear(tokens: float, inputs: int, outputs: int) -> float:
    """Return the FLOP of multiplying ``tokens`` vectors by one matrix."""
    return 2.0 * tokens * inputs * outputs


def attention(queries: float, keys: float, width: int) -> float:
    """Return the FLOP of attention scores and weighted sums over all heads, of total width ``width``."""
    return 4.0 * queries * keys * width


@cache
def bit_encode(cfg: BITConfig, height: int, width: int) -> Work:
    """Return the FLOP of encoding an image of ``height x width`` pixels to quantizer logits."""
    d, patches = cfg.encoder_width, (height // cfg.patch_size) * (width // cfg.patch_size)
    embedding = linear(patches, 3 * cfg.patch_size**2, d)
    total = embedding
    for i in range(cfg.encoder_layers):
        total += _bit_block(cfg.num_tokens + patches, d)
        if i in cfg.downsample_after:
            patches //= 4
            total += linear(patches, {"linear": 4, "conv": 9}[cfg.resample] * d, d)
    total += linear(cfg.num_tokens, d, d) + linear(cfg.num_tokens, d, _quantized_width(cfg))
    # The words themselves are computed once a batch, which is not counted.
    search = linear(cfg.num_tokens, WORD_WIDTH, 2**cfg.bits_per_token) if cfg.quantizer == "one_hot" else 0.0
    return Work(total + search, embedding + 2 * search)


@cache
def bit_decode(cfg: BITConfig, height: int, width: int) -> Work:
    """Return the FLOP of decoding codes to an image of ``height x width`` pixels."""
    d, patch = cfg.decoder_width, cfg.patch_size
    patches = (height // patch) * (width // patch) // 4 ** len(cfg.upsample_after)
    total = linear(cfg.num_tokens, _quantized_width(cfg), cfg.encoder_width)
    total += linear(cfg.num_tokens, cfg.encoder_width, d)
    for i in range(cfg.decoder_layers):
        total += _bit_block(cfg.num_tokens + patches, d)
        if i in cfg.upsample_after:
            total += linear(patches, {"linear": 1, "conv": 9}[cfg.resample] * d, 4 * d)
            patches *= 4
    return Work(total + _pixel_head(cfg, patches))


@cache
def generator_forward(cfg: GeneratorConfig, text_tokens: int) -> Work:
    """Return the FLOP of all image tokens of one sample and its text keys and values.

    This is a training forward pass, or a sampling step without cached text.
    """
    text = generator_text(cfg, text_tokens)
    d, count, bits = cfg.width, cfg.num_tokens, cfg.bits_per_token
    block = linear(count, d, 4 * d) + attention(count, text_tokens + count, d) + linear(count, d, 8 * d)
    # The AR network's first token is the learned split token, which needs no embedding.
    embedding = linear(count if cfg.kind == "diffusion" else count - 1, bits, d)
    total, data = embedding + linear(count, d, bits), embedding
    if hidden := cfg.bit_head_width:
        # A bit's state is a sum over the bits before it, computed as a product with a triangular matrix of data.
        states = linear(count * bits, bits, hidden)
        total, data = total + linear(count, d, hidden) + states + linear(count * bits, hidden, 1), data + states
    if cfg.kind == "diffusion":
        time, block = linear(1, 1, d), block + linear(1, d, 6 * d)
        total, data = total + time + (cfg.time_layers - 1) * linear(1, d, d) + linear(1, d, 2 * d), data + time
    return Work(total + cfg.layers * block, data) + text


def generator_text(cfg: GeneratorConfig, text_tokens: int) -> Work:
    """Return the part of :func:`generator_forward` that depends only on the prompt: text projections, keys and values."""
    projection = cfg.layers * linear(text_tokens, cfg.text_width, cfg.width)
    return Work(projection + cfg.layers * linear(text_tokens, cfg.width, 2 * cfg.width), projection)


def generator_pass(cfg: GeneratorConfig, rows: int, text_tokens: int, bytes_per_value: int) -> DeviceWork:
    """Return the work of one sampling step on ``rows`` rows of the network, two for an image with guidance.

    Text keys and values, and the modulations of the timestep, are given. AR computes one token and reads the keys and
    values of all ``text_tokens`` and image tokens, masked ones included; diffusion computes all tokens.
    """
    d, bits, keys = cfg.width, cfg.bits_per_token, text_tokens + cfg.num_tokens
    count = cfg.num_tokens if cfg.kind == "diffusion" else 1
    block = linear(count, d, 12 * d) + attention(count, keys, d)
    flop = rows * (cfg.layers * block + 2 * linear(count, d, bits))
    weights = cfg.layers * 12 * d**2 + 2 * bits * d
    if hidden := cfg.bit_head_width:
        flop += rows * linear(1, d, hidden)  # all else of the head is elementwise
        weights += (d + 2 * bits) * hidden
    cached = rows * cfg.layers * 2 * d * (keys + count)
    return DeviceWork(flop, bytes_per_value * (weights + cached))


def text_encoder_forward(sizes: TextEncoderSizes, text_tokens: int) -> float:
    """Return the FLOP of the language model without LM head for a prompt of ``text_tokens``, padding included."""
    products = linear(text_tokens, 1, sizes.matrix_weights)
    return products + sizes.layers * attention(text_tokens, text_tokens, sizes.attention_width)


def generator_training(
    cfg: GeneratorConfig,
    text_tokens: int,
    text_encoder: TextEncoderSizes | None = None,
    *,
    tokenizer: BITConfig | None = None,
    gradient_checkpointing: bool = False,
) -> TrainingFlops:
    """Return the FLOP of training on one sample: forward, backward, recomputation, and forward of frozen networks.

    Without a ``text_encoder`` features are given; with a ``tokenizer`` images are encoded online.
    """
    work = generator_forward(cfg, text_tokens)
    frozen = text_encoder_forward(text_encoder, text_tokens) if text_encoder else 0.0
    if tokenizer:
        frozen += bit_encode(tokenizer, tokenizer.image_size, tokenizer.image_size).forward
    return TrainingFlops(work.forward, work.backward, frozen, work.forward if gradient_checkpointing else 0.0)


def tokenizer_training(
    cfg: BITConfig,
    input_size: int,
    output_size: int,
    *,
    frozen_encoder: bool = False,
    gradient_checkpointing: bool = False,
) -> TrainingFlops:
    """Return the FLOP of training on one image, encoded at ``input_size`` and decoded at ``output_size`` pixels a side.

    The networks of the losses (perceptual, discriminator) are not counted.
    """
    encode, decode = bit_encode(cfg, input_size, input_size), bit_decode(cfg, output_size, output_size)
    trained = decode if frozen_encoder else encode + decode
    recomputed = trained.forward if gradient_checkpointing else 0.0
    return TrainingFlops(trained.forward, trained.backward, encode.forward if frozen_encoder else 0.0, recomputed)


def _bit_block(tokens: int, width: int) -> float:
    """Return the FLOP of a tokenizer block: self-attention with four matrices, SwiGLU with three of 4x width."""
    return linear(tokens, width, 16 * width) + attention(tokens, tokens, width)


def _quantized_width(cfg: BITConfig) -> int:
    """Return the width of what the quantizer's first layer gives and its last one reads."""
    return WORD_WIDTH if cfg.quantizer == "one_hot" else cfg.bits_per_token


def _pixel_head(cfg: BITConfig, patches: int) -> float:
    if cfg.pixel_head == "linear":
        return linear(patches, cfg.decoder_width, 3 * cfg.patch_size**2)
    total, channels, side = 0.0, cfg.decoder_width, 1
    while side < cfg.patch_size:
        narrower = max(channels // 2, 16)
        # Each input position of the transposed convolution writes to 4 x 4 output positions.
        total += linear(patches * side**2, channels, 16 * narrower)
        channels, side = narrower, 2 * side
    return total + linear(patches * side**2, 9 * channels, 3)
