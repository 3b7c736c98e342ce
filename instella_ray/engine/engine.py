"""Step engine: requests of any size, step count, guidance, temperature, sampler and seed share one batch.

Every image has the same latent shape, so a fixed table of slots holds all of them. In each :meth:`StepEngine.step` the
policy (:mod:`.scheduling`) chooses the requests to advance. Those that wait are assigned to free slots, one forward pass
runs over the slots of the chosen ones, each row advances by its own schedule, and finished rows are released. Occupied
slots are always the first ones, the chosen ones before the others, so a pass uses the smallest *bucket* of rows that
covers them. Independent of Ray: the server and the bulk job wrap the same engine.

A request's bits do not depend on the other requests in the batch: see :func:`.buckets.usable_buckets`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass, field, fields
from functools import partial

import torch
from torch import Tensor

from ..errors import UserError
from ..models.generator import ARGenerator, DiffusionGenerator
from ..models.joint_attention import JointCache
from ..models.sampling import SamplingParams
from .buckets import Compilation, Forward, bucket_sizes, compiled, usable_buckets
from .events import Event, Expired, Finished, Outbox, Progress
from .modulations import Schedule
from .prompts import PromptProjector
from .scheduling import POLICIES, Schedulable, Scheduling, StepTimes


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
    arrival: float | None = None
    """Time of the engine's clock at which the request arrived; None: when it is submitted, between two steps."""


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
    scheduling: Scheduling = "fifo"
    """``fifo``: every step advances all slots, free ones are assigned in order of submission. ``deadline``: requests
    that can end within :data:`.scheduling.ALLOWANCE` times the time they take alone come first, and the others may
    pause meanwhile. The bits of an image are the same."""
    prompt_cache_bytes: int = 256 << 20
    """Maximum size of the cache of projected prompts; the latest one is kept whatever its size."""


@dataclass(eq=False)
class Entry(Schedulable):
    """Request in the engine."""

    request: Request = field(kw_only=True)
    guided: bool = field(kw_only=True)
    """True if steps of the request need the rows without a prompt."""
    rho: float = field(kw_only=True)

    @property
    def done(self) -> int:
        """Completed steps. Counted here, because a read from the device would wait for it."""
        return self.steps - self.left


class StepEngine(ABC):
    """Slot table and scheduling; :mod:`.kinds` implements one step.

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
        self.waiting: deque[Entry] = deque()
        self.entries: list[Entry] = []
        """Requests in slot order."""
        self.policy, self.times = POLICIES[options.scheduling], StepTimes()
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
        self.outbox = Outbox(late=weight.device.type == "cuda")
        self.steps = 0
        """Number of forward passes since the start."""

    @property
    def requests(self) -> list[Request]:
        """Requests in slot order: ``requests[i]`` occupies slot i."""
        return [entry.request for entry in self.entries]

    @property
    def active(self) -> int:
        """Number of occupied slots."""
        return len(self.entries)

    @property
    def idle(self) -> bool:
        """True when no request is waiting or in a slot and all events were returned."""
        return not self.waiting and not self.entries and not self.outbox.pending

    def submit(self, request: Request) -> None:
        """Queue a request.

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
        steps = self._steps(request.params)
        guided = bool(request.params.guidance_scale[0] != 0)
        arrival = self.clock() if request.arrival is None else request.arrival
        alone = steps * self.times.alone(guided)
        rho = float(request.params.rho[0])
        self.waiting.append(Entry(steps, arrival, alone, request.deadline, request=request, guided=guided, rho=rho))

    def cancel(self, request_id: str) -> None:
        """Cancel a request: its slot is released at the next step. Unknown ids are ignored."""
        self.waiting = deque(entry for entry in self.waiting if entry.request.id != request_id)
        if any(entry.request.id == request_id for entry in self.entries):
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
            self._release(self.clock())

    @torch.no_grad()
    def step(self) -> list[Event]:
        """Release cancelled and expired requests, advance the chosen ones by one forward pass and return the events."""
        began = self.clock()
        events: list[Event] = self._release(began)
        chosen = self._choose(began)
        if not chosen:
            return events + self.outbox.take(everything=True)
        self._admit(entry for entry in chosen if not entry.in_slot)
        self._bring_forward(chosen)
        rows, branches = self._batch(len(chosen))
        self._load([(entry.steps, entry.rho, entry.done) for entry in self.entries[:rows]])
        self._advance(rows, *self.forward(rows, branches).unflatten(0, (rows, branches)).unbind(1))
        self.steps += 1
        self.position[:rows] += 1
        # In reverse order, because a released slot is filled with the last occupied one.
        for slot in reversed(range(min(rows, self.active))):
            entry = self.entries[slot]
            entry.left -= 1
            request = entry.request
            if not entry.left:
                self.outbox.put(self.z[slot], partial(Finished, request.id))
                self._free(slot)
            elif request.preview_every and entry.done % request.preview_every == 0:
                self.outbox.put(self._estimate(slot), partial(Progress, request.id, entry.done, entry.steps))
        events += self.outbox.take(everything=not self.entries)
        self.times.observe(branches, rows, self.clock() - began)
        return events

    @torch.no_grad()
    def _prepare(self, text_width: int) -> tuple[Forward, dict[int, list[int]]]:
        """Compile the network, determine the usable buckets, and time them for policies that need it."""
        sizes = bucket_sizes(self.options.slots)
        forward = compiled(self._network, sizes, self.options.compilation)
        buckets = self._same_bits(forward, sizes, text_width) if self.options.batch_invariant else {1: sizes, 2: sizes}
        if self.options.scheduling != "fifo":
            for branches, usable in buckets.items():
                for rows in usable:
                    forward(rows, branches)  # the first pass may compile
                    began = self.clock()
                    forward(rows, branches).sum().item()  # waits for the device
                    self.times.observe(branches, rows, self.clock() - began)
        return forward, buckets

    def _same_bits(self, forward: Forward, sizes: list[int], text_width: int) -> dict[int, list[int]]:
        """Return the usable buckets, measured with noise in the slots."""
        slots, cfg = self.options.slots, self.model.cfg
        noise = torch.Generator().manual_seed(0)
        self.z.copy_(torch.rand(self.z.shape, generator=noise) < 0.5)
        steps = int(self.params.num_inference_steps[0])
        position = [slot % min(cfg.num_tokens, steps) for slot in range(slots)]
        self.position.copy_(torch.tensor(position))
        for slot in range(slots):
            features = torch.randn(cfg.layers, self.options.text_length, text_width, generator=noise)
            self.cache.put(2 * slot, self.project(features))
        self._load([(steps, 1.0, done) for done in position])
        return usable_buckets(forward, sizes)

    def _choose(self, now: float) -> list[Entry]:
        """Return the requests to advance; the policy knows the step times of the branches that all of them need."""
        entries = [*self.entries, *self.waiting]
        branches = 2 if any(entry.guided for entry in entries) or not self.buckets[1] else 1
        seconds = self.times.seconds[branches]
        return self.policy(entries, now, seconds, self.options.slots)  # type: ignore[return-value]

    def _batch(self, count: int) -> tuple[int, int]:
        """Return the rows and branches of the next pass: as few as the requests in the first ``count`` slots need.

        Requests in further slots that the rows cover advance as well.
        """
        rows = next((bucket for bucket in self.buckets[1] if bucket >= count), 0)
        if rows and not any(entry.guided for entry in self.entries[:rows]):
            return rows, 1
        return next(bucket for bucket in self.buckets[2] if bucket >= count), 2

    def _release(self, now: float) -> list[Event]:
        current = [entry.request for entry in (*self.waiting, *self.entries)]
        expired = [r.id for r in current if r.deadline <= now and r.id not in self.cancelled]
        released = self.cancelled.union(expired)
        if released:
            self.waiting = deque(entry for entry in self.waiting if entry.request.id not in released)
            for slot in reversed(range(self.active)):
                if self.entries[slot].request.id in released:
                    self._free(slot)
            self.cancelled.clear()
        return [Expired(name) for name in expired]

    def _admit(self, entries: Iterable[Entry]) -> None:
        for entry in entries:
            request, slot = entry.request, self.active
            entry.in_slot = True
            self.waiting.remove(entry)
            self.entries.append(entry)
            self.position[slot] = 0
            for parameter in fields(SamplingParams):
                getattr(self.params, parameter.name)[slot] = getattr(request.params, parameter.name)[0]
            self.cache.put(2 * slot, self.project(request.features, request.prompt))
            self._start(slot)

    def _bring_forward(self, chosen: list[Entry]) -> None:
        """Swap the rows of paused requests in the first slots with those of chosen ones behind them."""
        count = len(chosen)
        if count == self.active:
            return
        paused = [slot for slot in range(count) if self.entries[slot] not in chosen]
        behind = [slot for slot in range(count, self.active) if self.entries[slot] in chosen]
        for left, right in zip(paused, behind, strict=True):
            self.entries[left], self.entries[right] = self.entries[right], self.entries[left]
        if paused:
            self._move(torch.tensor(behind + paused), torch.tensor(paused + behind))

    def _free(self, slot: int) -> None:
        """Release ``slot`` by moving the last occupied slot into it, so that occupied slots stay contiguous."""
        last = self.active - 1
        if slot < last:
            self.entries[slot] = self.entries[last]
            self._move(last, slot)
        self.entries.pop()

    def _move(self, source: int | Tensor, target: int | Tensor) -> None:
        """Copy the rows of the slots ``source`` to those of ``target``; both may hold the same slots."""
        for table in (self.position, self.z, *self._row_tables(), *vars(self.params).values()):
            table[target] = table[source]
        for branch in range(2):
            self.cache.move(2 * source + branch, 2 * target + branch)

    @abstractmethod
    def _load(self, schedules: Sequence[Schedule]) -> None:
        """Fill the tables that depend on the next step of the first slots; compiled code and graphs read them."""

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
    def _steps(self, params: SamplingParams) -> int:
        """Return the total number of steps of a request."""
