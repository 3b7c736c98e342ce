"""Ctrl-C and SIGTERM during training: the first saves a checkpoint after the current step, a second one stops at once."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from ..errors import Interrupted

SIGNALS = (signal.SIGINT, signal.SIGTERM)
log = logging.getLogger(__name__)


class StopRequest:
    """Request to stop after the current step, of one run or of several side by side, made by the first signal."""

    def __init__(self) -> None:
        self.made = False
        self._on_first: list[Callable[[], None]] = []
        self.on_second: list[Callable[[], None]] = []
        """End workers in other processes."""

    def make(self) -> None:
        """Make the request; once."""
        if not self.made:
            self.made = True
            for pass_on in self._on_first:
                _in_thread(pass_on)

    def passed_by(self, pass_on: Callable[[], None]) -> None:
        """Have ``pass_on`` called in a thread when the request is made, or now if it is; it may be called twice."""
        self._on_first.append(pass_on)
        if self.made:
            _in_thread(pass_on)

    def signalled(self, number: int, _: Any) -> None:
        """Handle a signal; KeyboardInterrupt from the second one on."""
        if self.made:
            for end in self.on_second:
                end()
            raise KeyboardInterrupt
        name = signal.Signals(number).name
        log.info("%s: the run stops after this step, with a checkpoint; a second one stops it at once", name)
        self.make()


def _in_thread(pass_on: Callable[[], None]) -> None:
    # A signal may interrupt anything, also a write to the same store.
    threading.Thread(target=pass_on, daemon=True, name="stop request").start()


_current: StopRequest | None = None
"""Request of the signals that the main thread handles now."""


@contextmanager
def stopping_on_signals() -> Iterator[StopRequest]:
    """Handle :data:`SIGNALS` by the yielded request during the block.

    KeyboardInterrupt becomes :class:`instella_ray.errors.Interrupted`. Other threads, to which Python gives no signals, share
    the request of the main thread, if that is within such a block.
    """
    global _current
    if threading.current_thread() is not threading.main_thread():
        yield _current or StopRequest()
        return
    outer, request = _current, StopRequest()
    before = {number: signal.signal(number, request.signalled) for number in SIGNALS}
    _current = request
    try:
        yield request
    except KeyboardInterrupt as error:
        raise Interrupted(*error.args) from None
    finally:
        _current = outer
        for number, handler in before.items():
            signal.signal(number, handler)
