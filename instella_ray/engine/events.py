"""Events of an engine, and their way from the device to the host."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


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

MakeEvent = Callable[[Tensor], Event]
"""Returns the event for bits on the host, uint8 0/1 ``[L, K]``."""


class Outbox:
    """Copies of bits to the host, without waiting for the device.

    With ``late`` they are handed out one step later: the device is then already busy with that step while the host waits
    for the copies of the one before, which also keeps the host from running ahead by more than one step.
    """

    def __init__(self, *, late: bool) -> None:
        self.late = late
        self._steps: deque[_Copies] = deque()
        self._current = _Copies()

    @property
    def pending(self) -> bool:
        """Whether events have not been handed out."""
        return any(copies.items for copies in (*self._steps, self._current))

    def put(self, bits: Tensor, event: MakeEvent) -> None:
        """Copy ``bits [L, K]``, 0 or 1 of any dtype, as they are now; ``event`` makes their event."""
        self._current.add(bits.to(torch.uint8), event)

    def take(self, *, everything: bool) -> list[Event]:
        """End a step: return the events of the step before, or with ``everything`` of this one too."""
        self._current.close()
        self._steps.append(self._current)
        self._current = _Copies()
        keep = 0 if everything or not self.late else 1
        events: list[Event] = []
        while len(self._steps) > keep:
            events += self._steps.popleft().wait()
        return events


class _Copies:
    """Copies that a step started."""

    def __init__(self) -> None:
        self.items: list[tuple[Tensor, MakeEvent]] = []
        self._end: torch.cuda.Event | None = None

    def add(self, bits: Tensor, event: MakeEvent) -> None:
        # Into memory that the device can write to by itself; from pageable memory the copy would wait for the device.
        host = torch.empty(bits.shape, dtype=bits.dtype, pin_memory=bits.is_cuda)
        self.items.append((host.copy_(bits, non_blocking=True), event))

    def close(self) -> None:
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            self._end = torch.cuda.Event()
            self._end.record()

    def wait(self) -> list[Event]:
        if self._end is not None:
            self._end.synchronize()
        return [event(host) for host, event in self.items]
