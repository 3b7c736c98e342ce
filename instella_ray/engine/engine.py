"""The step engine: requests of any size, step count, guidance, temperature, sampler and seed share one batch.

Every image has the same latent shape, so a fixed table of slots holds all of them. Each :meth:`StepEngine.step`
takes waiting requests into free slots, runs one forward pass over the occupied ones, advances each row by its own
schedule and releases those that are done. Occupied slots are always the first ones, so a pass takes the smallest
*bucket* of rows that holds them. No Ray here: the server and the bulk job wrap the same engine.

A request's bits do not depend on its company, because a row's arithmetic does not: see :func:`.buckets.usable_buckets`.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from ..errors import UserError
from ..models import rng
from ..models.generator import ARGenerator, DiffusionGenerator
from ..models.joint_attention import JointCache, TextKV
from ..models.sampling import SamplingParams, ar_step, diffusion_step, timestep
from .buckets import Compilation, Forward, bucket_sizes, compiled, usable_buckets
from .draws import Draws


@dataclass(frozen=True)
class Request:
    """One image to make."""

    id: str
    features: Tensor
    """Text features of the prompt ``[layers, T, width]``, without padding."""
    params: SamplingParams
    """Exactly one row."""
    deadline: float = float("inf")
    """``time.monotonic()`` after which nobody wants the image any more."""
    preview_every: int = 0
    """Report the current estimate after every so many steps; 0 reports none."""


@dataclass(frozen=True)
class Finished:
    """An image's bits."""

    id: str
    codes: Tensor
    """uint8 0/1 ``[L, K]``."""


@dataclass(frozen=True)
class Progress:
    """An image on its way."""

    id: str
    step: int
    """Steps done."""
    steps: int
    estimate: Tensor
    """The most likely final bits as of now, uint8 0/1 ``[L, K]``; tokens that AR has not reached are 0."""


@dataclass(frozen=True)
class Expired:
    """A request whose deadline passed before it was done."""

    id: str


Event = Finished | Progress | Expired
Clock = Callable[[], float]


@dataclass(frozen=True)
class EngineOptions:
    """How an engine is laid out."""

    slots: int = 8
    """Images that can be on their way at once."""
    text_length: int = 128
    """Prompt tokens that a slot has room for."""
    compilation: Compilation = "none"
    """``compile`` for torch.compile, ``graphs`` for recorded CUDA or HIP graphs, one a bucket."""
    batch_invariant: bool = True
    """Use only buckets of rows that give the same bits as the whole table on this device. False uses all: faster on
    GPUs when few requests are there, but an image may then depend on its company."""


class StepEngine(ABC):
    """The slot table; :class:`DiffusionEngine` and :class:`AREngine` know what one step is.

    Rows of the network's batch are interleaved: 2i is slot i with its prompt, 2i + 1 the same slot without.
    """

    model: DiffusionGenerator | ARGenerator

    def __init__(
        self, model: DiffusionGenerator | ARGenerator, empty_prompt: Tensor, options: EngineOptions, clock: Clock
    ) -> None:
        """``empty_prompt``: features ``[layers, T, width]`` of the unconditional prompt (T may be 0)."""
        self.options, self.clock = options, clock
        slots, weight = options.slots, model.x_embedder.weight
        if slots < 1:
            raise UserError(f"slots {slots}: expected at least 1")
        self.waiting: deque[Request] = deque()
        self.requests: list[Request] = []
        """Who occupies slot 0, 1, ..."""
        self.cancelled: set[str] = set()
        self.position = torch.zeros(slots, dtype=torch.int64, device=weight.device)
        self.params = SamplingParams.of(slots).map(lambda value: value.to(weight.device))
        cfg = model.cfg
        self.z = weight.new_zeros(slots, cfg.num_tokens, cfg.bits_per_token)
        unconditional = self._text_kv(empty_prompt)
        self.cache = JointCache.empty(2 * slots, self.options.text_length, cfg.num_tokens, unconditional.keys)
        self.forward, self.buckets = self._prepare(empty_prompt.shape[-1])
        # Rows with a prompt are written when a slot is given; those without never change.
        self.cache.put(slice(None), unconditional)
        self.steps = 0
        """Forward passes so far."""

    @property
    def active(self) -> int:
        """Occupied slots."""
        return len(self.requests)

    @property
    def idle(self) -> bool:
        """True when there is nothing to do."""
        return not self.waiting and not self.requests

    def submit(self, request: Request) -> None:
        """Queue a request; slots are given in the order of submission."""
        if len(request.params) != 1:
            raise UserError(f"request {request.id}: expected parameters of one row, got {len(request.params)}")
        cfg, shape = self.model.cfg, tuple(request.features.shape)
        if len(shape) != 3 or (shape[0], shape[2]) != (cfg.layers, cfg.text_width):
            # Found here, because an exception in a step would end everybody's images.
            expected = f"[{cfg.layers}, tokens, {cfg.text_width}]"
            raise UserError(f"request {request.id}: text features of shape {list(shape)}, expected {expected}")
        length, limit = shape[1], self.options.text_length
        if length > limit:
            raise UserError(f"request {request.id}: prompt of {length} tokens, the limit is {limit}")
        self.waiting.append(request)

    def cancel(self, request_id: str) -> None:
        """Forget a request: its slot is free again at the next step. Unknown ids are ignored."""
        self.waiting = deque(r for r in self.waiting if r.id != request_id)
        if any(r.id == request_id for r in self.requests):
            self.cancelled.add(request_id)

    @torch.no_grad()
    def step(self) -> list[Event]:
        """Let go of who is cancelled or late, admit, run one forward pass, advance every row; returns what happened."""
        events: list[Event] = self._release()
        self._admit()
        if not self.requests:
            return events
        rows = next(bucket for bucket in self.buckets if bucket >= self.active)
        self._advance(rows)
        self.steps += 1
        self.position[:rows] += 1
        position, length = self.position.tolist(), self._length().tolist()
        # From the last slot on, because a released slot is filled with the last one.
        for slot in reversed(range(self.active)):
            request = self.requests[slot]
            if position[slot] >= length[slot]:
                events.append(Finished(request.id, self.z[slot].to(torch.uint8).cpu()))
                self._free(slot)
            elif request.preview_every and position[slot] % request.preview_every == 0:
                estimate = self._estimate(slot).to(torch.uint8).cpu()
                events.append(Progress(request.id, position[slot], length[slot], estimate))
        return events

    @torch.no_grad()
    def _prepare(self, text_width: int) -> tuple[Forward, list[int]]:
        """Compile, and find the buckets of rows to use, on noise in place of requests."""
        slots, cfg = self.options.slots, self.model.cfg
        sizes = bucket_sizes(slots)
        forward = compiled(self._network, sizes, self.options.compilation)
        if not self.options.batch_invariant:
            return forward, sizes
        noise = torch.Generator().manual_seed(0)
        self.z.copy_(torch.rand(self.z.shape, generator=noise) < 0.5)
        self.position.copy_(torch.arange(slots) % min(cfg.num_tokens, int(self.params.num_inference_steps[0])))
        for slot in range(slots):
            features = torch.randn(cfg.layers, self.options.text_length, text_width, generator=noise)
            self.cache.put(2 * slot, self._text_kv(features))
        return forward, usable_buckets(forward, sizes)

    def _release(self) -> list[Event]:
        now = self.clock()
        late = [r.id for r in (*self.waiting, *self.requests) if r.deadline <= now and r.id not in self.cancelled]
        gone = self.cancelled.union(late)
        if gone:
            self.waiting = deque(r for r in self.waiting if r.id not in gone)
            for slot in reversed(range(self.active)):
                if self.requests[slot].id in gone:
                    self._free(slot)
            self.cancelled.clear()
        return [Expired(name) for name in late]

    def _admit(self) -> None:
        while self.waiting and self.active < self.options.slots:
            request, slot = self.waiting.popleft(), self.active
            self.requests.append(request)
            self.position[slot] = 0
            for field in fields(SamplingParams):
                getattr(self.params, field.name)[slot] = getattr(request.params, field.name)[0]
            self.cache.put(2 * slot, self._text_kv(request.features))
            self._start(slot)

    def _free(self, slot: int) -> None:
        """Fill ``slot`` with the last occupied one, so that occupied slots stay the first ones."""
        last = self.active - 1
        if slot < last:
            self.requests[slot] = self.requests[last]
            for table in (self.position, self.z, *self._row_tables(), *vars(self.params).values()):
                table[slot] = table[last]
            for branch in range(2):
                self.cache.move(2 * last + branch, 2 * slot + branch)
        self.requests.pop()

    def _text_kv(self, features: Tensor) -> TextKV:
        """Projected text of one prompt, padded to the slot's length *before* the projection: a fixed shape."""
        layers, count, width = features.shape
        weight, length = self.model.x_embedder.weight, self.options.text_length
        if count > length:
            raise UserError(f"text_length {length}: the empty prompt alone has {count} tokens")
        padded = torch.zeros(layers, 1, length, width, dtype=weight.dtype, device=weight.device)
        mask = torch.zeros(1, length, dtype=torch.bool, device=weight.device)
        if count:
            padded[:, 0, length - count :] = features
            mask[:, length - count :] = True
        with torch.no_grad():
            return self.model.text_kv(padded, mask)

    def _row_tables(self) -> list[Tensor]:
        """Further tensors with a row a slot."""
        return []

    @abstractmethod
    def _start(self, slot: int) -> None:
        """Prepare a newly occupied slot."""

    @abstractmethod
    def _network(self, rows: int) -> Tensor:
        """The network's outputs for the first ``rows`` slots, ``[2 rows, ..., K]``, from tensors that never move."""

    @abstractmethod
    def _advance(self, rows: int) -> None:
        """One forward pass over the first ``rows`` slots; writes their next ``z``."""

    @abstractmethod
    def _estimate(self, slot: int) -> Tensor:
        """The most likely final bits of a slot as of its last step, 0/1 ``[L, K]``."""

    @abstractmethod
    def _length(self) -> Tensor:
        """Steps that each slot takes in all, ``[slots]``."""


class DiffusionEngine(StepEngine):
    """Rows at different times of different schedules."""

    def __init__(
        self, model: DiffusionGenerator, empty_prompt: Tensor, options: EngineOptions, clock: Clock = time.monotonic
    ) -> None:
        self.model: DiffusionGenerator = model
        super().__init__(model, empty_prompt, options, clock)
        self.x0_prob = torch.zeros(self.z.shape, device=self.z.device)
        self.draws = Draws(self.params.seed, model.cfg.num_tokens, model.cfg.bits_per_token, rng.DIFFUSION)

    def _row_tables(self) -> list[Tensor]:
        return [self.x0_prob, *self.draws.row_tables]

    def _start(self, slot: int) -> None:
        self.z[slot] = self.draws.start(slot) < 0.5

    def _network(self, rows: int) -> Tensor:
        params = self.params.map(lambda value: value[:rows])
        t = timestep(self.position[:rows], params).to(self.z.dtype).repeat_interleave(2)
        return self.model(self.z[:rows].repeat_interleave(2, dim=0), t, self.cache.first(2 * rows))

    def _advance(self, rows: int) -> None:
        cond, uncond = self.forward(rows).unflatten(0, (rows, 2)).unbind(1)
        position, params = self.position[:rows], self.params.map(lambda value: value[:rows])
        u = self.draws.take(position + 1)
        self.z[:rows], self.x0_prob[:rows] = diffusion_step(self.z[:rows], cond, uncond, position, params, u)

    def _estimate(self, slot: int) -> Tensor:
        return self.x0_prob[slot] > 0.5

    def _length(self) -> Tensor:
        return self.params.num_inference_steps


class AREngine(StepEngine):
    """Rows at different tokens; keys and values of the tokens so far live in the slots."""

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
        # Positions after a row's own are masked, so what the slot held before needs no clearing.
        self.z[slot] = 0

    def _token(self, rows: int) -> Tensor:
        # Slots without a request may stand past the end; they compute the last token again, for nobody.
        return self.position[:rows].clamp(max=self.z.shape[1] - 1)

    def _network(self, rows: int) -> Tensor:
        position = self._token(rows)
        previous = self.z[self.index[:rows], (position - 1).clamp(min=0)]
        return self.model.step(
            previous.repeat_interleave(2, dim=0), position.repeat_interleave(2), self.cache.first(2 * rows)
        )

    def _advance(self, rows: int) -> None:
        cond, uncond = self.forward(rows).unflatten(0, (rows, 2)).unbind(1)
        position, params = self._token(rows), self.params.map(lambda value: value[:rows])
        u = self.draws.take(position)[:, 0]
        self.z[self.index[:rows], position] = ar_step(cond, uncond, params, u).to(self.z.dtype)

    def _estimate(self, slot: int) -> Tensor:
        return self.z[slot]

    def _length(self) -> Tensor:
        return torch.full_like(self.position, self.z.shape[1])


def build_engine(
    model: DiffusionGenerator | ARGenerator,
    empty_prompt: Tensor,
    options: EngineOptions | None = None,
    *,
    clock: Clock = time.monotonic,
) -> StepEngine:
    """The engine of the model's kind."""
    kind = AREngine if isinstance(model, ARGenerator) else DiffusionEngine
    return kind(model, empty_prompt, options or EngineOptions(), clock)  # type: ignore[arg-type]
