"""Slots of diffusion and AR generators, and the engine of either."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch import Tensor

from ..accelerator import sampling_on
from ..models import rng
from ..models.eight_bit import quantize
from ..models.generator import ARGenerator, DiffusionGenerator
from ..models.joint_attention import JointCache
from ..models.sampling import SamplingParams, ar_step, diffusion_step
from .draws import Draws
from .engine import Clock, StepEngine
from .modulations import Schedule, ScheduleModulations
from .slots import EngineOptions, Slots


class DiffusionSlots(Slots):
    """Slots of a diffusion generator: each row has its own schedule and time step."""

    def __init__(self, model: DiffusionGenerator, empty_prompt: Tensor, options: EngineOptions) -> None:
        self.model: DiffusionGenerator = model
        super().__init__(model, empty_prompt, options)
        self.modulations = ScheduleModulations(model, self.count)
        self.x0_prob = torch.zeros(self.z.shape, device=self.device)
        self.draws = Draws(self.params.seed, model.cfg.num_tokens, model.cfg.bits_per_token, rng.DIFFUSION)

    def steps(self, params: SamplingParams) -> int:
        return int(params.num_inference_steps[0])

    def estimate(self, slot: int) -> Tensor:
        return self.x0_prob[slot] > 0.5

    def _row_tables(self) -> list[Tensor]:
        return [self.x0_prob, *super()._row_tables()]

    def _load(self, schedules: Sequence[Schedule]) -> None:
        self.modulations.load(schedules)

    def _start(self, slot: int) -> None:
        self.z[slot] = self.draws.start(slot) < 0.5

    def _inputs(self, slots: slice) -> tuple[Tensor, ...]:
        return self.z[slots], self.modulations.table[slots]

    def _network(self, branches: int, cache: JointCache, *inputs: Tensor) -> Tensor:
        z, modulations = (rows.repeat_interleave(branches, dim=0) for rows in inputs)
        return self.model(z, None, cache, modulations)

    def _draw(self, rows: int) -> Tensor:
        return self.position[:rows] + 1

    def _sample(self, rows: int, cond: Tensor, uncond: Tensor | None = None) -> None:
        params, u = self.params.map(lambda value: value[:rows]), self.draws.take(self._draw(rows))
        position, z = self.position[:rows], self.z[:rows]
        self.z[:rows], self.x0_prob[:rows] = diffusion_step(z, cond, uncond, position, params, u, self.model.cfg.target)


class ARSlots(Slots):
    """Slots of an autoregressive generator: each row is at its own token; slots hold the KV cache."""

    def __init__(self, model: ARGenerator, empty_prompt: Tensor, options: EngineOptions) -> None:
        self.model: ARGenerator = model
        super().__init__(model, empty_prompt, options)
        self.index = torch.arange(self.count, device=self.device)
        self.draws = Draws(self.params.seed, 1, model.cfg.bits_per_token, rng.AR)

    def steps(self, params: SamplingParams) -> int:
        return self.z.shape[1]

    def estimate(self, slot: int) -> Tensor:
        return self.z[slot]

    def _load(self, schedules: Sequence[Schedule]) -> None:
        """Do nothing: the network reads the tables of the slots."""

    def _start(self, slot: int) -> None:
        self.draws.start(slot)
        # Positions after the current one are masked, so the slot's previous keys and values need no clearing.
        self.z[slot] = 0

    def _inputs(self, slots: slice) -> tuple[Tensor, ...]:
        return self.z[slots], self._draw(slots.stop)[slots], self.index[: slots.stop - slots.start]

    def _network(self, branches: int, cache: JointCache, *inputs: Tensor) -> Tensor:
        z, position, index = inputs
        previous = z[index, (position - 1).clamp(min=0)]
        doubled = previous.repeat_interleave(branches, dim=0), position.repeat_interleave(branches)
        return self.model.step(*doubled, cache)

    def _draw(self, rows: int) -> Tensor:
        # Positions of unoccupied slots may exceed the last token; clamping keeps their unused rows valid.
        return self.position[:rows].clamp(max=self.z.shape[1] - 1)

    def _sample(self, rows: int, cond: Tensor, uncond: Tensor | None = None) -> None:
        token, params = self._draw(rows), self.params.map(lambda value: value[:rows])
        bits, _ = ar_step(cond, uncond, params, self.draws.take(token)[:, 0], self.model.bit_head)
        self.z[self.index[:rows], token] = bits.to(self.z.dtype)


def build_engine(
    model: DiffusionGenerator | ARGenerator,
    empty_prompt: Tensor,
    options: EngineOptions | None = None,
    *,
    clock: Clock = time.monotonic,
) -> StepEngine:
    """Build the engine for the kind of ``model``; ``empty_prompt [layers, T, width]``.

    With ``options.quantization`` the model is rounded in place. Raises UserError as :class:`.slots.Slots` and
    :func:`..models.eight_bit.quantize`.
    """
    options = options or EngineOptions()
    quantize(model, options.quantization)
    kind = ARSlots if isinstance(model, ARGenerator) else DiffusionSlots
    with sampling_on(model.x_embedder.weight.device):
        slots = kind(model, empty_prompt, options)  # type: ignore[arg-type]
        slots.prepare()
    return StepEngine(slots, clock)
