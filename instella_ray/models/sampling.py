"""Diffusion (Alg. 1 and 2, and the exact reverse process) and AR samplers as pure functions of tensors.

All sampling parameters are tensors with one value per row, so that rows of different requests, at different steps of
different schedules, share a batch. The server's engine, the bulk job and the training previews use these functions.

Exponentials are computed in float64 and rounded once: the last digit of a vectorized float32 exponential depends on
whether a row falls into the remainder of a vector, so a row's bits could depend on its position in the batch. All other
operations are exact elementwise arithmetic.
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
from .bit_head import BitHead
from .diffusion import Target, noise_probability, per_row, x0_probability
from .generator import ARGenerator, DiffusionGenerator
from .joint_attention import JointCache, TextKV

SAMPLERS = {"posterior_release": 0, "simplified": 1, "posterior": 2, "ancestral": 3}
"""Numbers of the samplers, which :func:`transition_probability` describes."""

Sampler = Literal["simplified", "ancestral", "posterior", "posterior_release"]
Guidance = Annotated[float, Field(allow_inf_nan=False)]
Redraw = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Temperature = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class SamplingConfig(Config):
    """Sampling settings: the fields of :class:`SamplingParams` without the seed, with the same defaults."""

    num_inference_steps: int = Field(20, ge=1)
    guidance_scale: Guidance = 7.5
    """Classifier-free guidance scale, the paper's alpha; 0 disables guidance."""
    temperature: Temperature = 1.0
    """Sampling temperature; 0 is greedy."""
    rho: float = Field(1.0, gt=0, allow_inf_nan=False)
    """Exponent of the timestep grid."""
    sampler: Sampler = "simplified"
    """``simplified`` is the paper's Alg. 2, ``posterior`` its Alg. 1, ``posterior_release`` Alg. 1 as published,
    ``ancestral`` the reverse of the noise process."""
    redraw: Redraw = 0.0
    """Share of bits that each step draws anew, as ``simplified`` does with all; between 0 and 1."""
    final_draw: bool = False
    """Sample the bits of the last step (the paper) instead of thresholding at 0.5 (the release)."""


Uniforms = Callable[[int], Tensor] | Tensor | None
OnStep = Callable[[int, Tensor, Tensor], None]


@dataclass(frozen=True)
class SamplingParams:
    """Sampling parameters of each row of a batch; every field is a tensor ``[B]``."""

    seed: Tensor
    num_inference_steps: Tensor
    guidance_scale: Tensor
    """The paper's alpha: ``(1 + alpha) conditional - alpha unconditional``; 0 is conditional only."""
    temperature: Tensor
    """The paper's tau. 0 is greedy: logits are thresholded, without a division."""
    rho: Tensor
    """Exponent of the timestep grid ``t_i = (1 - i / S)^rho``."""
    sampler: Tensor
    """A value of :data:`SAMPLERS`."""
    redraw: Tensor
    """Share of bits that each step draws anew, as ``simplified`` does with all."""
    final_draw: Tensor
    """True: the last step samples bits (the paper); false: it thresholds at 0.5 (the published sampler)."""

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
        redraw: float | Sequence[float] | Tensor = 0.0,
        final_draw: bool | Sequence[bool] | Tensor = False,
    ) -> SamplingParams:
        """Build the parameters of ``batch`` rows from single values (shared) or one value per row.

        UserError names the field whose values are out of range or of the wrong number.
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
            rows("seed", seed, torch.int64, "64-bit integers", torch.ones_like),
            rows("num_inference_steps", num_inference_steps, torch.int64, "at least 1", lambda v: v >= 1),
            rows("guidance_scale", guidance_scale, torch.float32, "finite numbers", torch.isfinite),
            rows("temperature", temperature, torch.float32, "at least 0", lambda v: (v >= 0) & v.isfinite()),
            rows("rho", rho, torch.float32, "more than 0", lambda v: (v > 0) & v.isfinite()),
            rows("sampler", sampler, torch.int64, "a value of SAMPLERS", lambda v: (v >= 0) & (v < len(SAMPLERS))),
            rows("redraw", redraw, torch.float32, "0 to 1", lambda v: (v >= 0) & (v <= 1)),
            rows("final_draw", final_draw, torch.bool, "true or false", torch.ones_like),
        )

    def __len__(self) -> int:
        return len(self.seed)

    def numbers(self) -> dict[str, float]:
        """Return the parameters of the only row as numbers, by field."""
        return {field.name: getattr(self, field.name).item() for field in fields(self)}

    def map(self, function: Callable[[Tensor], Tensor]) -> SamplingParams:
        """Apply ``function`` to every field, for example to index rows or to move to a device."""
        return SamplingParams(*[function(getattr(self, field.name)) for field in fields(self)])


def timestep(step: Tensor, params: SamplingParams) -> Tensor:
    """Return the timestep ``[B]`` of each row's network call ``step [B]``: 1 at step 0, 0 after the last step."""
    return grid_time(step, params.num_inference_steps, params.rho)


def grid_time(step: Tensor, num_inference_steps: Tensor, rho: Tensor) -> Tensor:
    """Return ``(1 - step / num_inference_steps)^rho``, float32 ``[B]``, 0 after the last step; all arguments ``[B]``."""
    left = (1 - step.double() / num_inference_steps).clamp(min=0)
    return (left**rho).float()


def guided_probability(cond: Tensor, uncond: Tensor | None, params: SamplingParams) -> Tensor:
    """Return ``sigma(((1 + alpha) cond - alpha uncond) / tau)`` for logits ``[B, ...]`` (Eq. 6 and 8).

    Without ``uncond`` every alpha must be 0. At temperature 0 the result is exactly ``logit > 0``, so 0 for a logit of
    exactly 0.
    """
    scale, temperature = per_row(params.guidance_scale, cond), per_row(params.temperature, cond)
    logits = cond if uncond is None else (1 + scale) * cond - scale * uncond
    greedy = temperature == 0
    soft = (logits / torch.where(greedy, torch.ones_like(temperature), temperature)).double().sigmoid().float()
    return torch.where(greedy, (logits > 0).float(), soft)


def transition_probability(
    z: Tensor, x0_prob: Tensor, t: Tensor, s: Tensor, sampler: Tensor, redraw: Tensor | None = None
) -> Tensor:
    """Return ``P(z_s = 1)`` for bits ``z`` at time t, given ``x0_prob = P(z_0 = 1 | z)``, both ``[B, L, K]``; s < t.

    A bit flips from s to t with probability ``q = (t - s) / (2 (1 - s))``, so that Eq. 5 holds at both.

    - ``simplified`` (Alg. 2): the prediction with noise up to s, ``B(0.5 s + (1 - s) x0_prob)``.
    - ``posterior`` (Alg. 1, with Eq. 8 of Wang et al. 2023a): that times ``P(z | z_s)``, normalised. As the prediction knows
      z, this counts it twice, and so follows the noise.
    - ``posterior_release``: the same with ``q = (t - s) / 2``, as published.
    - ``ancestral``: ``sum over z_0 of P(z_0 | z) P(z_s | z, z_0)``, the reverse of the noise process.

    ``redraw [B]`` is the share of bits that are drawn as by ``simplified``: without a memory of z, which corrects the
    network's errors.
    """
    predicted_1 = noise_probability(x0_prob, s)
    t, s, sampler = per_row(t, z), per_row(s, z), per_row(sampler, z)
    predicted_0 = noise_probability(1 - x0_prob, s)
    # Twice the flip probability. At a tiny rho both times may round to 1: no flip, and no division by 0.
    smallest = torch.finfo(s.dtype).tiny
    gap = torch.where(sampler == SAMPLERS["posterior_release"], t - s, (t - s) / (1 - s).clamp(min=smallest))
    likelihood_1 = z - gap * (z - 0.5)
    opposite = 1 - z
    likelihood_0 = opposite - gap * (opposite - 0.5)
    posterior = _normalized(predicted_1 * likelihood_1, predicted_0 * likelihood_0, predicted_1)
    flipped = s / 2
    kept = 1 - flipped
    kept_1, kept_0 = kept * likelihood_1, kept * likelihood_0
    left_1, left_0 = flipped * likelihood_1, flipped * likelihood_0
    if_1, if_0 = _normalized(kept_1, left_0, predicted_1), _normalized(left_1, kept_0, predicted_1)
    ancestral = x0_prob * if_1 + (1 - x0_prob) * if_0
    remembering = torch.where(sampler == SAMPLERS["ancestral"], ancestral, posterior)
    if redraw is not None:
        share = per_row(redraw, z)
        remembering = share * predicted_1 + (1 - share) * remembering
    return torch.where(sampler == SAMPLERS["simplified"], predicted_1, remembering)


def _normalized(one: Tensor, zero: Tensor, otherwise: Tensor) -> Tensor:
    """Return ``one / (one + zero)``.

    Both are 0 if s and t underflow to 0 (a large rho) and z contradicts the prediction, ``otherwise``, which then counts.
    """
    total = one + zero
    return torch.where(total > 0, one / total, otherwise)


def diffusion_step(
    z: Tensor,
    cond: Tensor,
    uncond: Tensor | None,
    step: Tensor,
    params: SamplingParams,
    u: Tensor,
    target: Target = "flip",
    *,
    simplified: bool = False,
) -> tuple[Tensor, Tensor]:
    """Run one denoising step of every row; returns the next bits and the estimate ``P(z_0 = 1)``, both ``[B, L, K]``.

    ``z`` is float 0/1; ``cond`` and ``uncond`` are the network's outputs (logits of ``target``) at ``timestep(step)``, the
    latter None if no row has guidance; ``u`` are the uniforms of draw ``step + 1``. A row's last step (``step =
    num_inference_steps - 1``) gives its final bits. The caller must discard results of rows beyond their last step.
    ``simplified`` says that this is the sampler of all rows, which spares most operations.
    """
    x0_prob = x0_probability(guided_probability(cond, uncond, params), z, target)
    s = timestep(step + 1, params)
    if simplified:
        probability = noise_probability(x0_prob, s)
    else:
        probability = transition_probability(z, x0_prob, timestep(step, params), s, params.sampler, params.redraw)
    drawn = u < probability
    final = torch.where(per_row(params.final_draw, z), u < x0_prob, x0_prob > 0.5)
    last = per_row(step + 1 >= params.num_inference_steps, z)
    return torch.where(last, final, drawn).to(z.dtype), x0_prob


def ar_step(
    cond: Tensor, uncond: Tensor | None, params: SamplingParams, u: Tensor, head: BitHead | None = None
) -> tuple[Tensor, Tensor]:
    """Sample the next token's bits, float 0/1, and return them with their probabilities, both ``[B, K]`` (Eq. 8).

    ``cond`` and ``uncond`` are :meth:`.generator.ARGenerator.outputs`; ``u [B, K]`` are uniforms. With a bit head each
    bit's probability is that given the bits drawn before it.
    """
    if head is None:
        probability = guided_probability(cond, uncond, params)
        return (u < probability).to(cond.dtype), probability
    count = u.shape[-1]
    outputs = torch.stack([cond] if uncond is None else [cond, uncond]).float()
    logits, state = outputs[..., :count], outputs[..., count:]
    bits, probabilities = [], []
    for bit in range(count):
        probability = guided_probability(*_branches(head.logit(bit, logits, state)), params)
        bits.append((u[:, bit] < probability).float())
        probabilities.append(probability)
        state = head.given(bit, state, bits[-1])
    return torch.stack(bits, dim=1).to(cond.dtype), torch.stack(probabilities, dim=1)


def _branches(logits: Tensor) -> tuple[Tensor, Tensor | None]:
    """Split ``[branches, B]`` into the logits with and without a prompt."""
    return logits[0], logits[1] if len(logits) > 1 else None


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
    """Generate codes, uint8 ``[B, L, K]``, for ``B = len(params)`` prompts; ``uncond`` may be a single row.

    ``uniforms`` replaces the counter-based draws (0 is the initial noise, k the draw after step k - 1) by a function of
    the draw's index or a tensor ``[draws, B, L, K]``, whose last draw may be missing unless a row has ``final_draw``.
    ``on_step(step, z, x0_prob)`` is called after every step. Rows may have different numbers of steps: the bits of a
    finished row stay unchanged, and are also its x0_prob. UserError if ``uniforms`` has too few draws.
    """
    batch, cfg = len(params), model.cfg
    params = params.map(lambda value: value.to(model.x_embedder.weight.device))
    steps = int(params.num_inference_steps.max())
    needed = steps + int(params.final_draw.any())
    draw = _draw_function(uniforms, needed, params, cfg.num_tokens, cfg.bits_per_token, rng.DIFFUSION)
    text = JointCache.of(_with_unconditional(cond, uncond, batch), cfg.num_tokens)
    z = (draw(0) < 0.5).to(model.x_embedder.weight.dtype)
    for index in range(steps):
        step = torch.full((batch,), index, device=z.device)
        t = timestep(step, params).to(z.dtype)
        out = model(torch.cat((z, z)), torch.cat((t, t)), text)
        next_z, x0_prob = diffusion_step(z, out[:batch], out[batch:], step, params, draw(index + 1), cfg.target)
        unfinished = per_row(index < params.num_inference_steps, z)
        z, x0_prob = torch.where(unfinished, next_z, z), torch.where(unfinished, x0_prob, z)
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
    """Generate codes, uint8 ``[B, L, K]``, token by token.

    Arguments as in :func:`generate_diffusion`, but draw i belongs to token i: a tensor is ``[L, B, K]``. Step counts, rho,
    sampler and final_draw are ignored. ``on_step(token, z, p)`` receives all bits so far and the token's bit
    probabilities ``[B, K]``. ``use_cache=False`` recomputes the whole prefix for every token, with the same result.
    """
    batch, cfg = len(params), model.cfg
    params = params.map(lambda value: value.to(model.x_embedder.weight.device))
    draw = _draw_function(uniforms, cfg.num_tokens, params, 1, cfg.bits_per_token, rng.AR)
    text = _with_unconditional(cond, uncond, batch)
    z = model.x_embedder.weight.new_zeros(batch, cfg.num_tokens, cfg.bits_per_token)
    cache = JointCache.of(text, cfg.num_tokens) if use_cache else None
    for index in range(cfg.num_tokens):
        doubled = torch.cat((z, z))
        if cache is not None:
            position = torch.full((2 * batch,), index, device=z.device)
            out = model.step(doubled[:, max(index - 1, 0)], position, cache)
        else:
            out = model.outputs(model.hidden(doubled[:, :index] if index else None, text)[:, -1])
        u = draw(index).reshape(batch, -1)
        z[:, index], probability = ar_step(out[:batch], out[batch:], params, u, model.bit_head)
        if on_step is not None:
            on_step(index, z, probability)
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
    """Generate codes, uint8 ``[B, L, K]``, with the sampler of the model's kind."""
    if isinstance(model, ARGenerator):
        return generate_ar(model, cond, uncond, params, uniforms=uniforms, on_step=on_step)
    return generate_diffusion(model, cond, uncond, params, uniforms=uniforms, on_step=on_step)


def _draw_function(
    given: Uniforms, needed: int, params: SamplingParams, tokens: int, bits: int, stream: int
) -> Callable[[int], Tensor]:
    """Return the function from a draw's index to its uniforms; UserError if the tensor ``given`` has too few draws."""
    if isinstance(given, Tensor):
        if len(given) < needed:
            raise UserError(f"uniforms for replay: expected {needed} draws, got {len(given)}")
        # A last step that thresholds does not use its draw, and recordings omit it.
        return lambda index: given[min(index, len(given) - 1)]
    if given is not None:
        return given
    return lambda index: rng.uniforms(params.seed, torch.full_like(params.seed, index), tokens, bits, stream=stream)


def _with_unconditional(cond: TextKV, uncond: TextKV, batch: int) -> TextKV:
    return TextKV.cat([cond, uncond if len(uncond) == batch else uncond.expand(batch)])
