"""Step engines of diffusion and AR generators."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch import Tensor

from ..models import rng
from ..models.generator import ARGenerator, DiffusionGenerator
from ..models.sampling import SamplingParams, ar_step, diffusion_step
from .draws import Draws
from .engine import Clock, EngineOptions, StepEngine
from .modulations import Schedule, ScheduleModulations


class DiffusionEngine(StepEngine):
    """Step engine of a diffusion generator: each row has its own schedule and time step."""

    def __init__(
        self, model: DiffusionGenerator, empty_prompt: Tensor, options: EngineOptions, clock: Clock = time.monotonic
    ) -> None:
        self.model: DiffusionGenerator = model
        self.modulations = ScheduleModulations(model, options.slots)
        super().__init__(model, empty_prompt, options, clock)
        self.x0_prob = torch.zeros(self.z.shape, device=self.z.device)
        self.draws = Draws(self.params.seed, model.cfg.num_tokens, model.cfg.bits_per_token, rng.DIFFUSION)

    def _row_tables(self) -> list[Tensor]:
        return [self.x0_prob, *self.draws.row_tables]

    def _start(self, slot: int) -> None:
        self.z[slot] = self.draws.start(slot) < 0.5

    def _network(self, rows: int, branches: int) -> Tensor:
        z, modulations = (table[:rows].repeat_interleave(branches, dim=0) for table in (self.z, self.modulations.table))
        return self.model(z, None, self._cached(rows, branches), modulations)

    def _load(self, schedules: Sequence[Schedule]) -> None:
        self.modulations.load(schedules)

    def _advance(self, rows: int, cond: Tensor, uncond: Tensor | None = None) -> None:
        position, params = self.position[:rows], self.params.map(lambda value: value[:rows])
        u = self.draws.take(self.position[: max(rows, self.active)] + 1, rows)
        self.z[:rows], self.x0_prob[:rows] = diffusion_step(self.z[:rows], cond, uncond, position, params, u)

    def _estimate(self, slot: int) -> Tensor:
        return self.x0_prob[slot] > 0.5

    def _steps(self, params: SamplingParams) -> int:
        return int(params.num_inference_steps[0])


class AREngine(StepEngine):
    """Step engine of an autoregressive generator: each row is at its own token; slots hold the KV cache."""

    def __init__(
        self, model: ARGenerator, empty_prompt: Tensor, options: EngineOptions, clock: Clock = time.monotonic
    ) -> None:
        self.model: ARGenerator = model
        self.index = torch.arange(options.slots, device=model.x_embedder.weight.device)
        super().__init__(model, empty_prompt, options, clock)
        self.draws = Draws(self.params.seed, 1, model.cfg.bits_per_token, rng.AR)

    def _row_tables(self) -> list[Tensor]:
        return self.draws.row_tables

    def _start(self, slot: int) -> None:
        self.draws.start(slot)
        # Positions after the current one are masked, so the slot's previous keys and values need no clearing.
        self.z[slot] = 0

    def _load(self, schedules: Sequence[Schedule]) -> None:
        """Do nothing: the network reads the tables of the slots."""

    def _token(self, rows: int) -> Tensor:
        # Positions of unoccupied slots may exceed the last token; clamping keeps their unused rows valid.
        return self.position[:rows].clamp(max=self.z.shape[1] - 1)

    def _network(self, rows: int, branches: int) -> Tensor:
        position = self._token(rows)
        previous = self.z[self.index[:rows], (position - 1).clamp(min=0)]
        doubled = previous.repeat_interleave(branches, dim=0), position.repeat_interleave(branches)
        return self.model.step(*doubled, self._cached(rows, branches))

    def _advance(self, rows: int, cond: Tensor, uncond: Tensor | None = None) -> None:
        position, params = self._token(rows), self.params.map(lambda value: value[:rows])
        u = self.draws.take(self._token(max(rows, self.active)), rows)[:, 0]
        self.z[self.index[:rows], position] = ar_step(cond, uncond, params, u).to(self.z.dtype)

    def _estimate(self, slot: int) -> Tensor:
        return self.z[slot]

    def _steps(self, params: SamplingParams) -> int:
        return self.z.shape[1]


def build_engine(
    model: DiffusionGenerator | ARGenerator,
    empty_prompt: Tensor,
    options: EngineOptions | None = None,
    *,
    clock: Clock = time.monotonic,
) -> StepEngine:
    """Build the engine for the kind of ``model``; ``empty_prompt [layers, T, width]``."""
    kind = AREngine if isinstance(model, ARGenerator) else DiffusionEngine
    return kind(model, empty_prompt, options or EngineOptions(), clock)  # type: ignore[arg-type]
