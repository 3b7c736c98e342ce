"""Diffusion and AR generators (sections 2.2 and 2.3): transformers over image bits, as deep as the text encoder.

Block i reads the text encoder's layer i, or its last one, through its own projection; only image tokens are queries.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, cast

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..config import Config
from ..errors import UserError
from .bit_head import BitHead
from .diffusion import Target
from .joint_attention import JointAttention, JointCache, TextKV
from .layers import NORMS, FeedForward, Modulation, TimestepEmbedding, modulated_norm

KIND_SETTINGS = {
    "ar": {"bit_head_width": "a bit head", "norm": "a choice of norms"},
    "diffusion": {"time_layers": "a timestep embedding", "target": "a prediction target"},
}
"""Settings that only one kind of generator has, with what they set."""


class GeneratorConfig(Config):
    """Sizes and variants of a generator. The defaults are the paper's, which match AMD-OLMo-1B."""

    kind: Literal["diffusion", "ar"] = "diffusion"
    num_tokens: int = Field(128, ge=1)
    bits_per_token: int = Field(64, ge=1)
    width: int = Field(2048, ge=1)
    layers: int = Field(16, ge=1)
    """Number of blocks; must equal the number of text feature layers, unless ``text_layers`` is last."""
    heads: int = Field(16, ge=1)
    text_width: int = Field(2048, ge=1)
    position_std: float = Field(0.02, ge=0)
    """Standard deviation of the initial position embeddings (the published weights were initialized to 0)."""
    position_place: Literal["attention", "block"] = "attention"
    """Where a block adds its positions: to the ``attention``'s input after the norm, as published, or to the image tokens
    at the start of the ``block``, as in the paper, where later blocks see them as well."""
    norm: Literal["rms", "layer"] = "rms"
    """Norm of the blocks and of the output (AR): ``rms``, as published, or ``layer``, the paper's standard layer norm."""
    time_layers: Literal[1, 2] = 2
    """Linear layers of the timestep embedding (diffusion): 2 as published, 1 in the paper."""
    target: Target = "flip"
    """What the network predicts (diffusion): ``flip``, whether a noisy bit was flipped, as in the paper, or ``x0``, the
    clean bit (both in Wang et al., 2023a)."""
    text_layers: Literal["each", "last"] = "each"
    """Text features of the blocks: block i reads the text encoder's layer i (``each``, as in the paper), or all blocks
    read its ``last`` layer."""
    zero_init: bool = True
    """adaLN-Zero: modulation and output weights are initialized to zero (diffusion). False: Xavier, as published."""
    unused_time_embed: bool = False
    """Include the timestep embedding that the published AR checkpoint contains but does not use."""
    bit_head_width: int = Field(0, ge=0)
    """Hidden width of a head that draws the bits of a token one after another (AR); 0 draws them independently of each
    other, as the paper does."""

    @model_validator(mode="after")
    def _sizes_fit(self) -> GeneratorConfig:
        if self.width % self.heads:
            raise ValueError(f"width must be a multiple of heads, got {self.width} and {self.heads}")
        for kind, names in KIND_SETTINGS.items():
            for name, part in names.items() if kind != self.kind else ():
                if (given := getattr(self, name)) != (expected := type(self).model_fields[name].default):
                    raise ValueError(f"{name} {given}: only kind {kind} has {part}, expected {expected}")
        return self

    def reads(self, layers: int, width: int) -> bool:
        """Return whether text features of ``layers`` layers and this ``width`` fit."""
        return width == self.text_width and (layers == self.layers or (self.text_layers == "last" and layers > 0))


class GeneratorBlock(nn.Module):
    """Base of both block types: position embeddings, text projection and joint attention."""

    def __init__(self, cfg: GeneratorConfig, positions: int) -> None:
        super().__init__()
        self.pos_emb = nn.Parameter(torch.randn(1, positions, cfg.width) * cfg.position_std)
        self.position_place = cfg.position_place
        self.proj_cond = nn.Linear(cfg.text_width, cfg.width)
        self.attn = JointAttention(cfg.width, cfg.heads)

    def text_kv(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values ``[B, heads, T, D]`` of this block's text features ``[B, T, text_width]``."""
        return self.attn.key_value(self.proj_cond(features))

    def placed(self, x: Tensor, positions: Tensor, norm: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """Return the residual stream ``x`` and the attention's input, with ``positions`` added to one of them."""
        if self.position_place == "block":
            x = x + positions
            return x, norm(x)
        return x, norm(x) + positions


class DiffusionBlock(GeneratorBlock):
    """Diffusion transformer block: attention and feed-forward with adaLN modulation by the timestep."""

    def __init__(self, cfg: GeneratorConfig) -> None:
        super().__init__(cfg, cfg.num_tokens)
        self.norm1 = Modulation(cfg.width, 6)
        self.ff = FeedForward(cfg.width)

    def forward(
        self,
        x: Tensor,
        embedding: Tensor | None,
        modulation: Tensor | None,
        context: TextKV | JointCache,
        mask: Tensor,
    ) -> Tensor:
        """Return the next ``x [B, L, width]``, given the timestep's ``embedding`` or its ``modulation`` by ``norm1``.

        ``context`` is this block's alone: with an index into that of all blocks each would compile to other code.
        """
        # Computed here if not given, because FSDP gathers a block's weights for its forward pass alone.
        modulation = self.norm1(embedding) if modulation is None else modulation
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = modulation[:, :, None].unbind(1)
        x, y = self.placed(x, self.pos_emb, lambda stream: modulated_norm(stream, scale_1, shift_1))
        x = x + gate_1 * self.attn(y, context, mask)
        return x + gate_2 * self.ff(modulated_norm(x, scale_2, shift_2))


class ARBlock(GeneratorBlock):
    """AR transformer block: norms without modulation instead of adaLN, causal attention."""

    def __init__(self, cfg: GeneratorConfig) -> None:
        super().__init__(cfg, cfg.num_tokens + 1)
        self.input_layernorm = NORMS[cfg.norm](cfg.width)
        self.post_attention_layernorm = NORMS[cfg.norm](cfg.width)
        self.mlp = FeedForward(cfg.width)

    def forward(self, x: Tensor, text: TextKV, mask: Tensor) -> Tensor:
        """Return the next ``x [B, n, width]``, given the text of this block."""
        x, y = self.placed(x, self.pos_emb[:, : x.shape[1]], self.input_layernorm)
        x = x + self.attn(y, text, mask)
        return x + self.mlp(self.post_attention_layernorm(x))


class Generator(nn.Module):
    """Base of both generators: bit embedding, text projections and output layer."""

    transformer_blocks: nn.ModuleList

    def __init__(self, cfg: GeneratorConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.gradient_checkpointing = False
        """Recompute the activations of blocks in the backward pass from their inputs."""
        self.x_embedder = nn.Linear(cfg.bits_per_token, cfg.width)
        self.proj_out = nn.Linear(cfg.width, cfg.bits_per_token)

    def text_kv(self, features: Tensor, mask: Tensor) -> TextKV:
        """Project text features to keys and values, once for all steps.

        ``features [layers, B, T, text_width]``, ``mask`` bool ``[B, T]``, true at real tokens. Values at padded positions,
        NaN included, have no effect. UserError for features of another number of layers or width.
        """
        cfg = self.cfg
        if not cfg.reads(len(features), features.shape[-1]):
            raise UserError(
                f"text features have {len(features)} layers of width {features.shape[-1]}, "
                f"expected {cfg.layers if cfg.text_layers == 'each' else 'any'} layers of width {cfg.text_width}"
            )
        # A masked attention weight is 0, but 0 * NaN is NaN, so padded features are set to 0 first.
        read = self._read(features).masked_fill(~mask[None, :, :, None], 0).to(self.x_embedder.weight.dtype)
        blocks = cast(list[GeneratorBlock], list(self.transformer_blocks))
        pairs = [self._run(block.text_kv, f) for block, f in zip(blocks, self._by_block(read), strict=True)]
        return TextKV([k for k, _ in pairs], [v for _, v in pairs], mask)

    def _read(self, features: Tensor) -> Tensor:
        """Return those of the layers ``features [layers, ...]`` that the blocks read."""
        return features[-1:] if self.cfg.text_layers == "last" else features

    def _by_block(self, read: Tensor) -> Tensor:
        """Return the features of each block, ``[blocks, ...]``, of the layers ``read [layers or 1, ...]``."""
        return read.expand(self.cfg.layers, *read.shape[1:])

    def _run(self, function: Callable[..., Any], *given: Any) -> Any:
        """Call the deterministic ``function(*given)``, with gradient checkpointing if enabled."""
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(function, *given, use_reentrant=False, preserve_rng_state=False)
        return function(*given)

    @torch.no_grad()
    def calibrate_text(self, features: Tensor, mask: Tensor, ridge: float = 0.01) -> None:
        """Initialize the text projections to whiten ``features``: uncorrelated outputs with mean 0 and similar variance.

        ``features [layers, B, T, text_width]`` and ``mask [B, T]`` should come from some hundred representative prompts.
        Word order accounts for a small part of the variance of a language model's features; after whitening it has the
        same scale as word identity, so that a generator learns to distinguish "a circle left of a square" from its reverse
        in far fewer steps. ``ridge``, a fraction of the mean variance, limits the scaling of low-variance directions.
        """
        for block, layer in zip(self.transformer_blocks, self._by_block(self._read(features)), strict=True):
            project = cast(GeneratorBlock, block).proj_cond
            tokens = layer[mask].double()
            mean = tokens.mean(0)
            _, scale, directions = torch.linalg.svd(tokens - mean, full_matrices=False)
            variance = scale.square() / len(tokens)
            count = min(len(variance), self.cfg.width)
            whiten = directions[:count] / (variance[:count] + ridge * variance.mean()).sqrt()[:, None]
            # Whitening is invariant to rotation; a random one distributes the directions over the heads.
            rotation, _ = torch.linalg.qr(torch.randn(self.cfg.width, count, dtype=torch.float64))
            weight = rotation.to(whiten.device) @ whiten
            project.weight.copy_(weight)
            project.bias.copy_(-weight @ mean)


class DiffusionGenerator(Generator):
    """Bernoulli diffusion network: predicts from noisy bits and t the logits of the ``target`` of its configuration."""

    def __init__(self, cfg: GeneratorConfig) -> None:
        super().__init__(cfg)
        self.time_embed = TimestepEmbedding(cfg.width, cfg.time_layers)
        self.transformer_blocks = nn.ModuleList([DiffusionBlock(cfg) for _ in range(cfg.layers)])
        self.norm_out = Modulation(cfg.width, 2)
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias) if module.bias is not None else None
                if cfg.zero_init and ("norm1" in name or name in ("norm_out.linear", "proj_out")):
                    nn.init.zeros_(module.weight)

    def modulations(self, t: Tensor) -> Tensor:
        """Return the modulations of all blocks and of the output layer at timesteps ``t [B]``, ``[B, vectors, width]``.

        They depend on nothing else, so all images and both branches of guidance share those of a timestep.
        """
        embedding = self.time_embed(t)
        blocks = cast(list[DiffusionBlock], list(self.transformer_blocks))
        return torch.cat([norm(embedding) for norm in (*(block.norm1 for block in blocks), self.norm_out)], dim=1)

    def _parts(self, modulations: Tensor | None) -> Sequence[Tensor | None]:
        """Split ``modulations`` into those of each block and of the output layer; Nones if there are none."""
        counts = [6] * self.cfg.layers + [2]
        return [None] * len(counts) if modulations is None else modulations.split(counts, dim=1)

    def forward(
        self, z: Tensor, t: Tensor | None, text: TextKV | JointCache, modulations: Tensor | None = None
    ) -> Tensor:
        """Return logits ``[B, L, K]`` for noisy bits ``z [B, L, K]`` (0/1) at timesteps ``t [B]`` in [0, 1] (1: noise).

        With a :class:`JointCache` the image's keys and values are written to the cache: same result, without gradients.
        With ``modulations`` of :meth:`modulations`, ``t`` is not used.
        """
        # Under autocast the residual stream would else be bfloat16, which loses terms below 1/256 of a sum.
        x = self.x_embedder(z).to(z.dtype)
        embedding = self.time_embed(t) if modulations is None else None
        *given, output = self._parts(modulations)
        image = text.mask.new_ones(1, x.shape[1]).expand(len(x), -1)
        mask = torch.cat((text.mask, image), dim=1)[:, None, None]
        for i, block in enumerate(self.transformer_blocks):
            x = self._run(block, x, embedding, given[i], text.of_block(i), mask)
        output = self.norm_out(embedding) if output is None else output
        scale, shift = output[:, :, None].unbind(1)
        return self.proj_out(modulated_norm(x, scale, shift))


class ARGenerator(Generator):
    """Autoregressive network: position i predicts the bits of token i from the text and the preceding tokens."""

    def __init__(self, cfg: GeneratorConfig) -> None:
        super().__init__(cfg)
        self.split_token = nn.Parameter(torch.randn(1, 1, cfg.width) * 0.02)
        if cfg.unused_time_embed:
            # Frozen: DistributedDataParallel would wait for gradients that never come.
            self.time_embed = TimestepEmbedding(cfg.width).requires_grad_(False)
        self.transformer_blocks = nn.ModuleList([ARBlock(cfg) for _ in range(cfg.layers)])
        self.norm_out = NORMS[cfg.norm](cfg.width)
        self.bit_head = BitHead(cfg.width, cfg.bits_per_token, cfg.bit_head_width) if cfg.bit_head_width else None

    def forward(self, z: Tensor | None, text: TextKV, bits: Tensor | None = None) -> Tensor:
        """Return logits ``[B, n + 1, K]`` given the bits of the first ``n`` tokens, ``z [B, n, K]`` (None: n = 0).

        With a bit head, whose logits depend on a token's own bits, these must be given: ``bits [B, n + 1, K]``.
        """
        x = self.hidden(z, text)
        logits: Tensor = self.proj_out(x)
        if self.bit_head is None:
            return logits
        assert bits is not None
        return self.bit_head(logits, x, bits)

    def hidden(self, z: Tensor | None, text: TextKV) -> Tensor:
        """Return the hidden states ``[B, n + 1, width]`` that :meth:`forward` computes logits from."""
        x = self.split_token.expand(len(text), -1, -1)
        if z is not None:
            x = torch.cat((x, self.x_embedder(z)), dim=1).to(z.dtype)
        count = x.shape[1]
        # Visible keys: all real text tokens, and image positions up to the query's.
        causal = torch.ones(count, count, dtype=torch.bool, device=x.device).tril()
        seen_text = text.mask[:, None, None].expand(-1, -1, count, -1)
        mask = torch.cat((seen_text, causal.expand(len(x), 1, -1, -1)), dim=-1)
        for i, block in enumerate(self.transformer_blocks):
            x = self._run(block, x, text.of_block(i), mask)
        return self.norm_out(x)

    def outputs(self, x: Tensor) -> Tensor:
        """Return what a token is drawn from, ``[B, K + bit_head_width]``, of hidden states ``[B, width]``.

        Logits of independent bits, and the context of the bit head.
        """
        logits: Tensor = self.proj_out(x)
        return logits if self.bit_head is None else torch.cat((logits, self.bit_head.context(x)), dim=-1)

    def step(self, previous: Tensor, position: Tensor, cache: JointCache) -> Tensor:
        """Return :meth:`outputs` of token ``position [B]``, given the bits ``previous [B, K]`` of the preceding token.

        Updates ``cache``, which holds the text and the preceding tokens. Rows may be at different positions; at position 0
        the split token replaces ``previous``. Equals :meth:`hidden` on the whole prefix.
        """
        first = (position == 0)[:, None, None]
        x = torch.where(first, self.split_token, self.x_embedder(previous)[:, None])
        seen = torch.arange(self.cfg.num_tokens, device=x.device) <= position[:, None]
        mask = torch.cat((cache.mask, seen), dim=1)[:, None, None]
        for i, module in enumerate(self.transformer_blocks):
            assert isinstance(module, ARBlock)
            x, y = module.placed(x, module.pos_emb[0, position][:, None], module.input_layernorm)
            keys, values = cache.write(i, position, *module.attn.key_value(y))
            x = x + module.attn.attend_token(module.attn.query(y), keys, values, mask)
            x = x + module.mlp(module.post_attention_layernorm(x))
        return self.outputs(self.norm_out(x)[:, 0])


def build_generator(cfg: GeneratorConfig) -> DiffusionGenerator | ARGenerator:
    """Build the generator of ``cfg.kind``."""
    return DiffusionGenerator(cfg) if cfg.kind == "diffusion" else ARGenerator(cfg)
