"""Samplers as pure functions of tensors: one step in, one step out.

Everything a request may choose is a tensor with one value a row, so rows of different requests, at different points
of different schedules, share a batch. The server's engine, the bulk job and the training previews all call these.

Exponentials are taken in float64 and rounded once: vectorised float32 ones give another last digit where a row falls
into the remainder of a vector, so that its bits could depend on its place in the batch. All else here is exact
elementwise arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from ..config import Config
from ..errors import UserError
from . import rng
from .diffusion import noise_probability, per_row
from .generator import ARGenerator, DiffusionGenerator
from .joint_attention import JointCache, TextKV

SAMPLERS = {"posterior": 0, "simplified": 1}
"""``posterior`` is the paper's Alg. 1, ``simplified`` its Alg. 2."""

Sampler = Literal["posterior", "simplified"]
Guidance = Annotated[float, Field(allow_inf_nan=False)]
Temperature = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class SamplingConfig(Config):
    """The fields of :class:`SamplingParams` but the seed, with the same defaults."""

    num_inference_steps: int = Field(20, ge=1)
    guidance_scale: Guidance = 7.5
    """The paper's alpha; 0 is without guidance."""
    temperature: Temperature = 1.0
    """0 is greedy."""
    rho: float = Field(1.0, gt=0, allow_inf_nan=False)
    """Exponent of the time grid."""
    sampler: Sampler = "simplified"
    """``posterior`` is the paper's Alg. 1, ``simplified`` its Alg. 2."""
    final_draw: bool = False
    """Draw the last step's bits (the paper) in place of a threshold at 0.5 (the release)."""


Uniforms = Callable[[int], Tensor] | Tensor | None
OnStep = Callable[[int, Tensor, Tensor], None]


@dataclass(frozen=True)
class SamplingParams:
    """What each row of a batch asked for; every field is a tensor ``[B]``."""

    seed: Tensor
    num_inference_steps: Tensor
    guidance_scale: Tensor
    """The paper's alpha: ``(1 + alpha) conditional - alpha unconditional``; 0 is conditional only."""
    temperature: Tensor
    """The paper's tau. 0 is greedy: predictions become hard decisions, without a division."""
    rho: Tensor
    """Exponent of the time grid ``t_i = (1 - i / S)^rho``."""
    sampler: Tensor
    """A value of :data:`SAMPLERS`."""
    final_draw: Tensor
    """True: the last step draws bits (the paper); false: it thresholds at 0.5 (the published sampler)."""

    @classmethod
    def of(
        cls,
        batch: int,
        *,
        seed: int | Sequence[int] | Tensor = 0,
        num_inference_steps: int | Sequence[int] | Tensor = 20,
        guidance_scale: float | Sequence[float] | Tensor = 7.5,
        temperature: float | Sequence[float] | Tensor = 1.0,
        rho: float | Sequence[float] | Tensor = 1.0,
        sampler: str | Sequence[str] | Tensor = "simplified",
        final_draw: bool | Sequence[bool] | Tensor = False,
    ) -> SamplingParams:
        """Parameters of ``batch`` rows from single values (shared) or one value a row.

        UserError names the field whose values are out of range, or not one a row.
        """

        def rows(name: str, value: Any, dtype: torch.dtype, expected: str, valid: Callable[[Tensor], Tensor]) -> Tensor:
            try:
                tensor = torch.as_tensor(value, dtype=dtype)
                tensor = tensor.expand(batch).clone() if tensor.ndim == 0 else tensor
            except (RuntimeError, OverflowError, TypeError, ValueError):
                raise UserError(f"{name} = {value}: expected {expected}") from None
            if tensor.shape != (batch,):
                raise UserError(f"{name}: expected one value or {batch}, got {len(tensor)}")
            if not valid(tensor).all():
                raise UserError(f"{name} = {value}: expected {expected}")
            return tensor

        if not isinstance(sampler, Tensor):
            names = [sampler] if isinstance(sampler, str) else list(sampler)
            if unknown := [name for name in names if name not in SAMPLERS]:
                raise UserError(f"sampler = {unknown[0]}: expected one of {', '.join(SAMPLERS)}")
            numbers = [SAMPLERS[name] for name in names]
            sampler = torch.tensor(numbers[0] if isinstance(sampler, str) else numbers)
        return cls(
            rows("seed", seed, torch.int64, "integers of 64 bits", torch.ones_like),
            rows("num_inference_steps", num_inference_steps, torch.int64, "at least 1", lambda v: v >= 1),
            rows("guidance_scale", guidance_scale, torch.float32, "finite numbers", torch.isfinite),
            rows("temperature", temperature, torch.float32, "at least 0", lambda v: (v >= 0) & v.isfinite()),
            rows("rho", rho, torch.float32, "more than 0", lambda v: (v > 0) & v.isfinite()),
            rows("sampler", sampler, torch.int64, "a value of SAMPLERS", lambda v: (v >= 0) & (v < len(SAMPLERS))),
            rows("final_draw", final_draw, torch.bool, "true or false", torch.ones_like),
        )

    def __len__(self) -> int:
        return len(self.seed)

    def map(self, function: Callable[[Tensor], Tensor]) -> SamplingParams:
        """Every field through ``function``: indexing rows, moving to a device."""
        return SamplingParams(*[function(getattr(self, field.name)) for field in fields(self)])


def timestep(step: Tensor, params: SamplingParams) -> Tensor:
    """Time ``[B]`` at which each row's network call ``step [B]`` happens: 1 at step 0, 0 after the last."""
    left = (1 - step.double() / params.num_inference_steps).clamp(min=0)
    return (left**params.rho).float()


def guided_probability(cond: Tensor, uncond: Tensor, params: SamplingParams) -> Tensor:
    """Eq. 6 and 8: ``sigma(((1 + alpha) cond - alpha uncond) / tau)``, for logits ``[B, ...]``.

    At temperature 0 it is the hard decision ``logit > 0``, exactly; a logit of exactly 0 decides for 0.
    """
    scale, temperature = per_row(params.guidance_scale, cond), per_row(params.temperature, cond)
    logits = (1 + scale) * cond - scale * uncond
    greedy = temperature == 0
    soft = (logits / torch.where(greedy, torch.ones_like(temperature), temperature)).double().sigmoid().float()
    return torch.where(greedy, (logits > 0).float(), soft)


def transition_probability(z: Tensor, x0_prob: Tensor, t: Tensor, s: Tensor, sampler: Tensor) -> Tensor:
    """``P(z_s = 1)`` for bits ``z`` at time t, given ``x0_prob = P(z_0 = 1)``, both ``[B, L, K]``; s < t.

    ``simplified`` (Alg. 2) noises the prediction to time s. ``posterior`` (Alg. 1) also weighs in where the bit is
    now, with the chance ``(t - s) / 2`` that it flipped on the way from s to t.

    That chance is the published sampler's plain difference. Under the process's own noise schedule it would be
    ``(t - s) / (2 (1 - s))``, so Alg. 1 is Bayes' rule for a chain that flips a little less than the forward one.
    """
    forward_1 = noise_probability(x0_prob, s)
    forward_0 = noise_probability(1 - x0_prob, s)
    gap = per_row(t - s, z)
    backward_1 = z - gap * (z - 0.5)
    backward_0 = (1 - z) - gap * ((1 - z) - 0.5)
    joint_1, joint_0 = forward_1 * backward_1, forward_0 * backward_0
    total = joint_1 + joint_0
    # Both joints vanish when s and t underflow to 0 (a large rho) and the prediction contradicts z: believe it then.
    weighs = (per_row(sampler, z) == SAMPLERS["posterior"]) & (total > 0)
    return torch.where(weighs, joint_1 / total, forward_1)


def diffusion_step(
    z: Tensor, cond: Tensor, uncond: Tensor, step: Tensor, params: SamplingParams, u: Tensor
) -> tuple[Tensor, Tensor]:
    """One denoising step of every row: the next bits and the current estimate ``P(z_0 = 1)``, both ``[B, L, K]``.

    ``z`` float 0/1; ``cond`` and ``uncond`` are the network's outputs (flip logits) at ``timestep(step)``; ``u`` are
    the uniforms of draw ``step + 1``. A row's last step (``step = num_inference_steps - 1``) gives its final bits.
    Rows beyond their last step are the caller's to leave alone.
    """
    flip = guided_probability(cond, uncond, params)
    x0_prob = z * (1 - flip) + (1 - z) * flip
    drawn = u < transition_probability(z, x0_prob, timestep(step, params), timestep(step + 1, params), params.sampler)
    final = torch.where(per_row(params.final_draw, z), u < x0_prob, x0_prob > 0.5)
    last = per_row(step + 1 >= params.num_inference_steps, z)
    return torch.where(last, final, drawn).to(z.dtype), x0_prob


def ar_step(cond: Tensor, uncond: Tensor, params: SamplingParams, u: Tensor) -> Tensor:
    """Eq. 8: bits ``[B, K]``, float 0/1, of the next token of every row from logits and uniforms ``[B, K]``."""
    return (u < guided_probability(cond, uncond, params)).to(cond.dtype)


@torch.no_grad()
def generate_diffusion(
    model: DiffusionGenerator,
    cond: TextKV,
    uncond: TextKV,
    params: SamplingParams,
    *,
    uniforms: Uniforms = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """Codes, uint8 ``[B, L, K]``, for ``B = len(params)`` prompts; ``uncond`` may be a single row.

    ``uniforms`` replays draws (0 is the initial noise, k the draw after step k - 1) in place of the counter-based
    ones, as a function of the draw or a tensor ``[draws, B, L, K]``; the last one, of the final draw, may be missing
    where no row asks for it. ``on_step(step, z, x0_prob)`` is called after every step. Rows may differ in their
    number of steps: one that is done keeps its bits (and has them as its x0_prob) while the others go on.
    """
    batch, cfg = len(params), model.cfg
    params = params.map(lambda value: value.to(model.x_embedder.weight.device))
    steps = int(params.num_inference_steps.max())
    needed = steps + int(params.final_draw.any())
    draw = _drawer(uniforms, needed, params, cfg.num_tokens, cfg.bits_per_token, rng.DIFFUSION)
    text = JointCache.of(_with_unconditional(cond, uncond, batch), cfg.num_tokens)
    z = (draw(0) < 0.5).to(model.x_embedder.weight.dtype)
    for index in range(steps):
        step = torch.full((batch,), index, device=z.device)
        t = timestep(step, params).to(z.dtype)
        out = model(torch.cat((z, z)), torch.cat((t, t)), text)
        after, x0_prob = diffusion_step(z, out[:batch], out[batch:], step, params, draw(index + 1))
        goes_on = per_row(index < params.num_inference_steps, z)
        z, x0_prob = torch.where(goes_on, after, z), torch.where(goes_on, x0_prob, z)
        if on_step is not None:
            on_step(index, z, x0_prob)
    return z.to(torch.uint8)


@torch.no_grad()
def generate_ar(
    model: ARGenerator,
    cond: TextKV,
    uncond: TextKV,
    params: SamplingParams,
    *,
    uniforms: Uniforms = None,
    on_step: OnStep | None = None,
    use_cache: bool = True,
) -> Tensor:
    """Codes, uint8 ``[B, L, K]``, token by token.

    Arguments as in :func:`generate_diffusion`, but draw i is that of token i: a tensor is ``[L, B, K]``. Step
    counts, rho, sampler and final_draw have no meaning here. ``on_step(token, z, p)`` sees all bits so far and the
    probabilities ``[B, K]`` that the token's were drawn from. ``use_cache=False`` recomputes the whole prefix for
    every token, with the same result.
    """
    batch, cfg = len(params), model.cfg
    params = params.map(lambda value: value.to(model.x_embedder.weight.device))
    draw = _drawer(uniforms, cfg.num_tokens, params, 1, cfg.bits_per_token, rng.AR)
    text = _with_unconditional(cond, uncond, batch)
    z = model.x_embedder.weight.new_zeros(batch, cfg.num_tokens, cfg.bits_per_token)
    cache = JointCache.of(text, cfg.num_tokens) if use_cache else None
    for index in range(cfg.num_tokens):
        doubled = torch.cat((z, z))
        if cache is not None:
            position = torch.full((2 * batch,), index, device=z.device)
            out = model.step(doubled[:, max(index - 1, 0)], position, cache)
        else:
            out = model(doubled[:, :index] if index else None, text)[:, -1]
        z[:, index] = ar_step(out[:batch], out[batch:], params, draw(index).reshape(batch, -1))
        if on_step is not None:
            on_step(index, z, guided_probability(out[:batch], out[batch:], params))
    return z.to(torch.uint8)


def generate(
    model: DiffusionGenerator | ARGenerator,
    cond: TextKV,
    uncond: TextKV,
    params: SamplingParams,
    *,
    uniforms: Uniforms = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """Codes, uint8 ``[B, L, K]``, with the sampler of the model's kind."""
    if isinstance(model, ARGenerator):
        return generate_ar(model, cond, uncond, params, uniforms=uniforms, on_step=on_step)
    return generate_diffusion(model, cond, uncond, params, uniforms=uniforms, on_step=on_step)


def _drawer(
    given: Uniforms, needed: int, params: SamplingParams, tokens: int, bits: int, stream: int
) -> Callable[[int], Tensor]:
    if isinstance(given, Tensor):
        if len(given) < needed:
            raise UserError(f"uniforms for replay: expected {needed} draws, got {len(given)}")
        # The draw after a last step that thresholds is never looked at, and recordings don't hold it.
        return lambda index: given[min(index, len(given) - 1)]
    if given is not None:
        return given
    return lambda index: rng.uniforms(params.seed, torch.full_like(params.seed, index), tokens, bits, stream=stream)


def _with_unconditional(cond: TextKV, uncond: TextKV, batch: int) -> TextKV:
    return TextKV.cat([cond, uncond if len(uncond) == batch else uncond.expand(batch)])
