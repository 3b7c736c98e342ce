"""The step engine: requests of any size, step count, guidance, temperature, sampler and seed share one batch.

Every picture has the same latent shape, so a fixed table of slots holds all of them. Each :meth:`StepEngine.step`
takes waiting requests into free slots, runs one forward pass over the whole table, advances each row by its own
schedule and releases those that are done. The table's shape never changes, so a request's bits do not depend on its
company. No Ray here: the server and the bulk job wrap the same engine.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from .. import rng
from ..errors import UserError
from ..models.generator import ARGenerator, DiffusionGenerator
from ..models.joint_attention import TextKV
from ..sampling import SamplingParams, ar_step, diffusion_step, timestep


@dataclass(frozen=True)
class Request:
    """One picture to make."""

    id: str
    features: Tensor
    """Text features of the prompt ``[layers, T, width]``, without padding."""
    params: SamplingParams
    """Exactly one row."""


@dataclass(frozen=True)
class Finished:
    """A picture's bits."""

    id: str
    codes: Tensor
    """uint8 0/1 ``[L, K]``."""


class StepEngine(ABC):
    """The slot table; :class:`DiffusionEngine` and :class:`AREngine` know what one step is."""

    def __init__(
        self, model: DiffusionGenerator | ARGenerator, empty_prompt: Tensor, *, slots: int, text_length: int
    ) -> None:
        """``empty_prompt``: features ``[layers, T, width]`` of the unconditional prompt (T may be 0)."""
        if slots < 1:
            raise UserError(f"slots {slots}: expected at least 1")
        self.slots, self.text_length = slots, text_length
        self.device = model.x_embedder.weight.device
        self.waiting: deque[Request] = deque()
        self.ids: list[str | None] = [None] * slots
        self.cancelled: set[str] = set()
        self.position = torch.zeros(slots, dtype=torch.int64, device=self.device)
        self.params = SamplingParams.of(slots).map(lambda value: value.to(self.device))
        shape = (slots, model.cfg.num_tokens, model.cfg.bits_per_token)
        self.z = torch.zeros(shape, dtype=model.x_embedder.weight.dtype, device=self.device)
        unconditional = _text_kv(model, [empty_prompt], text_length)
        # Rows 0..slots-1 are conditional, the rest unconditional. The latter never change.
        self.text = TextKV.cat([unconditional.expand(slots), unconditional.expand(slots)])

    @property
    def active(self) -> int:
        """Occupied slots."""
        return sum(name is not None for name in self.ids)

    @property
    def idle(self) -> bool:
        """True when there is nothing to do."""
        return not self.waiting and self.active == 0

    def submit(self, request: Request) -> None:
        """Queue a request; slots are given in the order of submission."""
        if len(request.params) != 1:
            raise UserError(f"request {request.id}: expected parameters of one row, got {len(request.params)}")
        if request.features.shape[1] > self.text_length:
            raise UserError(
                f"request {request.id}: prompt of {request.features.shape[1]} tokens, the limit is {self.text_length}"
            )
        self.waiting.append(request)

    def cancel(self, request_id: str) -> None:
        """Forget a request: its slot is free again at the next step. Unknown ids are ignored."""
        self.waiting = deque(r for r in self.waiting if r.id != request_id)
        if request_id in self.ids:
            self.cancelled.add(request_id)

    @torch.no_grad()
    def step(self) -> list[Finished]:
        """Admit, run one forward pass, advance every row; returns the pictures that are done."""
        for slot, name in enumerate(self.ids):
            if name in self.cancelled:
                self.ids[slot] = None
        self.cancelled.clear()
        self._admit()
        if not self.active:
            return []
        self._advance()
        self.position += 1
        finished = []
        ended = (self.position >= self._length()).tolist()
        for slot, name in enumerate(self.ids):
            if name is not None and ended[slot]:
                finished.append(Finished(name, self.z[slot].to(torch.uint8).cpu()))
                self.ids[slot] = None
        return finished

    def _admit(self) -> None:
        free = [slot for slot, name in enumerate(self.ids) if name is None]
        for slot in free[: len(self.waiting)]:
            request = self.waiting.popleft()
            self.ids[slot] = request.id
            self.position[slot] = 0
            for field in fields(SamplingParams):
                getattr(self.params, field.name)[slot] = getattr(request.params, field.name)[0]
            text = _text_kv(self.model, [request.features], self.text_length)
            for table, row in zip(self.text.keys + self.text.values, text.keys + text.values, strict=True):
                table[slot] = row[0]
            self.text.mask[slot] = text.mask[0]
            self._start(slot)

    model: DiffusionGenerator | ARGenerator

    @abstractmethod
    def _start(self, slot: int) -> None:
        """Prepare a newly occupied slot."""

    @abstractmethod
    def _advance(self) -> None:
        """One forward pass; writes the next ``z`` of every slot."""

    @abstractmethod
    def _length(self) -> Tensor:
        """Steps that each slot takes in all, ``[slots]``."""


class DiffusionEngine(StepEngine):
    """Rows at different times of different schedules."""

    def __init__(
        self, model: DiffusionGenerator, empty_prompt: Tensor, *, slots: int = 8, text_length: int = 128
    ) -> None:
        self.model: DiffusionGenerator = model
        super().__init__(model, empty_prompt, slots=slots, text_length=text_length)

    def _start(self, slot: int) -> None:
        first = self._uniforms(torch.zeros_like(self.position))
        self.z[slot] = (first[slot] < 0.5).to(self.z.dtype)

    def _advance(self) -> None:
        t = timestep(self.position, self.params).to(self.z.dtype)
        out = self.model(torch.cat((self.z, self.z)), torch.cat((t, t)), self.text)
        u = self._uniforms(self.position + 1)
        self.z, _ = diffusion_step(self.z, out[: self.slots], out[self.slots :], self.position, self.params, u)

    def _length(self) -> Tensor:
        return self.params.num_inference_steps

    def _uniforms(self, draw: Tensor) -> Tensor:
        _, tokens, bits = self.z.shape
        return rng.uniforms(self.params.seed, draw, tokens, bits, stream=rng.DIFFUSION)


class AREngine(StepEngine):
    """Rows at different tokens; keys and values of the tokens so far live in the slots."""

    def __init__(self, model: ARGenerator, empty_prompt: Tensor, *, slots: int = 8, text_length: int = 128) -> None:
        self.model: ARGenerator = model
        self.cache = model.new_cache(2 * slots)
        self.rows = torch.arange(slots, device=model.x_embedder.weight.device)
        super().__init__(model, empty_prompt, slots=slots, text_length=text_length)

    def _start(self, slot: int) -> None:
        # Positions after a row's own are masked, so what the slot held before needs no clearing.
        self.z[slot] = 0

    def _advance(self) -> None:
        # Slots without a request may stand past the end; they compute the last token again, for nobody.
        position = self.position.clamp(max=self.z.shape[1] - 1)
        previous = self.z[self.rows, (position - 1).clamp(min=0)]
        doubled = torch.cat((position, position))
        out = self.model.step(torch.cat((previous, previous)), doubled, self.text, self.cache)
        u = rng.uniforms(self.params.seed, position, 1, self.z.shape[2], stream=rng.AR)[:, 0]
        self.z[self.rows, position] = ar_step(out[: self.slots], out[self.slots :], self.params, u)

    def _length(self) -> Tensor:
        return torch.full_like(self.position, self.z.shape[1])


def build_engine(
    model: DiffusionGenerator | ARGenerator, empty_prompt: Tensor, *, slots: int = 8, text_length: int = 128
) -> StepEngine:
    """The engine of the model's kind."""
    if isinstance(model, ARGenerator):
        return AREngine(model, empty_prompt, slots=slots, text_length=text_length)
    return DiffusionEngine(model, empty_prompt, slots=slots, text_length=text_length)


def _text_kv(model: DiffusionGenerator | ARGenerator, rows: list[Tensor], length: int) -> TextKV:
    """Projected text of single prompts, padded to the table's length *before* the projection: a fixed shape."""
    layers, _, width = rows[0].shape
    weight = model.x_embedder.weight
    features = torch.zeros(layers, len(rows), length, width, dtype=weight.dtype, device=weight.device)
    mask = torch.zeros(len(rows), length, dtype=torch.bool, device=weight.device)
    for i, row in enumerate(rows):
        if count := row.shape[1]:
            features[:, i, length - count :] = row
            mask[i, length - count :] = True
    with torch.no_grad():
        return model.text_kv(features, mask)
