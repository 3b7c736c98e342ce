"""Layers of the tokenizer: transformer block, 2x2 resampling, pixel heads and quantizers."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layers import Attention, RMSNorm, SwiGLU, without_autocast
from .rope import RopeStyle, apply_rope


class BITBlock(nn.Module):
    """Pre-norm transformer block: self-attention over [latent; image] tokens, then SwiGLU."""

    def __init__(self, width: int, heads: int, rope: RopeStyle) -> None:
        super().__init__()
        self.rope: RopeStyle = rope
        self.input_layernorm = RMSNorm(width)
        self.attn = Attention(width, heads)
        self.post_attention_layernorm = RMSNorm(width)
        self.mlp = SwiGLU(width, 4 * width)

    def forward(self, x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
        y = self.input_layernorm(x)
        k, v = self.attn.key_value(y)
        q = apply_rope(self.attn.query(y), table, self.rope)
        x = x + self.attn.attend(q, apply_rope(k, table, self.rope), v)
        return x + self.mlp(self.post_attention_layernorm(x))


class LinearDown(nn.Module):
    """Linear 2x2 merge (Eq. 2): the concatenated tokens of a cell through one linear map.

    ``[B,d,H,W] -> [B,d,H/2,W/2]``.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(F.pixel_unshuffle(x, 2).movedim(1, -1)).movedim(-1, 1)


class LinearUp(nn.Module):
    """Linear 2x2 expansion (Eq. 3): a token expanded to 4 d channels and split into a cell.

    ``[B,d,H,W] -> [B,d,2H,2W]``.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, 4 * width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.pixel_shuffle(self.linear(x.movedim(1, -1)).movedim(-1, 1), 2)


class ConvDown(nn.Module):
    """Published 2x2 merge: a strided 3x3 convolution plus an average-pooling shortcut."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) + F.avg_pool2d(x, 2)


class ConvUp(nn.Module):
    """Published 2x2 expansion: 3x3 convolution and pixel shuffle plus a nearest-neighbour shortcut."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, 4 * width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return F.pixel_shuffle(self.conv(x), 2) + F.interpolate(x, scale_factor=2, mode="nearest")


DOWN = {"linear": LinearDown, "conv": ConvDown}
UP = {"linear": LinearUp, "conv": ConvUp}


class LinearPixelHead(nn.Linear):
    """Linear map from a token to its patch; the output vector is laid out as (row, column, channel)."""

    def __init__(self, width: int, patch: int) -> None:
        super().__init__(width, patch * patch * 3)
        self.patch = patch

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens ``[B, d, H, W]`` to pixels ``[B, 3, H * patch, W * patch]``."""
        y = super().forward(x.movedim(1, -1)).unflatten(-1, (self.patch, self.patch, 3))
        return y.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


class ConvPixelHead(nn.Sequential):
    """Light convolutional decoder: (transposed convolution, norm, ReLU) per doubling, then a 3x3 convolution.

    The paper reports that it is clearly better than the linear head on text and faces.
    """

    def __init__(self, width: int, patch: int) -> None:
        layers: list[nn.Module] = []
        channels = width
        for _ in range(int(math.log2(patch))):
            narrower = max(channels // 2, 16)
            layers += [
                nn.ConvTranspose2d(channels, narrower, 4, stride=2, padding=1),
                nn.GroupNorm(math.gcd(8, narrower), narrower),
                nn.ReLU(),
            ]
            channels = narrower
        super().__init__(*layers, nn.Conv2d(channels, 3, 3, padding=1))


PIXEL_HEADS = {"linear": LinearPixelHead, "conv": ConvPixelHead}


class Quantized(NamedTuple):
    """Quantized encoder tokens, in training."""

    vectors: Tensor
    """Input of the decoder ``[B, L, width]``, with straight-through gradients."""
    codes: Tensor
    """Codes 0/1 at inference ``[B, L, K]``, whatever was drawn."""
    loss: Tensor
    """The quantizer's own loss."""


def _norm(tokens: int | None, size: int) -> nn.BatchNorm1d | None:
    """Return the batch norm of ``size`` values of each of ``tokens`` tokens; None without tokens."""
    return nn.BatchNorm1d(tokens * size, affine=False, momentum=0.05) if tokens else None


def _balanced(norm: nn.BatchNorm1d | None, values: Tensor) -> Tensor:
    """Apply ``norm``, if there is one, to ``values [B, L, size]``, in the dtype of its statistics."""
    if norm is None:
        return values
    statistics = norm.running_mean
    assert statistics is not None
    return norm(values.flatten(1).to(statistics.dtype)).view_as(values)  # type: ignore[no-any-return]


class BinaryQuantizer(nn.Module):
    """Binary quantizer (Eq. 4).

    ``codes ~ Bernoulli(sigmoid(R(z) / tau))`` in training, ``sigmoid(R(z)) > 0.5`` otherwise (tau = 0). ``embed [K, d]``
    maps bits back to vectors: a token is the sum of the rows of its set bits.
    """

    def __init__(self, width: int, bits: int, *, normalized_tokens: int | None = None) -> None:
        super().__init__()
        self.proj = nn.Sequential(nn.Linear(width, bits))
        self.embed = nn.Parameter(torch.randn(bits, width) * 0.02)
        self.norm = _norm(normalized_tokens, bits)

    def encode(self, tokens: Tensor) -> Tensor:
        """Return codes, uint8 0/1 ``[B, L, K]``, of encoder tokens ``[B, L, width]``."""
        return (self.logits(tokens).sigmoid() > 0.5).to(torch.uint8)

    def vectors(self, codes: Tensor) -> Tensor:
        """Return the decoder's input ``[B, L, width]`` of codes 0/1 ``[B, L, K]``, of any dtype."""
        return codes.to(self.embed.dtype) @ self.embed

    def forward(self, tokens: Tensor, temperature: float, u: Tensor | None = None) -> Quantized:
        """Quantize encoder tokens as :meth:`quantize`; the loss is ``mean(s (1 - s))`` with s = sigmoid(logits)."""
        logits = self.logits(tokens)
        soft = logits.sigmoid()
        bits = self.quantize(logits, temperature, u)
        return Quantized(self.vectors(bits), logits.detach() > 0, (soft * (1 - soft)).mean())

    def logits(self, tokens: Tensor) -> Tensor:
        """Return logits, float32 ``[B, L, K]``, of encoder tokens ``[B, L, width]``."""
        return _balanced(self.norm, self.proj(tokens)).float()

    def quantize(self, logits: Tensor, temperature: float, u: Tensor | None = None) -> Tensor:
        """Quantize ``logits [B, L, K]`` to bits, float32 0/1, with the straight-through gradient of ``sigmoid(logits)``.

        A positive temperature samples with uniforms ``u`` of the same shape, or with torch's generator if None.
        """
        # In bfloat16 a sigmoid over 0.998 would be 1: a set bit's gradient would vanish where a cleared one's does not.
        logits = logits.float()
        soft = logits.sigmoid()
        if temperature > 0:
            # Not torch.bernoulli, which raises on NaN: the training loop reports a loss that is not finite.
            u = torch.rand_like(logits) if u is None else u
            bits = (u < (logits / temperature).sigmoid()).to(logits.dtype)
        else:
            bits = (soft > 0.5).to(logits.dtype)
        return bits + (soft - soft.detach())  # the difference is 0, so bits are exactly 0 or 1


WORD_WIDTH = 16
"""Dimensions in which the words of a one-hot quantizer are compared with tokens."""
COMMITMENT = 0.25
"""Weight of the commitment loss (van den Oord et al., 2017)."""


class OneHotQuantizer(nn.Module):
    """Vector quantizer (van den Oord et al., 2017): a token is the nearest of ``2^bits`` learned words.

    Its code is the word's index in ``bits`` binary digits, the most significant one first. Two measures keep words from
    being unused: they are compared by direction in few dimensions (ViT-VQGAN, Yu et al., 2022), and learned together, as
    one linear map of fixed random vectors (SimVQ, Zhu et al., 2024).
    """

    def __init__(self, width: int, bits: int, *, normalized_tokens: int | None = None) -> None:
        super().__init__()
        self.bits = bits
        self.proj = nn.Sequential(nn.Linear(width, WORD_WIDTH))
        self.norm = _norm(normalized_tokens, WORD_WIDTH)
        self.embed: Tensor
        self.register_buffer("embed", torch.randn(2**bits, WORD_WIDTH))
        self.embed_map = nn.Linear(WORD_WIDTH, WORD_WIDTH, bias=False)
        self.embed_out = nn.Linear(WORD_WIDTH, width)

    def encode(self, tokens: Tensor) -> Tensor:
        """Return codes, uint8 0/1 ``[B, L, K]``, of encoder tokens ``[B, L, width]``."""
        return self._digits(_nearest(self._directions(tokens), self._words()))

    def vectors(self, codes: Tensor) -> Tensor:
        """Return the decoder's input ``[B, L, width]`` of codes 0/1 ``[B, L, K]``, of any dtype."""
        return self._vectors(self._words()[(codes.long() << self._places(codes)).sum(-1)])

    def forward(self, tokens: Tensor, temperature: float, u: Tensor | None = None) -> Quantized:
        """Quantize encoder tokens; the loss draws words to their tokens, and tokens to their words.

        Nothing is drawn: ``temperature`` and ``u`` have no effect.
        """
        directions, words = self._directions(tokens), self._words()
        index = _nearest(directions, words)
        chosen = words[index]
        loss = F.mse_loss(chosen, directions.detach()) + COMMITMENT * F.mse_loss(directions, chosen.detach())
        return Quantized(self._vectors(directions + (chosen - directions).detach()), self._digits(index), loss)

    def _directions(self, tokens: Tensor) -> Tensor:
        """Return unit vectors, float32 ``[B, L, WORD_WIDTH]``."""
        return F.normalize(_balanced(self.norm, self.proj(tokens)).float(), dim=-1)

    def _words(self) -> Tensor:
        """Return the words as unit vectors, float32 ``[2^K, WORD_WIDTH]``."""
        with without_autocast(self.embed):
            return F.normalize(F.linear(self.embed.float(), self.embed_map.weight.float()), dim=-1)

    def _vectors(self, words: Tensor) -> Tensor:
        return self.embed_out(words.to(self.embed_out.weight.dtype))

    def _digits(self, index: Tensor) -> Tensor:
        """Return the binary digits, uint8 0/1 ``[B, L, K]``, of ``index [B, L]``."""
        return (index[..., None] >> self._places(index) & 1).to(torch.uint8)

    def _places(self, like: Tensor) -> Tensor:
        return torch.arange(self.bits - 1, -1, -1, device=like.device)


@torch.no_grad()
def _nearest(directions: Tensor, words: Tensor) -> Tensor:
    """Return the index ``[B, L]`` of the word nearest to each of ``directions [B, L, d]``, both unit vectors."""
    with without_autocast(directions):
        return (directions @ words.T).argmax(-1)


QUANTIZERS: dict[str, type[BinaryQuantizer] | type[OneHotQuantizer]] = {
    "binary": BinaryQuantizer,
    "one_hot": OneHotQuantizer,
}
