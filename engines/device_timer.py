"""Time of engine calls on the device, where a call only enqueues: events on the stream before and after it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

from engines.base import Call


class Event(Protocol):
    """A point on a stream; `torch.cuda.Event` is one."""

    def record(self) -> None:
        """Put it on the stream, after the work that is there."""

    def elapsed_time(self, end: Any, /) -> float:
        """Return the milliseconds from here to `end`, an event of the same kind, both of them passed."""


class DeviceTimer:
    """Times calls that enqueue. Their times are known once the device is done: at `collect`.

    Where the device waits for the host to enqueue the next call, that wait is part of a call's time.
    """

    def __init__(self, new_event: Callable[[], Event], synchronize: Callable[[], None]) -> None:
        self._new_event = new_event
        self._synchronize = synchronize
        self._free: list[Event] = []
        self._pending: list[tuple[Event, Event, Callable[[float], None]]] = []

    def timed(self, call: Call, on_ms: Callable[[float], None]) -> Call:
        """Return `call` with an event on either side; `collect` hands its milliseconds to `on_ms`."""

        def timed_call() -> None:
            start, end = self._event(), self._event()
            start.record()
            call()
            end.record()
            self._pending.append((start, end, on_ms))

        return timed_call

    def collect(self) -> None:
        """Wait for the device and hand out the times of all calls since the last time."""
        self._synchronize()
        for start, end, on_ms in self._pending:
            on_ms(start.elapsed_time(end))
            self._free += start, end
        self._pending.clear()

    def _event(self) -> Event:
        return self._free.pop() if self._free else self._new_event()


@runtime_checkable
class TimedBackend(Protocol):
    """A backend whose calls may only enqueue."""

    def timer(self) -> DeviceTimer | None:
        """Return a timer of its device; None where calls return when they are done."""
