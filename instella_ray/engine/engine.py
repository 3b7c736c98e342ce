"""Step engine: requests of any size, step count, guidance, temperature, sampler and seed share one batch.

Every image has the same latent shape, so a fixed table of slots holds all of them. Each :meth:`StepEngine.step`
assigns waiting requests to free slots, runs one forward pass over the occupied slots, advances each row by its own
schedule and releases finished rows. Occupied slots are always the first ones, so a pass uses the smallest *bucket* of
rows that covers them. Independent of Ray: the server and the bulk job wrap the same engine.

A request's bits do not depend on the other requests in the batch: see :func:`.buckets.usable_buckets`.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from ..errors import UserError
from ..models import rng
from ..models.generator import ARGenerator, DiffusionGenerator
from ..models.joint_attention import JointCache
from ..models.sampling import SamplingParams, ar_step, diffusion_step
from .buckets import Compilation, Forward, bucket_sizes, compiled, usable_buckets
from .draws import Draws
from .modulations import ScheduleModulations
from .prompts import PromptProjector


@dataclass(frozen=True)
class Request:
    """Request for one image."""

    id: str
    features: Tensor
    """Text features of the prompt ``[layers, T, width]``, without padding."""
    params: SamplingParams
    """Sampling parameters of exactly one row."""
    deadline: float = float("inf")
    """Time of the engine's clock (``time.monotonic()``) after which the request expires; infinite by default."""
    preview_every: int = 0
    """Number of steps between two :class:`Progress` events with the current estimate; 0 reports none."""
    prompt: str | None = None
    """Prompt of the features: requests with the same prompt share the projection of its features."""


@dataclass(frozen=True)
class Finished:
    """Event: a request is complete."""

    id: str
    codes: Tensor
    """Bits of the image, uint8 0/1 ``[L, K]``."""


@dataclass(frozen=True)
class Progress:
    """Event: a request has advanced."""

    id: str
    step: int
    """Completed steps."""
    steps: int
    """Total number of steps."""
    estimate: Tensor
    """Current most likely final bits, uint8 0/1 ``[L, K]``; tokens that AR has not generated yet are 0."""


@dataclass(frozen=True)
class Expired:
    """Event: the deadline of a request passed before it was complete."""

    id: str


Event = Finished | Progress | Expired
Clock = Callable[[], float]


@dataclass(frozen=True)
class EngineOptions:
    """Settings of an engine."""

    slots: int = 8
    """Maximum number of images processed at once."""
    text_length: int = 128
    """Maximum number of prompt tokens per slot."""
    compilation: Compilation = "none"
    """``compile`` for torch.compile, ``graphs`` for recorded CUDA or HIP graphs, one per bucket."""
    batch_invariant: bool = True
    """Use only buckets of rows that give the same bits as the full table on this device. False uses all buckets: faster
    on GPUs with few requests, but an image may then depend on the other requests in the batch."""
    prompt_cache_bytes: int = 256 << 20
    """Maximum size of the cache of projected prompts; the latest one is kept whatever its size."""


class StepEngine(ABC):
    """Slot table and scheduling; :class:`DiffusionEngine` and :class:`AREngine` implement one step.

    Rows of the network's batch are interleaved: row 2i is slot i with its prompt, row 2i + 1 slot i without a prompt. A
    step in which no request has guidance leaves out the rows without a prompt.
    """

    model: DiffusionGenerator | ARGenerator

    def __init__(
        self, model: DiffusionGenerator | ARGenerator, empty_prompt: Tensor, options: EngineOptions, clock: Clock
    ) -> None:
        """Allocate the slots and compile the network.

        ``empty_prompt``: features ``[layers, T, width]`` of the unconditional prompt (T may be 0). Raises UserError for
        ``slots`` below 1 and for an empty prompt longer than ``text_length``.
        """
        self.options, self.clock = options, clock
        slots, weight = options.slots, model.x_embedder.weight
        if slots < 1:
            raise UserError(f"slots {slots}: expected at least 1")
        self.waiting: deque[Request] = deque()
        self.requests: list[Request] = []
        """Requests in slot order: ``requests[i]`` occupies slot i."""
        self.cancelled: set[str] = set()
        self.position = torch.zeros(slots, dtype=torch.int64, device=weight.device)
        self.params = SamplingParams.of(slots).map(lambda value: value.to(weight.device))
        cfg = model.cfg
        self.z = weight.new_zeros(slots, cfg.num_tokens, cfg.bits_per_token)
        self.project = PromptProjector(model, options.text_length, options.prompt_cache_bytes)
        unconditional = self.project(empty_prompt)
        self.cache = JointCache.empty(2 * slots, self.options.text_length, cfg.num_tokens, unconditional.keys)
        self.forward, self.buckets = self._prepare(empty_prompt.shape[-1])
        # Rows with a prompt are overwritten when a slot is assigned; rows without a prompt never change.
        self.cache.put(slice(None), unconditional)
        self.steps = 0
        """Number of forward passes since the start."""

    @property
    def active(self) -> int:
        """Number of occupied slots."""
        return len(self.requests)

    @property
    def idle(self) -> bool:
        """True when no request is waiting or in a slot."""
        return not self.waiting and not self.requests

    def submit(self, request: Request) -> None:
        """Queue a request; slots are assigned in the order of submission.

        Raises UserError for parameters of more than one row, features of a wrong shape and prompts over the limit.
        """
        if len(request.params) != 1:
            raise UserError(f"request {request.id}: expected parameters of one row, got {len(request.params)}")
        cfg, shape = self.model.cfg, tuple(request.features.shape)
        if len(shape) != 3 or (shape[0], shape[2]) != (cfg.layers, cfg.text_width):
            # Checked here, because an exception in a step would fail all requests in the batch.
            expected = f"[{cfg.layers}, tokens, {cfg.text_width}]"
            raise UserError(f"request {request.id}: text features of shape {list(shape)}, expected {expected}")
        length, limit = shape[1], self.options.text_length
        if length > limit:
            raise UserError(f"request {request.id}: prompt of {length} tokens, the limit is {limit}")
        self.waiting.append(request)

    def cancel(self, request_id: str) -> None:
        """Cancel a request: its slot is released at the next step. Unknown ids are ignored."""
        self.waiting = deque(r for r in self.waiting if r.id != request_id)
        if any(r.id == request_id for r in self.requests):
            self.cancelled.add(request_id)

    def run(self, requests: Iterable[Request]) -> Generator[Event, None, None]:
        """Run all ``requests``, yielding their events; a caller that stops early leaves none of them behind.

        The engine must have no other requests. Requests are taken one batch ahead,
        because the features of all prompts might not fit into memory.
        """
        rest, ids = iter(requests), set[str]()
        upcoming = next(rest, None)
        try:
            while upcoming is not None or not self.idle:
                while upcoming is not None and len(self.waiting) < self.options.slots:
                    self.submit(upcoming)
                    ids.add(upcoming.id)
                    upcoming = next(rest, None)
                for event in self.step():
                    if not isinstance(event, Progress):
                        ids.discard(event.id)
                    yield event
        finally:
            for request_id in ids:
                self.cancel(request_id)
            self._release()

    @torch.no_grad()
    def step(self) -> list[Event]:
        """Release cancelled and expired requests, admit waiting ones, run one forward pass and return the events."""
        events: list[Event] = self._release()
        self._admit()
        if not self.requests:
            return events
        rows, branches = self._batch()
        self._load(self.active)
        self._advance(rows, *self.forward(rows, branches).unflatten(0, (rows, branches)).unbind(1))
        self.steps += 1
        self.position[:rows] += 1
        position, length = self.position.tolist(), self._length().tolist()
        # In reverse order, because a released slot is filled with the last occupied one.
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
    def _prepare(self, text_width: int) -> tuple[Forward, dict[int, list[int]]]:
        """Compile the network and determine the usable buckets, with noise in place of requests."""
        slots, cfg = self.options.slots, self.model.cfg
        sizes = bucket_sizes(slots)
        forward = compiled(self._network, sizes, self.options.compilation)
        if not self.options.batch_invariant:
            return forward, {1: sizes, 2: sizes}
        noise = torch.Generator().manual_seed(0)
        self.z.copy_(torch.rand(self.z.shape, generator=noise) < 0.5)
        self.position.copy_(torch.arange(slots) % min(cfg.num_tokens, int(self.params.num_inference_steps[0])))
        for slot in range(slots):
            features = torch.randn(cfg.layers, self.options.text_length, text_width, generator=noise)
            self.cache.put(2 * slot, self.project(features))
        self._load(slots)
        return forward, usable_buckets(forward, sizes)

    def _batch(self) -> tuple[int, int]:
        """Return the rows and branches of the next pass: as few as the requests in the slots need."""
        if not any(float(request.params.guidance_scale) for request in self.requests):
            fitting = [bucket for bucket in self.buckets[1] if bucket >= self.active]
            if fitting:
                return fitting[0], 1
        return next(bucket for bucket in self.buckets[2] if bucket >= self.active), 2

    def _release(self) -> list[Event]:
        now = self.clock()
        expired = [r.id for r in (*self.waiting, *self.requests) if r.deadline <= now and r.id not in self.cancelled]
        released = self.cancelled.union(expired)
        if released:
            self.waiting = deque(r for r in self.waiting if r.id not in released)
            for slot in reversed(range(self.active)):
                if self.requests[slot].id in released:
                    self._free(slot)
            self.cancelled.clear()
        return [Expired(name) for name in expired]

    def _admit(self) -> None:
        while self.waiting and self.active < self.options.slots:
            request, slot = self.waiting.popleft(), self.active
            self.requests.append(request)
            self.position[slot] = 0
            for field in fields(SamplingParams):
                getattr(self.params, field.name)[slot] = getattr(request.params, field.name)[0]
            self.cache.put(2 * slot, self.project(request.features, request.prompt))
            self._start(slot)

    def _free(self, slot: int) -> None:
        """Release ``slot`` by moving the last occupied slot into it, so that occupied slots stay contiguous."""
        last = self.active - 1
        if slot < last:
            self.requests[slot] = self.requests[last]
            for table in (self.position, self.z, *self._row_tables(), *vars(self.params).values()):
                table[slot] = table[last]
            for branch in range(2):
                self.cache.move(2 * last + branch, 2 * slot + branch)
        self.requests.pop()

    @abstractmethod
    def _load(self, rows: int) -> None:
        """Fill the tables that depend on the position of the first ``rows`` slots; compiled code and graphs read them."""

    def _row_tables(self) -> list[Tensor]:
        """Additional tensors with one row per slot."""
        return []

    @abstractmethod
    def _start(self, slot: int) -> None:
        """Initialize a newly occupied slot."""

    @abstractmethod
    def _network(self, rows: int, branches: int) -> Tensor:
        """Run the network on the first ``rows`` slots, ``[branches * rows, ..., K]``, as :data:`.buckets.Forward`."""

    def _cached(self, rows: int, branches: int) -> JointCache:
        """Return the cache's rows of the first ``rows`` slots: both of each, or those with a prompt."""
        return self.cache.view(slice(0, 2 * rows, 2 // branches))

    @abstractmethod
    def _advance(self, rows: int, cond: Tensor, uncond: Tensor | None = None) -> None:
        """Update the ``z`` of the first ``rows`` slots from the network's outputs; no ``uncond``: no row has guidance."""

    @abstractmethod
    def _estimate(self, slot: int) -> Tensor:
        """Return the most likely final bits of a slot after its last step, 0/1 ``[L, K]``."""

    @abstractmethod
    def _length(self) -> Tensor:
        """Return the total number of steps of each slot, ``[slots]``."""


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

    def _load(self, rows: int) -> None:
        self.modulations.load(self.position[:rows], self.params.map(lambda value: value[:rows]))

    def _advance(self, rows: int, cond: Tensor, uncond: Tensor | None = None) -> None:
        position, params = self.position[:rows], self.params.map(lambda value: value[:rows])
        u = self.draws.take(position + 1)
        self.z[:rows], self.x0_prob[:rows] = diffusion_step(self.z[:rows], cond, uncond, position, params, u)

    def _estimate(self, slot: int) -> Tensor:
        return self.x0_prob[slot] > 0.5

    def _length(self) -> Tensor:
        return self.params.num_inference_steps


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

    def _load(self, rows: int) -> None:
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
    """Build the engine for the kind of ``model``; ``empty_prompt [layers, T, width]``."""
    kind = AREngine if isinstance(model, ARGenerator) else DiffusionEngine
    return kind(model, empty_prompt, options or EngineOptions(), clock)  # type: ignore[arg-type]
