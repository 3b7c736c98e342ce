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
    """Request to stop a run after its current step, made by the first signal to this process."""

    def __init__(self) -> None:
        self.made = False
        self.on_first: Callable[[], None] | None = None
        """Passes the request on to workers in other processes; called in a thread."""
        self.on_second: Callable[[], None] | None = None
        """Ends workers in other processes."""

    def signalled(self, number: int, _: Any) -> None:
        """Handle a signal; KeyboardInterrupt from the second one on."""
        if self.made:
            if self.on_second is not None:
                self.on_second()
            raise KeyboardInterrupt
        self.made = True
        name = signal.Signals(number).name
        log.info("%s: the run stops after this step, with a checkpoint; a second one stops it at once", name)
        if self.on_first is not None:
            # A handler may interrupt anything, also a write to the same store.
            threading.Thread(target=self.on_first, daemon=True, name="stop request").start()


@contextmanager
def stopping_on_signals() -> Iterator[StopRequest]:
    """Handle :data:`SIGNALS` by the yielded request during the block.

    KeyboardInterrupt becomes :class:`instella_ray.errors.Interrupted`. Outside of the main thread, where Python allows no
    handlers, signals are left alone.
    """
    request = StopRequest()
    handled = SIGNALS if threading.current_thread() is threading.main_thread() else ()
    before = {number: signal.signal(number, request.signalled) for number in handled}
    try:
        yield request
    except KeyboardInterrupt as error:
        raise Interrupted(*error.args) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
