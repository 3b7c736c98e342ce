"""Step engine: requests of any size, step count, guidance, temperature, sampler and seed share one batch.

Every image has the same latent shape, so a fixed table of slots holds all of them (:mod:`.slots`). In each
:meth:`StepEngine.step` the policy (:mod:`.scheduling`) chooses the requests to advance. Those that wait are assigned to free
slots, one forward pass runs over the slots of the chosen ones, each row advances by its own schedule, and finished rows are
released. In a pass, occupied slots are always the first ones, the chosen ones before the others, so it uses the smallest
*bucket* of rows that covers them. Independent of Ray: the server and the bulk job wrap the same engine.

A request's bits do not depend on the other requests in the batch: see :func:`.buckets.agreeing_sizes`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from ..accelerator import sampling_on
from ..errors import UserError
from ..models.sampling import SamplingParams
from .events import Event, Expired, Finished, Outbox, Progress
from .scheduling import POLICIES, Schedulable, StepTimes
from .slots import Slots


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


@dataclass(eq=False)
class Entry(Schedulable):
    """Request in the engine."""

    request: Request = field(kw_only=True)
    numbers: Mapping[str, float] = field(kw_only=True)
    """Sampling parameters as numbers."""

    @property
    def guided(self) -> bool:
        """True if steps of the request need the rows without a prompt."""
        return self.numbers["guidance_scale"] != 0

    @property
    def done(self) -> int:
        """Completed steps. Counted here, because a read from the device would wait for it."""
        return self.steps - self.left


class StepEngine:
    """Scheduler of requests on a table of slots."""

    def __init__(self, slots: Slots, clock: Clock) -> None:
        """``slots``: prepared and free."""
        self.slots, self.options, self.clock = slots, slots.options, clock
        self.waiting: deque[Entry] = deque()
        self.entries: list[Entry | None] = []
        """Requests in slot order; None is a slot that was released since the last step."""
        self.policy, self.times = POLICIES[self.options.scheduling], StepTimes()
        self.cancelled: set[str] = set()
        self.outbox = Outbox(late=slots.device.type == "cuda")
        self.steps = 0
        """Number of forward passes since the start."""
        if self.options.scheduling != "fifo":
            with sampling_on(slots.device):
                self._measure_steps()

    @property
    def requests(self) -> list[Request]:
        """Requests in slots, in slot order."""
        return [entry.request for entry in self.entries if entry]

    @property
    def active(self) -> int:
        """Number of occupied slots."""
        return len(self.requests)

    @property
    def idle(self) -> bool:
        """True when no request is waiting or in a slot and all events were returned."""
        return not self.waiting and not any(self.entries) and not self.outbox.pending

    def submit(self, request: Request) -> None:
        """Queue a request.

        Raises UserError for parameters of more than one row, features of a wrong shape and prompts over the limit.
        """
        if len(request.params) != 1:
            raise UserError(f"request {request.id}: expected parameters of one row, got {len(request.params)}")
        cfg, shape = self.slots.model.cfg, tuple(request.features.shape)
        if len(shape) != 3 or not cfg.reads(shape[0], shape[2]):
            # Checked here, because an exception in a step would fail all requests in the batch.
            expected = f"[{cfg.layers if cfg.text_layers == 'each' else 'layers'}, tokens, {cfg.text_width}]"
            raise UserError(f"request {request.id}: text features of shape {list(shape)}, expected {expected}")
        length, limit = shape[1], self.options.text_length
        if length > limit:
            raise UserError(f"request {request.id}: prompt of {length} tokens, the limit is {limit}")
        steps, numbers = self.slots.steps(request.params), request.params.numbers()
        arrival = self.clock() if request.arrival is None else request.arrival
        entry = Entry(steps, arrival, deadline=request.deadline, request=request, numbers=numbers)
        entry.alone = steps * self.times.alone(entry.guided)
        self.waiting.append(entry)

    def cancel(self, request_id: str) -> None:
        """Cancel a request: its slot is released at the next step. Unknown ids are ignored."""
        self.waiting = deque(entry for entry in self.waiting if entry.request.id != request_id)
        if any(request.id == request_id for request in self.requests):
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
            self.outbox.take(everything=True)  # of a caller that stopped early

    def step(self) -> list[Event]:
        """Release cancelled and expired requests, advance the chosen ones by one forward pass and return the events."""
        with sampling_on(self.slots.device):
            return self._step()

    def _step(self) -> list[Event]:
        began = self.clock()
        events: list[Event] = self._release(began)
        chosen = self._choose(began)
        if not chosen:
            return events + self.outbox.take(everything=True)
        self._admit([entry for entry in chosen if not entry.in_slot])
        entries = self._close_gaps()
        self._bring_forward(chosen)
        rows, branches = self._batch(len(chosen))
        advancing = list(enumerate(entries[:rows]))
        schedules = [(entry.steps, entry.numbers["rho"], entry.done) for _, entry in advancing]
        self.slots.step(rows, branches, schedules, len(entries))
        self.steps += 1
        for slot, entry in advancing:
            entry.left -= 1
            request = entry.request
            if not entry.left:
                self.outbox.put(self.slots.z[slot], partial(Finished, request.id))
                self.entries[slot] = None
            elif request.preview_every and entry.done % request.preview_every == 0:
                self.outbox.put(self.slots.estimate(slot), partial(Progress, request.id, entry.done, entry.steps))
        events += self.outbox.take(everything=not any(self.entries))
        self.times.observe(branches, rows, self.clock() - began)
        return events

    @torch.no_grad()
    def _measure_steps(self) -> None:
        """Time the buckets in free slots, for policies that need it."""
        for branches, usable in self.slots.buckets.items():
            for rows in usable:
                self.slots.advance(rows, branches)  # the first pass may compile
                self.slots.z.sum().item()  # waits for the device
                began = self.clock()
                self.slots.advance(rows, branches)
                self.slots.z.sum().item()
                self.times.observe(branches, rows, self.clock() - began)

    def _choose(self, now: float) -> list[Entry]:
        """Return the requests to advance; the policy knows the step times of the branches that all of them need."""
        entries = [*filter(None, self.entries), *self.waiting]
        branches = 2 if any(entry.guided for entry in entries) or not self.slots.buckets[1] else 1
        seconds = self.times.seconds[branches]
        return self.policy(entries, now, seconds, self.options.slots)  # type: ignore[return-value]

    def _batch(self, count: int) -> tuple[int, int]:
        """Return the rows and branches of the next pass: as few as the requests in the first ``count`` slots need.

        Requests in further slots that the rows cover advance as well.
        """
        buckets = self.slots.buckets
        rows = next((bucket for bucket in buckets[1] if bucket >= count), 0)
        if rows and not any(entry and entry.guided for entry in self.entries[:rows]):
            return rows, 1
        return next(bucket for bucket in buckets[2] if bucket >= count), 2

    def _release(self, now: float) -> list[Event]:
        current = [*(entry.request for entry in self.waiting), *self.requests]
        expired = [r.id for r in current if r.deadline <= now and r.id not in self.cancelled]
        released = self.cancelled.union(expired)
        if released:
            self.waiting = deque(entry for entry in self.waiting if entry.request.id not in released)
            self.entries = [None if entry and entry.request.id in released else entry for entry in self.entries]
            self.cancelled.clear()
        return [Expired(name) for name in expired]

    def _admit(self, entries: list[Entry]) -> None:
        """Assign slots to waiting requests; released ones first, so that no other request has to move."""
        free = [slot for slot, entry in enumerate(self.entries) if entry is None]
        for entry in entries:
            if not free:
                free.append(len(self.entries))
                self.entries.append(None)
            slot, request = free.pop(0), entry.request
            entry.in_slot = True
            self.waiting.remove(entry)
            self.entries[slot] = entry
            self.slots.admit(slot, entry.numbers, self.slots.project(request.features, request.prompt))

    def _close_gaps(self) -> list[Entry]:
        """Move the last requests into released slots and return all requests in slot order."""
        kept = len(self.requests)
        targets = [slot for slot in range(kept) if self.entries[slot] is None]
        sources = [slot for slot in range(kept, len(self.entries)) if self.entries[slot]]
        if targets:
            self.slots.move(sources, targets)
        for source, target in zip(sources, targets, strict=True):
            self.entries[target] = self.entries[source]
        del self.entries[kept:]
        return self.entries  # type: ignore[return-value]

    def _bring_forward(self, chosen: list[Entry]) -> None:
        """Swap the rows of paused requests in the first slots with those of chosen ones behind them."""
        count = len(chosen)
        if count == len(self.entries):
            return
        paused = [slot for slot in range(count) if self.entries[slot] not in chosen]
        behind = [slot for slot in range(count, len(self.entries)) if self.entries[slot] in chosen]
        for left, right in zip(paused, behind, strict=True):
            self.entries[left], self.entries[right] = self.entries[right], self.entries[left]
        if paused:
            self.slots.move(behind + paused, paused + behind)
