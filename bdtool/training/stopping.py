"""What SIGINT and SIGTERM ask of a run: to stop where its state is whole, and say how to go on."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from bdtool.errors import TrainingError


class Interrupted(TrainingError):
    """The user or the system asked the run to stop; its checkpoint is written."""


class StopNow(BaseException):
    """Raised by a signal where nothing is lost by stopping at once. No `Exception`: nobody on its way may handle it."""


class Stop:
    """What SIGINT and SIGTERM ask for: a stop after the step in hand, or one at once. A second one ends the process."""

    def __init__(self) -> None:
        self.requested = False
        self._at_once = False

    @contextmanager
    def at_once(self) -> Iterator[None]:
        self._at_once = True
        try:
            yield
        finally:
            self._at_once = False

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._at_once:
            self._at_once = False
            raise StopNow
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True


@contextmanager
def stop_signals() -> Iterator[Stop]:
    """Handle SIGINT and SIGTERM, where this is the main thread: no other one may."""
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    previous = {number: signal.signal(number, stop.on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
