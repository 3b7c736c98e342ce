"""BIT, the 1D binary image tokenizer (section 2.1): images <-> ``num_tokens x bits_per_token`` bits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, NamedTuple

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from ..config import Config
from ..errors import UserError
from .bit_layers import DOWN, PIXEL_HEADS, QUANTIZERS, UP, BinaryQuantizer, BITBlock
from .layers import RMSNorm
from .rope import RopeStyle, rope_table, sinusoidal_grid

POSITION_STD = 0.3
"""Initial scale of explicit positions: large enough to distinguish positions, small enough not to dominate the codes."""

MOST_WORD_BITS = 16
"""Largest ``bits_per_token`` of a one-hot quantizer."""

AxisWidth = Annotated[int, Field(ge=0)]


class BITConfig(Config):
    """Sizes and variants of a tokenizer. The defaults are the paper's; lengths are in pixels unless stated otherwise."""

    kind: Literal["bit"] = "bit"
    image_size: int = Field(512, ge=1)
    """Image size of the encoder in training. Other multiples of :attr:`encode_multiple` can be encoded as well."""
    patch_size: int = Field(16, ge=1)
    num_tokens: int = Field(128, ge=1)
    bits_per_token: int = Field(64, ge=1)
    encoder_width: int = Field(768, ge=1)
    encoder_layers: int = Field(12, ge=1)
    encoder_heads: int = Field(12, ge=1)
    decoder_width: int = Field(1024, ge=1)
    decoder_layers: int = Field(16, ge=1)
    decoder_heads: int = Field(16, ge=1)
    rope_axes: tuple[AxisWidth, AxisWidth, AxisWidth] = (8, 28, 28)
    """Columns of a head for (latent index, row, column); their sum is the head's width."""
    rope: RopeStyle = "rotary"
    position_extent: float | None = Field(64.0, gt=0)
    """Positions of each grid side span [0, extent - 1]; none means integer positions, without interpolation."""
    downsample_after: tuple[int, ...] = (7,)
    """Encoder blocks followed by a 2x2 merge of image tokens."""
    upsample_after: tuple[int, ...] = (7,)
    """Decoder blocks followed by a 2x2 expansion of image tokens."""
    resample: Literal["linear", "conv"] = "linear"
    pixel_head: Literal["linear", "conv"] = "linear"
    quantizer: Literal["binary", "one_hot"] = "binary"
    """``binary``: the bits of a token are independent, the paper's latent space (Eq. 4). ``one_hot``: a token is one of
    ``2^bits_per_token`` learned words, whose number in binary digits are its bits, as in a VQ-VAE; for comparison."""
    init_std: float = Field(0.02, ge=0)
    """Standard deviation of the initial latent and mask tokens."""
    token_positions: bool = False
    """Add explicit positions to the decoder's input in addition to RoPE: a learned vector for each latent token, 2D
    sinusoids for each mask token. Small tokenizers leave their first loss plateau much sooner with it."""
    normalize_logits: bool = False
    """Batch norm (without affine) on each quantizer logit, so that every bit is balanced initially and none collapses.

    Of a one_hot quantizer on each coordinate in which tokens are compared with words."""

    @model_validator(mode="before")
    @classmethod
    def _without_repa(cls, given: Any) -> Any:
        """Drop the keys of a removed option from tokenizers and runs saved before 0.1, where it was off."""
        if isinstance(given, Mapping) and given.get("repa_layer", 0) is None:
            return {name: value for name, value in given.items() if not name.startswith("repa_")}
        return given

    @model_validator(mode="after")
    def _sizes_fit(self) -> BITConfig:
        for side in ("encoder", "decoder"):
            width, heads = getattr(self, f"{side}_width"), getattr(self, f"{side}_heads")
            if width % heads or width // heads != sum(self.rope_axes):
                raise ValueError(
                    f"{side}_width / {side}_heads must equal sum(rope_axes) = {sum(self.rope_axes)}, got {width} / {heads}"
                )
        if any(size % 2 for size in self.rope_axes):
            raise ValueError(f"rope_axes must be even numbers, got {self.rope_axes}")
        for name, layers in (("downsample_after", self.encoder_layers), ("upsample_after", self.decoder_layers)):
            places = getattr(self, name)
            if any(not 0 <= i < layers for i in places) or len(set(places)) < len(places):
                raise ValueError(f"{name} must be different block indices 0..{layers - 1}, got {places}")
        if self.pixel_head == "conv" and self.patch_size & (self.patch_size - 1):
            raise ValueError(f"pixel_head conv needs a patch_size that is a power of two, got {self.patch_size}")
        if self.quantizer == "one_hot" and self.bits_per_token > MOST_WORD_BITS:
            raise ValueError(
                f"quantizer one_hot: 2^{self.bits_per_token} words, expected bits_per_token of at most {MOST_WORD_BITS}"
            )
        if self.image_size % self.encode_multiple:
            raise ValueError(f"image_size must be a multiple of {self.encode_multiple}, got {self.image_size}")
        return self

    @property
    def encode_multiple(self) -> int:
        """Required divisor of the sides of encoded images, so that the patch grid is even at each 2x2 merge."""
        return self.patch_size * 2 ** len(self.downsample_after)

    @property
    def decode_multiple(self) -> int:
        """Required divisor of the sides of decoded images, as the initial grid doubles at each 2x2 expansion."""
        return self.patch_size * 2 ** len(self.upsample_after)

    @property
    def size_multiple(self) -> int:
        """Required divisor of the sides of images that are encoded and decoded at the same size."""
        return max(self.encode_multiple, self.decode_multiple)

    @property
    def code_bytes(self) -> int:
        """Bytes of one image's packed codes (1,024 at the paper's sizes)."""
        return (self.num_tokens * self.bits_per_token + 7) // 8


class BITOutput(NamedTuple):
    """Outputs of a training forward pass."""

    images: Tensor
    """Reconstruction ``[B, 3, height, width]``, about [-1, 1], not clamped."""
    codes: Tensor
    """Codes 0/1 at inference ``[B, L, K]``, which those decoded in training may differ from."""
    code_loss: Tensor
    """The quantizer's loss. ``mean(s (1 - s))`` with s = sigmoid(logits), small if bit probabilities are near 0 or 1; of a
    one-hot quantizer the codebook and commitment losses."""


class BITEncoder(nn.Module):
    """Encoder (Eq. 1): images to latent tokens ``[B, L, encoder_width]``; image tokens are discarded."""

    def __init__(self, cfg: BITConfig) -> None:
        super().__init__()
        self.cfg = cfg
        width = cfg.encoder_width
        self.latent_tokens = nn.Parameter(torch.randn(1, cfg.num_tokens, width) * cfg.init_std)
        self.patch_embedder = nn.Conv2d(3, width, cfg.patch_size, stride=cfg.patch_size)
        blocks = [BITBlock(width, cfg.encoder_heads, cfg.rope) for _ in range(cfg.encoder_layers)]
        self.transformer_blocks = nn.ModuleList(blocks)
        self.down_layers = nn.ModuleList([DOWN[cfg.resample](width) for _ in cfg.downsample_after])
        if cfg.encoder_layers - 1 in cfg.downsample_after:
            # Image tokens are discarded after the last block, so that DistributedDataParallel would wait for gradients.
            self.down_layers[-1].requires_grad_(False)
        self.norm_out = RMSNorm(width)
        self.proj_out = nn.Linear(width, width)

    def forward(self, images: Tensor) -> Tensor:
        cfg = self.cfg
        # Images are float32 for every dtype of the weights.
        grid = self.patch_embedder(images.to(self.patch_embedder.weight.dtype))
        (height, width), extent, latents = grid.shape[-2:], cfg.position_extent, cfg.num_tokens
        x = torch.cat((self.latent_tokens.expand(len(images), -1, -1), grid.flatten(2).transpose(1, 2)), dim=1)
        table = rope_table(latents, height, width, cfg.rope_axes, extent, images.device)
        merges = iter(self.down_layers)
        for i, block in enumerate(self.transformer_blocks):
            x = block(x, table)
            if i in cfg.downsample_after:
                grid = next(merges)(_as_grid(x[:, latents:], height, width))
                height, width, extent = height // 2, width // 2, extent and extent // 2
                x = torch.cat((x[:, :latents], grid.flatten(2).transpose(1, 2)), dim=1)
                table = rope_table(latents, height, width, cfg.rope_axes, extent, images.device)
        return self.proj_out(self.norm_out(x[:, :latents]))


class BITDecoder(nn.Module):
    """Decoder (Eq. 1): latent vectors ``[B, L, encoder_width]`` and mask tokens to image features ``[B, d, h, w]``."""

    def __init__(self, cfg: BITConfig) -> None:
        super().__init__()
        self.cfg = cfg
        width = cfg.decoder_width
        self.mask_tokens = nn.Parameter(torch.randn(1, 1, width) * cfg.init_std)
        self.input_layer = nn.Sequential(RMSNorm(cfg.encoder_width), nn.Linear(cfg.encoder_width, width))
        if cfg.token_positions:
            self.latent_positions = nn.Parameter(torch.randn(1, cfg.num_tokens, width) * POSITION_STD)
        blocks = [BITBlock(width, cfg.decoder_heads, cfg.rope) for _ in range(cfg.decoder_layers)]
        self.transformer_blocks = nn.ModuleList(blocks)
        self.up_layers = nn.ModuleList([UP[cfg.resample](width) for _ in cfg.upsample_after])
        self.norm_out = RMSNorm(width)

    def forward(self, latents: Tensor, height: int, width: int) -> Tensor:
        """Decode ``latents`` to a grid of ``height x width`` patches."""
        cfg, count = self.cfg, self.cfg.num_tokens
        factor = 2 ** len(cfg.upsample_after)
        height, width = height // factor, width // factor
        # Floor division, as published: an odd extent of 15 starts at 7 and ends at 14. Not applied without expansion.
        extent = cfg.position_extent // factor if cfg.position_extent and factor > 1 else cfg.position_extent
        masks: Tensor = self.mask_tokens
        tokens = self.input_layer(latents)
        if cfg.token_positions:
            tokens = tokens + self.latent_positions
            places = POSITION_STD * sinusoidal_grid(height, width, masks.shape[-1], latents.device)
            masks = masks + places.to(masks.dtype)
        x = torch.cat((tokens, masks.expand(len(latents), height * width, -1)), dim=1)
        table = rope_table(count, height, width, cfg.rope_axes, extent, latents.device)
        expansions = iter(self.up_layers)
        for i, block in enumerate(self.transformer_blocks):
            x = block(x, table)
            if i in cfg.upsample_after:
                grid = next(expansions)(_as_grid(x[:, count:], height, width))
                height, width, extent = height * 2, width * 2, extent and extent * 2
                x = torch.cat((x[:, :count], grid.flatten(2).transpose(1, 2)), dim=1)
                table = rope_table(count, height, width, cfg.rope_axes, extent, latents.device)
        return _as_grid(self.norm_out(x[:, count:]), height, width)


class BIT(nn.Module):
    """Binary image tokenizer; generators, server and jobs use only :meth:`encode` and :meth:`decode`."""

    def __init__(self, cfg: BITConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.encoder = BITEncoder(cfg)
        normalized = cfg.num_tokens if cfg.normalize_logits else None
        self.quantizer = QUANTIZERS[cfg.quantizer](cfg.encoder_width, cfg.bits_per_token, normalized_tokens=normalized)
        self.decoder = BITDecoder(cfg)
        self.to_pixel = PIXEL_HEADS[cfg.pixel_head](cfg.decoder_width, cfg.patch_size)

    @torch.no_grad()
    def calibrate(self, images: Tensor) -> None:
        """Shift and scale the initial patch embedding to mean 0 and deviation 1 on ``images [B, 3, H, W]``.

        Otherwise plain backgrounds give all patches nearly the same vector, and training first stalls at predicting the
        mean image.
        """
        embed = self.encoder.patch_embedder
        assert embed.bias is not None
        patches = embed(images)
        mean, deviation = patches.mean((0, 2, 3)), patches.std((0, 2, 3)).mean()
        embed.weight.div_(deviation)
        embed.bias.copy_((embed.bias - mean) / deviation)

    def encode_logits(self, images: Tensor) -> Tensor:
        """Return the logits of a binary quantizer, float32 ``[B, L, K]``, of ``images [B, 3, H, W]`` in [-1, 1].

        UserError for sides that are not multiples of :attr:`BITConfig.encode_multiple`.
        """
        assert isinstance(self.quantizer, BinaryQuantizer)
        return self.quantizer.logits(self._tokens(images))

    def _tokens(self, images: Tensor) -> Tensor:
        """Return the encoder's tokens ``[B, L, encoder_width]``."""
        _check_size("encode", self.cfg.encode_multiple, *images.shape[-2:])
        tokens: Tensor = self.encoder(images)
        return tokens

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Encode ``images [B, 3, H, W]`` in [-1, 1] to codes, uint8 0/1 ``[B, L, K]``. Deterministic (tau = 0).

        UserError as :meth:`encode_logits`.
        """
        return self.quantizer.encode(self._tokens(images))

    @torch.no_grad()
    def decode(self, codes: Tensor, height: int, width: int) -> Tensor:
        """Decode ``codes [B, L, K]`` (0/1) to images, float32 ``[B, 3, height, width]``, about [-1, 1], not clamped.

        UserError for sides that are not multiples of :attr:`BITConfig.decode_multiple`.
        """
        return self._decode(self.quantizer.vectors(codes), height, width).float()

    def forward(
        self,
        images: Tensor,
        *,
        temperature: float,
        u: Tensor | None = None,
        height: int | None = None,
        width: int | None = None,
    ) -> BITOutput:
        """Encode, sample bits at ``temperature`` (Eq. 4) and decode at ``height x width`` pixels, for training.

        Bits are sampled with uniforms ``u [B, L, K]``, or torch's generator if None. The default size is the input's.
        """
        found = self.quantizer(self._tokens(images), temperature, u)
        output = self._decode(found.vectors, height or images.shape[-2], width or images.shape[-1])
        return BITOutput(output, found.codes, found.loss)

    def _decode(self, latents: Tensor, height: int, width: int) -> Tensor:
        _check_size("decode", self.cfg.decode_multiple, height, width)
        patch = self.cfg.patch_size
        images: Tensor = self.to_pixel(self.decoder(latents, height // patch, width // patch))
        return images


def _check_size(task: str, multiple: int, height: int, width: int) -> None:
    if height % multiple or width % multiple or not height or not width:
        raise UserError(
            f"image size {width}x{height}: expected both sides to be multiples of {multiple} for this tokenizer to {task}"
        )


def _as_grid(tokens: Tensor, height: int, width: int) -> Tensor:
    """Reshape tokens to a grid, ``[B, h * w, d] -> [B, d, h, w]``."""
    return tokens.transpose(1, 2).unflatten(2, (height, width))
