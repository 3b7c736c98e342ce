"""What the networks compute, per image, and what accelerators can: the arithmetic behind MFU and ``instella-ray plan``.

A multiply-add counts as 2 FLOP. Matrix products, convolutions and attention are counted, as
``torch.utils.flop_counter`` does, element-wise work is not. Masked attention counts in full, because it is computed.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

from torch import nn

from .models.bit import BITConfig
from .models.generator import GeneratorConfig


class Work(NamedTuple):
    """FLOP of one forward pass, split by what the backward pass needs."""

    forward: float
    from_data: float = 0.0
    """Part of ``forward`` in layers that read data: nothing asks for their input's gradient."""

    @property
    def backward(self) -> float:
        """A gradient for the weights and one for the input, each as much as the forward pass."""
        return 2 * self.forward - self.from_data

    def __add__(self, other: tuple[Any, ...]) -> Work:
        """Both, one after another."""
        return Work(*(a + b for a, b in zip(self, other, strict=True)))


class TrainingFlops(NamedTuple):
    """FLOP of training on one sample."""

    forward: float
    """Forward pass of what learns."""
    backward: float
    frozen: float = 0.0
    """Forward passes of what does not learn: text encoder, tokenizer."""
    recomputed: float = 0.0
    """Forward work that gradient checkpointing does a second time."""

    @property
    def model(self) -> float:
        """What the mathematics asks for, without recomputation. MFU counts this."""
        return self.forward + self.backward + self.frozen

    @property
    def hardware(self) -> float:
        """What the device computes. HFU counts this."""
        return self.model + self.recomputed


class TextEncoderSizes(NamedTuple):
    """What the cost of a language model's forward pass follows from."""

    layers: int
    width: int
    attention_width: int
    """Heads times their width."""
    matrix_weights: int
    """Weights of all matrices that a token is multiplied by (no embedding, no LM head)."""
    parameters: int
    """All weights, embeddings included."""

    @classmethod
    def of(cls, model: nn.Module, layers: int | None = None) -> TextEncoderSizes:
        """Sizes of a Transformers ``model`` without LM head, on any device, meta too; of its first ``layers`` layers."""
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
"""The paper's text encoder, for plans where the hub cannot be asked: 16 layers, feed-forward 8192, 50,304 words."""


class Accelerator(NamedTuple):
    """A device of the table below."""

    label: str
    peak: float
    """Dense bf16 FLOP/s with matrix units."""
    memory: float
    """Bytes."""
    source: str


ACCELERATORS = {
    "mi300x": Accelerator("AMD Instinct MI300X", 1307.4e12, 192e9, "AMD Instinct MI300X data sheet"),
    "mi325x": Accelerator("AMD Instinct MI325X", 1307.4e12, 256e9, "AMD Instinct MI325X data sheet"),
    "mi350x": Accelerator("AMD Instinct MI350X", 2306.9e12, 288e9, "AMD Instinct MI350X data sheet"),
    "mi355x": Accelerator("AMD Instinct MI355X", 2516.6e12, 288e9, "AMD Instinct MI355X data sheet"),
    "h100pcie": Accelerator("NVIDIA H100 PCIe", 756e12, 80e9, "NVIDIA H100 data sheet, without sparsity"),
    "h100": Accelerator("NVIDIA H100", 989.4e12, 80e9, "NVIDIA H100 SXM data sheet, without sparsity"),
    "h200": Accelerator("NVIDIA H200", 989.4e12, 141e9, "NVIDIA H200 SXM data sheet, without sparsity"),
    "a100": Accelerator("NVIDIA A100", 312e12, 80e9, "NVIDIA A100 data sheet, without sparsity"),
}
"""Peaks and memory by the makers' data sheets. A processor's peak is not known."""


def find_accelerator(device_name: str) -> Accelerator | None:
    """The entry for a name as PyTorch reports it (``NVIDIA H100 80GB HBM3``); None for one that is not in the table."""
    if "NVL" in device_name:  # slower cards of the same names
        return None
    return next((found for found in ACCELERATORS.values() if found.label in device_name), None)


def linear(tokens: float, inputs: int, outputs: int) -> float:
    """``tokens`` vectors through one matrix."""
    return 2.0 * tokens * inputs * outputs


def attention(queries: float, keys: float, width: int) -> float:
    """Scores and weighted sum over all heads, ``width`` columns together."""
    return 4.0 * queries * keys * width


@cache
def bit_encode(cfg: BITConfig, height: int, width: int) -> Work:
    """An image of ``height x width`` pixels to quantizer logits."""
    d, patches = cfg.encoder_width, (height // cfg.patch_size) * (width // cfg.patch_size)
    embedding = linear(patches, 3 * cfg.patch_size**2, d)
    total = embedding
    for i in range(cfg.encoder_layers):
        total += _bit_block(cfg.num_tokens + patches, d)
        if i in cfg.downsample_after:
            patches //= 4
            total += linear(patches, {"linear": 4, "conv": 9}[cfg.resample] * d, d)
    total += linear(cfg.num_tokens, d, d) + linear(cfg.num_tokens, d, cfg.bits_per_token)
    return Work(total, embedding)


@cache
def bit_decode(cfg: BITConfig, height: int, width: int) -> Work:
    """Codes to an image of ``height x width`` pixels."""
    d, patch = cfg.decoder_width, cfg.patch_size
    patches = (height // patch) * (width // patch) // 4 ** len(cfg.upsample_after)
    total = linear(cfg.num_tokens, cfg.bits_per_token, cfg.encoder_width)
    total += linear(cfg.num_tokens, cfg.encoder_width, d)
    for i in range(cfg.decoder_layers):
        total += _bit_block(cfg.num_tokens + patches, d)
        if i in cfg.upsample_after:
            total += linear(patches, {"linear": 1, "conv": 9}[cfg.resample] * d, 4 * d)
            patches *= 4
    return Work(total + _pixel_head(cfg, patches))


@cache
def generator_forward(cfg: GeneratorConfig, text_tokens: int) -> Work:
    """All image tokens of one sample at once, and its text's keys and values: a training pass, or a sampling step."""
    text = generator_text(cfg, text_tokens)
    d, count, bits = cfg.width, cfg.num_tokens, cfg.bits_per_token
    block = linear(count, d, 4 * d) + attention(count, text_tokens + count, d) + linear(count, d, 8 * d)
    # The AR network's first token is the split token, which is learned.
    embedding = linear(count if cfg.kind == "diffusion" else count - 1, bits, d)
    total, data = embedding + linear(count, d, bits), embedding
    if cfg.kind == "diffusion":
        time, block = linear(1, 1, d), block + linear(1, d, 6 * d)
        total, data = total + time + linear(1, d, d) + linear(1, d, 2 * d), data + time
    return Work(total + cfg.layers * block, data) + text


def generator_text(cfg: GeneratorConfig, text_tokens: int) -> Work:
    """The part of :func:`generator_forward` that depends on the prompt only: text projections, keys and values."""
    projection = cfg.layers * linear(text_tokens, cfg.text_width, cfg.width)
    return Work(projection + cfg.layers * linear(text_tokens, cfg.width, 2 * cfg.width), projection)


def text_encoder_forward(sizes: TextEncoderSizes, text_tokens: int) -> float:
    """A prompt of ``text_tokens``, padding included, through the language model without its LM head."""
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
    """One sample: three times the forward pass (once more when blocks are recomputed), and what is frozen, forward.

    Without a ``text_encoder`` features are at hand, with a ``tokenizer`` its images are encoded within the loop.
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
    """One image, encoded at ``input_size`` and decoded at ``output_size`` pixels a side.

    The losses' own networks (perceptual, discriminator) are not part of it.
    """
    encode, decode = bit_encode(cfg, input_size, input_size), bit_decode(cfg, output_size, output_size)
    learns = decode if frozen_encoder else encode + decode
    again = learns.forward if gradient_checkpointing else 0.0
    return TrainingFlops(learns.forward, learns.backward, encode.forward if frozen_encoder else 0.0, again)


def _bit_block(tokens: int, width: int) -> float:
    """Self-attention with four matrices, SwiGLU with three of four times the width."""
    return linear(tokens, width, 16 * width) + attention(tokens, tokens, width)


def _pixel_head(cfg: BITConfig, patches: int) -> float:
    if cfg.pixel_head == "linear":
        return linear(patches, cfg.decoder_width, 3 * cfg.patch_size**2)
    total, channels, side = 0.0, cfg.decoder_width, 1
    while side < cfg.patch_size:
        narrower = max(channels // 2, 16)
        # Each place of a transposed convolution writes to 4 x 4 places.
        total += linear(patches * side**2, channels, 16 * narrower)
        channels, side = narrower, 2 * side
    return total + linear(patches * side**2, 9 * channels, 3)
